"""Turns a checkpoint of any kind into one .safetensors file with LlamaGen's plain parameter names,
quantised if that is asked for.

One tensor is in memory at a time, and the file is written whole or not at all.
"""

import argparse
from pathlib import Path

from autoregressive.cli.command import OneLineParser, run_command, slow_imports
from autoregressive.errors import UserError
from autoregressive.files import check_file
from kernels import QUANTIZATIONS

EXAMPLES = """\
examples:
  python scripts/convert_checkpoint.py c2i_B_256.pt c2i_B_256.safetensors --dtype bfloat16
  python scripts/convert_checkpoint.py results/vq/0400000.pt vq_averaged.safetensors --ema
  python scripts/convert_checkpoint.py cloud/gpt/0250000/ gpt.safetensors
  python scripts/convert_checkpoint.py c2i_XL_384.pt c2i_XL_384_int8.safetensors --quantization int8

The command reads .pt and .pth files (weights alone, or under model, module or state_dict),
.safetensors, directories with consolidated.pth, sharded directories of torch.distributed.checkpoint
(in both of its formats), and Hugging Face folders with model.safetensors or its parts and their
index. A converted file is loaded like the original, and faster. A quantised one has the layout of
the library compressed-tensors, with its config in the metadata, and draws what --quantization of
the commands draws from the original.
"""


def parse_arguments() -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = OneLineParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "input", type=Path, metavar="IN", help="the checkpoint: a file or a directory"
    )
    parser.add_argument(
        "output", type=Path, metavar="OUT", help="the file to write, NAME.safetensors"
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="take the averaged weights that training kept beside the others",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="convert the numbers (default: keep them as they are)",
    )
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="quantise the weights of a transformer's layers' products: fp8, int8, or int4 "
        "(experimental); --dtype is of the others then (default: no)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser.parse_args()


def check_output(path: Path, force: bool) -> None:
    """Finds out before any work whether the file can be written.

    Raises:
        UserError: it cannot.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: the name is not UTF-8; choose another") from error
    check_file("OUT", path, ".safetensors")
    if path.exists() and not force:
        raise UserError(
            f"{path}: exists already; choose another name, or give --force to replace it"
        )


def main() -> None:
    """Does what the command line says."""
    arguments = parse_arguments()
    check_output(arguments.output, arguments.force)
    with slow_imports(__name__):
        from autoregressive.weights.checkpoint import open_checkpoint
        from autoregressive.weights.conversion import check_complete, convert
    source = open_checkpoint(arguments.input, ema=arguments.ema)
    check_complete(source)
    written = convert(source, arguments.output, arguments.dtype, arguments.quantization)
    print(f"{arguments.output}: {written}")


if __name__ == "__main__":
    run_command(main)

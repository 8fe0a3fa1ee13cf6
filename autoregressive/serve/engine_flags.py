"""The engine's own flags, shared by its commands; everything else is in
`autoregressive.cli.flags`.
"""

import argparse
from dataclasses import fields
from typing import Any

from autoregressive.cli.command import OneLineParser
from autoregressive.cli.flags import PRECISION_HELP
from autoregressive.serve.engine.engine_config import MOST_LOOKAHEAD, EngineConfig
from kernels import BACKENDS, KV_CACHE_DTYPES, QUANTIZATIONS

MOST_ROWS = 512  # that the command takes unasked; the matrix units are busy by then


def add_engine_flags(parser: OneLineParser, max_num_seqs: str) -> None:
    """Adds the group; in it, what --precision and --compile mean here.

    Args:
        max_num_seqs: the default of --max-num-seqs, for --help.
    """
    parser.conflict_handler = (
        "resolve"  # the plain command's --precision and --compile give way to those below
    )
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-num-seqs",
        type=int,
        metavar="ROWS",
        help=f"rows that run at once; a guided picture has two (default: {max_num_seqs})",
    )
    group.add_argument(
        "--page-size",
        type=int,
        metavar="N",
        help=f"tokens of a page of the KV cache (default: {EngineConfig.page_size})",
    )
    group.add_argument(
        "--num-pages",
        type=int,
        metavar="N",
        help="pages of the KV cache (default: as many as fit, and as are of use)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        metavar="X",
        help="share of the GPU's memory that may be filled, everything counted; no effect beside "
        "--num-pages, none on a CPU "
        f"(default: {EngineConfig.gpu_memory_utilization})",
    )
    group.add_argument(
        "--enforce-eager",
        action="store_true",
        help="no CUDA graphs: starts sooner, runs slower; no effect on a CPU",
    )
    group.add_argument(
        "--attention-backend",
        choices=BACKENDS,
        metavar="B",
        help=f"{', '.join(BACKENDS)}: Triton kernels where they run, or one or the other for "
        "certain "
        f"(default: {EngineConfig.attention_backend})",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="with Triton kernels: a picture's tokens do not depend on what else is drawn, above "
        "64 rows too; on Hopper in 16 bits they never do, elsewhere it costs speed; with torch's "
        "operations (a CPU, an older GPU, --attention-backend torch): no promise",
    )
    group.add_argument(
        "--lookahead",
        type=_whole_number_or_word,
        metavar="W",
        help="positions of an image that a pass computes: auto (the fastest, as measured while it "
        f"runs), off, or 1 (off) to {MOST_LOOKAHEAD}. More of them take fewer passes for the same "
        "tokens, and a pass takes longer. Where all rows together have more than 64 positions "
        "(rows x W), a library computes the products on GPUs other than Hopper: the tokens may "
        "then differ from those of one position a pass, "
        "though they are drawn from the same probabilities. With --deterministic they are equal "
        f"(default: {EngineConfig.lookahead})",
    )
    add_quantization_flag(group)
    add_kv_cache_dtype_flag(group)
    add_tensor_parallel_flag(group)
    group.add_argument(
        "--precision",
        choices=["none", "fp16", "bf16"],
        metavar="P",
        help=f"{PRECISION_HELP}; pixels are decoded in bf16 on a GPU that has it, 45 dB or more "
        "from float32's",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="accepted, without effect: kernels and CUDA graphs take torch.compile's place",
    )


def add_quantization_flag(flags: argparse._ActionsContainer) -> None:
    """Adds --quantization, the scheme of the weights."""
    flags.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        metavar="Q",
        help="quantise the weights of the layers' products while they load: fp8 (half of the "
        "memory of 16 bits; on GPUs from compute capability 8.9 on), int8 (half; closer to the "
        "original), or int4 (a quarter; experimental) (default: as the checkpoint has them)",
    )


def add_tensor_parallel_flag(flags: argparse._ActionsContainer) -> None:
    """Adds --tensor-parallel-size."""
    flags.add_argument(
        "--tensor-parallel-size",
        type=int,
        metavar="N",
        help="GPUs, or processes on a CPU, that share the model: each has a part of the heads, of "
        "the feed-forward layer and of the KV cache, so that an image is drawn sooner and a larger "
        "model fits. An error lists the numbers that suit the model "
        f"(default: {EngineConfig.tensor_parallel_size})",
    )


def add_kv_cache_dtype_flag(flags: argparse._ActionsContainer) -> None:
    """Adds --kv-cache-dtype, what keys and values are kept in."""
    flags.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        metavar="D",
        help="keep keys and values in int8 or fp8 (about half of the memory of 16 bits; fp8 from "
        "compute capability 8.9 on, int8 closer to the original), or auto: in the weights' "
        "precision "
        f"(default: {EngineConfig.kv_cache_dtype})",
    )


def engine_config(
    arguments: argparse.Namespace, max_num_seqs: int, **settings: Any
) -> EngineConfig:
    """What was typed, and defaults for the rest.

    Args:
        arguments: parsed by a parser with flags of the engine.
        max_num_seqs: used where none was typed.
        settings: used whatever was typed.

    Raises:
        SettingError: a value is out of range.
    """
    said = {field.name: getattr(arguments, field.name, None) for field in fields(EngineConfig)}
    given = {name: value for name, value in (said | settings).items() if value is not None}
    return EngineConfig(**{"max_num_seqs": max_num_seqs, **given})


def _whole_number_or_word(text: str) -> int | str:
    """What was typed, as a number if it is one. `EngineConfig` checks it."""
    try:
        return int(text)
    except ValueError:
        return text

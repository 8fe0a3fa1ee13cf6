"""Writes the weights of a checkpoint of any kind as one .safetensors file.

One tensor is in memory at a time, and the file is written whole or not at all.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from autoregressive.errors import UserError
from autoregressive.files import write_whole
from autoregressive.models.gpt import GPT_models
from autoregressive.progress import progress_bar
from autoregressive.weights.checkpoint import CheckpointError, WeightSource
from autoregressive.weights.mismatch import COMPUTED_HERE, find_incomplete, identify
from tokenizer.tokenizer_image.vq_model import VQ_models

# The codes of the safetensors format; sorted by size in the file, so that each tensor is aligned.
FORMAT_CODES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
HEADER_ALIGNMENT_BYTES = 8
LEAST_SHARED = 0.5  # of a known model's weights, by which a part of it is recognised
MOST_REPEATS = 2  # weights that share their numbers, as an embedding and an output can


def convert(source: WeightSource, output: Path, dtype: str | None) -> str:
    """Writes the source's weights to a temporary file, checks it, and moves it into place.

    Args:
        dtype: torch's name of it, of the floating-point tensors; None keeps each as it is.

    Returns:
        What was written, in words.

    Raises:
        UserError: the source is damaged or holds something the format has no code for, or the disk
            is full.
    """
    dtypes = {
        name: getattr(torch, dtype) if dtype and stored.is_floating_point else stored
        for name, stored in source.dtypes.items()
        if name not in COMPUTED_HERE
    }
    if not dtypes:
        raise CheckpointError(source.path, "holds no weights; use another file")
    for name, kind in dtypes.items():
        if kind not in FORMAT_CODES:
            way = "give --dtype, or use" if kind.is_floating_point else "use"
            told = f"{name} is {kind}, which is not written here; {way} another file"
            raise CheckpointError(source.path, told)
    check_size(source, dtypes)

    def write(part: Path) -> None:
        with part.open("wb") as stream:
            write_safetensors(source, dtypes, stream)
        check_written(part, source, dtypes)

    write_whole(output, write)
    model = identify(source.shapes) or "a model that is not known here"
    parameters = sum(source.shapes[name].numel() for name in dtypes)
    megabytes = output.stat().st_size / 1e6
    return f"{model}, {parameters / 1e6:.1f} million numbers, {megabytes:.1f} MB"


def check_size(source: WeightSource, names: Iterable[str]) -> None:
    """A few stored numbers can stand for any number of weights, which would fill the memory and the
    disk.

    Raises:
        CheckpointError: the weights are many times larger than what is stored.
    """
    files = [source.path] if source.path.is_file() else source.path.iterdir()
    stored = sum(file.stat().st_size for file in files if file.is_file())
    claimed = sum(source.shapes[name].numel() * source.dtypes[name].itemsize for name in names)
    if claimed > MOST_REPEATS * stored:
        told = f"claims {claimed:,} bytes of weights, more than the checkpoint has ({stored:,})"
        raise CheckpointError(source.path, f"{told}; use another file")


def check_complete(source: WeightSource) -> None:
    """A folder does not always tell that one of its files was not copied; the known models do.

    Raises:
        CheckpointError: the weights are those of a known model, or most of them, and not all.
    """
    found = source.shapes
    with torch.device("meta"):
        known = {
            name: {key: tensor.shape for key, tensor in build().state_dict().items()}
            for name, build in {**GPT_models, **VQ_models}.items()
        }
    if any(find_incomplete(wanted, found) is None for wanted in known.values()):
        return
    shared = {
        name: len(wanted.items() & found.items()) / len(wanted) for name, wanted in known.items()
    }
    nearest = identify(found) or max(known, key=lambda name: shared[name])
    if nearest != identify(found) and shared[nearest] < LEAST_SHARED:
        return
    incomplete = find_incomplete(known[nearest], found)
    raise CheckpointError(
        source.path, f"is no complete {nearest} ({incomplete}); copy all of it again"
    )


def write_safetensors(
    source: WeightSource, dtypes: dict[str, torch.dtype], stream: BinaryIO
) -> None:
    """Header, then tensor after tensor. The library's `save_file` would need all of them in memory
    at once.
    """
    order = sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + source.shapes[name].numel() * dtypes[name].itemsize
        code, shape = FORMAT_CODES[dtypes[name]], list(source.shapes[name])
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    stream.write(len(text).to_bytes(8, "little") + text)
    with progress_bar("converting", "B", end, unit_scale=True, leave=False) as progress:
        for name in order:
            tensor = torch.empty(source.shapes[name], dtype=dtypes[name])
            source.read_into(name, tensor)
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            progress.update(tensor.nbytes)


def check_written(path: Path, source: WeightSource, dtypes: dict[str, torch.dtype]) -> None:
    """Reads the file's header back through the library.

    Raises:
        UserError: it is not what was to be written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            agree = names == dtypes.keys() and all(
                file.get_slice(name).get_shape() == list(source.shapes[name]) for name in names
            )
    except SafetensorError as error:
        raise UserError(f"{path}: came out damaged ({error}); is the disk full?") from error
    if not agree:
        raise UserError(
            f"{path}: came out with other tensors than {source.path} holds; nothing was left behind"
        )

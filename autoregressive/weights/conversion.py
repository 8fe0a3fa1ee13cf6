"""Writes the weights of a checkpoint of any kind as one .safetensors file, quantised if that is
asked for.

One tensor is in memory at a time, and the file is written whole or not at all.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoregressive.errors import UserError
from autoregressive.files import write_whole
from autoregressive.models.config import GPT_SHAPES
from autoregressive.models.gpt import GPT_models
from autoregressive.progress import progress_bar
from autoregressive.weights.checkpoint import CheckpointError, WeightSource
from autoregressive.weights.compressed_layout import (
    CONFIG_KEY,
    config_for,
    is_product_weight,
    written_parts,
    written_tensors,
)
from autoregressive.weights.mismatch import COMPUTED_HERE, find_incomplete, identify
from kernels.quantization import FP8
from tokenizer.tokenizer_image.vq_model import VQ_models

# The codes of the safetensors format; sorted by size in the file, so that each tensor is aligned.
FORMAT_CODES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_QUANTIZED_CODES = {FP8: "F8_E4M3"}
HEADER_ALIGNMENT_BYTES = 8
LEAST_SHARED = 0.5  # of a known model's weights, by which a part of it is recognised
MOST_REPEATS = 2  # weights that share their numbers, as an embedding and an output can

Described = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Group:
    """Tensors of the file that are made together, of one tensor of the source."""

    described: dict[str, Described]
    make: Callable[[], dict[str, Tensor]]


def convert(
    source: WeightSource, output: Path, dtype: str | None, quantization: str | None = None
) -> str:
    """Writes the source's weights to a temporary file, checks it, and moves it into place.

    Args:
        dtype: torch's name of it, of the floating-point tensors; None keeps each as it is.
        quantization: of the weights of a transformer's layers' products, "fp8", "int8" or "int4".
            They are quantised as loading does it, from the numbers of the source.

    Returns:
        What was written, in words.

    Raises:
        UserError: the source is damaged, is quantised already, holds something the format has no
            code for, or has nothing to quantise; or the disk is full.
    """
    if source.quantization is not None:
        told = f"holds {source.quantization} weights already; convert the original ones"
        raise CheckpointError(source.path, told)
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
    model = identify(source.shapes) or "a model that is not known here"
    groups = [_as_it_is(source, name, kind) for name, kind in dtypes.items()]
    metadata = {"format": "pt"}
    if quantization is not None:
        if model not in GPT_SHAPES:
            told = f"is {model}, and transformers alone are quantised; leave out --quantization"
            raise CheckpointError(source.path, told)
        groups = [
            _quantized(source, name, quantization) if is_product_weight(name) else group
            for name, group in zip(dtypes, groups, strict=True)
        ]
        metadata[CONFIG_KEY] = json.dumps(config_for(quantization))

    def write(part: Path) -> None:
        with part.open("wb") as stream:
            write_safetensors(groups, metadata, stream)
        check_written(part, source, groups)

    write_whole(output, write)
    parameters = sum(source.shapes[name].numel() for name in dtypes)
    megabytes = output.stat().st_size / 1e6
    return f"{model}, {parameters / 1e6:.1f} million numbers, {megabytes:.1f} MB"


def _as_it_is(source: WeightSource, name: str, dtype: torch.dtype) -> Group:
    shape = tuple(source.shapes[name])

    def make() -> dict[str, Tensor]:
        tensor = torch.empty(shape, dtype=dtype)
        source.read_into(name, tensor)
        return {name: tensor}

    return Group({name: (dtype, shape)}, make)


def _quantized(source: WeightSource, name: str, scheme: str) -> Group:
    outputs, inputs = source.shapes[name]
    product = name.removesuffix(".weight")
    return Group(
        written_parts(product, scheme, outputs, inputs),
        lambda: written_tensors(product, source.read_quantized(name, scheme, torch.device("cpu"))),
    )


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
    groups: Sequence[Group], metadata: Mapping[str, str], stream: BinaryIO
) -> None:
    """Header, then tensor after tensor. The library's `save_file` would need all of them in memory
    at once.
    """

    def largest(group: Group) -> tuple[int, str]:
        return -max(dtype.itemsize for dtype, _ in group.described.values()), min(group.described)

    ordered = sorted(groups, key=largest)
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for group in ordered:
        for name, (dtype, shape) in _in_order(group):
            start, end = end, end + prod(shape) * dtype.itemsize
            code = _QUANTIZED_CODES.get(dtype) or FORMAT_CODES[dtype]
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    stream.write(len(text).to_bytes(8, "little") + text)
    with progress_bar("converting", "B", end, unit_scale=True, leave=False) as progress:
        for group in ordered:
            tensors = group.make()
            for name, described in _in_order(group):
                tensor = tensors[name]
                assert (tensor.dtype, tuple(tensor.shape)) == described
                stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                progress.update(tensor.nbytes)


def _in_order(group: Group) -> list[tuple[str, Described]]:
    """The tensors of a group, the widest numbers first, so that each is aligned."""
    return sorted(group.described.items(), key=lambda item: (-item[1][0].itemsize, item[0]))


def check_written(path: Path, source: WeightSource, groups: Sequence[Group]) -> None:
    """Reads the file's header back through the library.

    Raises:
        UserError: it is not what was to be written.
    """
    wanted = {name: list(shape) for group in groups for name, (_, shape) in group.described.items()}
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: came out damaged ({error}); is the disk full?") from error
    if found != wanted:
        raise UserError(
            f"{path}: came out with other tensors than {source.path} holds; nothing was left behind"
        )

"""Reads .safetensors files and folders of them: Hugging Face's parts with an index, and
torch.distributed.checkpoint's shards.

The library maps files; a mapped file that becomes shorter kills the process. The format is a table
in JSON and numbers behind it.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoregressive.weights.stored_tensor import (
    DAMAGED,
    HAS_PROBLEM,
    BadContentError,
    CheckpointError,
    Choose,
    Chunk,
    ChunkedTensor,
    StoredFile,
    StoredTensor,
    check_coverage,
    is_shape,
    reading,
    require,
    visible_names,
)

INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"
_MOST_JSON_BYTES = 4 * 2**20  # of a header or an index: some 40,000 tensors
_MOST_FOLDER_JSON_BYTES = 16 * 2**20  # of all headers of a folder: 500 weights on 160 processes
_SHARDING_KEY, _OFFSETS_KEY = "DCP_SHARDING_INFO", "saved_offsets"  # torch.distributed.checkpoint's
_PART_OF = re.compile(r".*-(\d{5})-of-(\d{5})\.safetensors")

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class SafetensorsFile:
    """The tensors of one file, and where each lies in the whole one that it is a part of, if the
    file says so.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    offsets: Mapping[str, tuple[int, ...]] | None
    header_bytes: int
    metadata: Mapping[str, str]


def read_safetensors(path: Path) -> SafetensorsFile:
    """Opens a file.

    Raises:
        CheckpointError: it is damaged, or a table in it is too large.
    """
    file = StoredFile(path)
    with reading(path):
        size = int.from_bytes(file.read(0, 8), "little")
        require(size <= file.size - 8, DAMAGED)
        require(
            size <= _MOST_JSON_BYTES,
            f"describes its tensors in {size:,} bytes, which is too much; use another file",
        )
    with reading(path, HAS_PROBLEM):
        header = _parse(file.read(8, size))
        metadata = _metadata(header.pop("__metadata__", None))
        tensors = _tensors(header, file, 8 + size)
        return SafetensorsFile(path.name, tensors, _offsets(metadata, tensors), size, metadata)


def _parse(text: bytes | str) -> dict[str, Any]:
    """A table; its nesting is bounded by the interpreter, its size by the caller."""
    try:
        table = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise BadContentError("its description is not JSON") from error
    require(isinstance(table, dict), "its description is no table")
    return table


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        require(name not in table, f"{name} is there twice")
        table[name] = value
    return table


def _tensors(header: Mapping[str, Any], file: StoredFile, start: int) -> dict[str, StoredTensor]:
    """Checked as the format demands: one behind the other, from the header to the file's end."""
    tensors, places = {}, [(0, 0)]
    for name, entry in header.items():
        require(isinstance(entry, dict), f"{name} is not described")
        dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        require(isinstance(dtype, str) and dtype in _DTYPES, f"{name} is of no known dtype")
        require(
            is_shape(shape) and isinstance(place, list) and is_shape(place) and len(place) == 2,
            f"{name} has no shape or place",
        )
        begin, end = place
        require(
            math.prod(shape) * _DTYPES[dtype].itemsize == end - begin,
            f"{name} has other bytes than its shape",
        )
        places.append((begin, end))
        tensors[name] = StoredTensor(file, start + begin, _DTYPES[dtype], torch.Size(shape))
    places = [*sorted(places), (file.size - start, file.size)]
    for (_, end), (begin, _) in itertools.pairwise(places):
        require(begin == end, "its tensors overlap, leave holes, or end elsewhere than the file")
    return tensors


def _metadata(extra: Any) -> dict[str, str]:
    if extra is None:
        return {}
    require(
        isinstance(extra, dict) and all(isinstance(value, str) for value in extra.values()),
        "__metadata__ is no table of texts",
    )
    return extra


def _offsets(
    metadata: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> dict[str, tuple[int, ...]] | None:
    if _SHARDING_KEY not in metadata:
        return None
    sharding, offsets = _parse(metadata[_SHARDING_KEY]), {}
    for name, tensor in tensors.items():
        entry = sharding.get(name)
        offset: Any = entry.get(_OFFSETS_KEY) if isinstance(entry, dict) else None
        require(
            isinstance(offset, list) and is_shape(offset) and len(offset) == len(tensor.shape),
            f"{_SHARDING_KEY} does not say where {name} belongs",
        )
        offsets[name] = tuple(offset)
    return offsets


def open_safetensors_folder(path: Path, choose: Choose) -> dict[str, ChunkedTensor]:
    """The weights of a folder with one file, with parts and their index, or with shards that say
    what they are.

    Args:
        choose: picks the weights among the names: plain name -> name. The others are not looked at.

    Raises:
        BadContentError: there is more than one index, or `choose` finds nothing.
        CheckpointError: a part is missing or one too many, damaged, or belongs to another
            checkpoint.
    """
    names, indices = visible_names(path, SUFFIX), visible_names(path, INDEX_SUFFIX)
    require(
        len(indices) < 2,
        f"has more than one index: {', '.join(indices)}; move all but one elsewhere",
    )
    with reading(path, "{}; copy the whole folder again"):
        if indices:
            index = _read_index(path / indices[0])
            # A name with a folder in it is no file of this folder. A file that the index does not
            # name is not its own, as `consolidated.safetensors` beside parts.
            named = set(index.values())
            missing = min(named.difference(names), default=None)
            require(
                missing is None,
                f"{missing}, which {indices[0]} names, is no file of this folder",
            )
            parts = _read_parts(path, sorted(named))
            _check_index(parts, index, indices[0])
        else:
            _check_numbers(names)
            parts = _read_parts(path, names)
    require(
        bool(indices) or len(parts) == 1 or all(part.offsets is not None for part in parts),
        f"has {len(parts)} {SUFFIX} files and no model{INDEX_SUFFIX} that says what each holds; "
        "copy the whole folder again, or name one of the files",
    )
    pieces = _pieces(parts)
    chosen = choose(pieces)
    with reading(path, "is not complete: {}; copy the whole folder again"):
        tensors = {plain: _joined(name, pieces[name]) for plain, name in chosen.items()}
        check_coverage(tensors.values())
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Reads an index: which tensor is in which file."""
    file = StoredFile(path)
    with reading(path):
        require(
            file.size <= _MOST_JSON_BYTES,
            f"has {file.size:,} bytes, which is too much; use another checkpoint",
        )
    with reading(path, HAS_PROBLEM):
        index = _parse(file.read(0, file.size)).get("weight_map")
        require(
            isinstance(index, dict) and all(isinstance(part, str) for part in index.values()),
            "it has no weight_map from weights to files",
        )
    return index  # type: ignore[return-value]


def _read_parts(path: Path, names: Sequence[str]) -> list[SafetensorsFile]:
    parts: list[SafetensorsFile] = []
    room = _MOST_FOLDER_JSON_BYTES
    for name in names:
        parts.append(read_safetensors(path / name))
        room -= parts[-1].header_bytes
        if room < 0:
            raise CheckpointError(
                path,
                f"describes its tensors in more than {_MOST_FOLDER_JSON_BYTES:,} bytes, which is "
                "too much; use another checkpoint",
            )
    return parts


def _check_numbers(names: Sequence[str]) -> None:
    """Parts that say how many they are are all there: without an index only their names tell.

    Numbers of shards do not matter: torch writes no file for a process that holds nothing.
    """
    found = [match for match in map(_PART_OF.fullmatch, names) if match is not None]
    count = max((int(match[2]) for match in found), default=0)
    there = {int(match[1]) for match in found}
    missing = next((number for number in range(1, count + 1) if number not in there), None)
    require(missing is None, f"part {missing} of {count} is missing")


def _check_index(
    parts: Sequence[SafetensorsFile], index: Mapping[str, str], index_name: str
) -> None:
    """Refuses parts that hold other weights than the index says."""
    held = {(name, part.name) for part in parts for name in part.tensors}
    for name, file in sorted(held ^ set(index.items())):
        raise BadContentError(
            f"{file} holds {name}, and {index_name} says otherwise"
            if (name, file) in held
            else f"{name} is not in {file}, where {index_name} says otherwise"
        )


Piece = tuple[tuple[int, ...], StoredTensor]  # where it begins in the whole tensor


def _pieces(parts: Sequence[SafetensorsFile]) -> dict[str, list[Piece]]:
    """Name -> the tensor's pieces in all files."""
    pieces: dict[str, list[Piece]] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            offsets = (0,) * len(tensor.shape) if part.offsets is None else part.offsets[name]
            pieces.setdefault(name, []).append((offsets, tensor))
    return pieces


def _joined(name: str, pieces: Sequence[Piece]) -> ChunkedTensor:
    """The tensor that its pieces make."""
    require(
        len({(piece.dtype, len(offsets)) for offsets, piece in pieces}) == 1,
        f"the pieces of {name} are of several kinds",
    )
    chunks = [
        Chunk(offsets, tuple(piece.shape), lambda piece=piece: piece)  # type: ignore[misc]
        for offsets, piece in pieces
    ]
    shape = torch.Size(max(ends) for ends in zip(*(chunk.ends for chunk in chunks), strict=True))
    return ChunkedTensor(name, pieces[0][1].dtype, shape, chunks)

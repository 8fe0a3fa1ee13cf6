"""Directories written by torch.distributed.checkpoint (FSDP's sharded state dict), read without a
process group.

The library unpickles the directory's `.metadata`, and entries that are no tensors, freely. Here
`.metadata` and each piece of a tensor become inert records: no name in them is resolved and nothing
is called. Only checked numbers and strings are used.
"""

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autoregressive.weights.inert_pickle import (
    MOST_INSTRUCTIONS,
    InertUnpickler,
    Name,
    Pairs,
    PickleRefused,
    Record,
    kind_of,
)
from autoregressive.weights.stored_tensor import (
    Chunk,
    ChunkedTensor,
    StoredFile,
    StoredTensor,
    chunked_source,
    is_shape,
    visible_names,
)
from autoregressive.weights.torch_file import (
    DTYPES,
    READABLE_DTYPES,
    ArchiveLimits,
    read_torch_archive,
)
from autoregressive.weights.weight_source import (
    BadContentError,
    CheckpointError,
    WeightSource,
    require,
)

METADATA_FILE = ".metadata"
_DAMAGED = "is damaged or cut short; copy the whole directory again"

_MOST_METADATA_BYTES = 64 * 2**20
# Hundreds of processes leave large metadata, and large shards: of so many bytes of these, an
# instruction may be read.
_BYTES_PER_INSTRUCTION, _MOST_INSTRUCTIONS = 256, 6_000_000

# The metadata can refer to one of its parts thousands of times. What is done with a part is
# therefore bounded.
_MOST_FIELDS = 16
_MOST_CHUNKS = 150_000  # of all weights: 500 weights on 300 processes
# A piece is one tensor: some 60 instructions and 10 members.
_PIECE = ArchiveLimits(pickle_bytes=64 * 2**10, instructions=1000, directory_bytes=16 * 2**10)

_METADATA, _FILESYSTEM = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)
_BEFORE_TORCH_2_3 = "torch.distributed._shard.sharded_tensor.metadata"
_KNOWN_NAMES = frozenset(f"{module}.{name}" for module, name in (
    *((_METADATA, name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    (_FILESYSTEM, "_StorageInfo"),
    (_BEFORE_TORCH_2_3, "TensorProperties"),
    (_BEFORE_TORCH_2_3, "MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    # Where the checkpoint was written. Python 3.13 moved the classes.
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    *((module, "WindowsPath") for module in ("pathlib", "pathlib._local")),
    *(("torch", name) for name in ("Size", *DTYPES)),
))  # fmt: skip


def open_sharded(path: Path, ema: bool) -> WeightSource:
    """The weights in such a directory; entries beside them (optimizer, steps) are left alone.

    Raises:
        CheckpointError: the metadata is damaged or hostile, a shard is missing or cut short, or
            `ema` is not there.
    """
    pickled = _read_metadata(path)
    try:
        fields = _state(pickled, "Metadata")
        entries = _exactly(Pairs, fields["state_dict_metadata"]).entries()
        tensors = [
            name for name, entry in entries.items() if kind_of(entry) == "TensorStorageMetadata"
        ]
        shards = _Shards(path, _places(fields["storage_data"]))
        source = chunked_source(
            path, tensors, lambda name: _tensor(name, entries[name], shards), ema
        )
        shards.check_disjoint()
        return source
    except CheckpointError:
        raise
    except BadContentError as error:
        raise CheckpointError(path / METADATA_FILE, f"refused: {error}") from error
    except Exception as error:  # what is missing or of another type can raise anything
        raise CheckpointError(path / METADATA_FILE, _DAMAGED) from error


def _read_metadata(path: Path) -> object:
    file = StoredFile(path / METADATA_FILE)
    if file.size > _MOST_METADATA_BYTES:
        raise CheckpointError(
            file.path,
            f"has {file.size:,} bytes, which is too much; save the weights without the optimizer",
        )
    shards_bytes = sum((path / name).stat().st_size for name in visible_names(path, ".distcp"))
    most = min(MOST_INSTRUCTIONS + shards_bytes // _BYTES_PER_INSTRUCTION, _MOST_INSTRUCTIONS)
    content = file.read(0, file.size)
    try:
        return InertUnpickler(content, _KNOWN_NAMES, most_instructions=most).load()
    except PickleRefused as error:
        raise CheckpointError(
            file.path, f"refused, this is not what describes a checkpoint: {error}"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(file.path, _DAMAGED) from error


def _places(pickled: object) -> dict[tuple[str, str], object]:
    """Name and offsets of a chunk -> where it is stored, unchecked. Offsets are texts: hashes of
    numbers can be made to collide.
    """
    places = {}
    for index, place in _exactly(Pairs, pickled):
        fields = _state(index, "MetadataIndex")
        if fields.get("offset") is not None:  # as it is for what is no tensor
            places[_exactly(str, fields["fqn"]), str(tuple(_shape(fields["offset"])))] = place
    return places


def _tensor(name: str, entry: Record, shards: "_Shards") -> ChunkedTensor:
    fields = _state(entry, "TensorStorageMetadata")
    size = _shape(fields["size"])
    named = _state(fields["properties"], "TensorProperties", tuple)[0]
    require(type(named) is Name and named.name in DTYPES, f"{name} has no dtype")
    dtype = DTYPES[named.name]
    require(dtype in READABLE_DTYPES, f"{name} is {named.name}, which torch cannot convert")
    parts = _exactly(list, fields["chunks"])
    shards.count_chunks(len(parts))
    chunks, bytes_stored, seen = [], 0, set()
    for part in parts:
        described = _state(part, "ChunkStorageMetadata")
        offsets, sizes = tuple(_shape(described["offsets"])), tuple(_shape(described["sizes"]))
        if 0 in sizes:  # an empty rank of an uneven split, for which nothing is stored
            continue
        # Hashes of texts cannot be made to collide.
        require(str(offsets) not in seen, f"parts of {name} overlap")
        seen.add(str(offsets))
        require(len(seen) <= size.numel(), f"{name} has more parts than elements")
        file, start, length = shards.place(name, offsets)
        bytes_stored += length
        chunks.append(
            Chunk(
                offsets,
                sizes,
                functools.partial(_read_piece, name, shards.path, file, start, length),
            )
        )
    require(bytes_stored >= size.numel() * dtype.itemsize, f"{name} is stored only in part")
    return ChunkedTensor(name, shards.path, dtype, size, chunks)


def _read_piece(name: str, path: Path, file: StoredFile, start: int, length: int) -> StoredTensor:
    """Each piece is what `torch.save` writes."""
    saved = read_torch_archive(file, start, length, _PIECE)
    tensor = saved.tensor(saved.content)
    if tensor is None:
        raise CheckpointError(
            path, f"the shards of {name} are damaged; copy the whole directory again"
        )
    return tensor


class _Shards:
    """The files beside `.metadata`, and what lies where in them."""

    def __init__(self, path: Path, places: Mapping[tuple[str, str], object]) -> None:
        self.path = path
        self._files: dict[str, StoredFile] = {}
        self._chunks = 0
        self._used: list[tuple[str, int, int]] = []  # file, first byte and end of what is loaded
        # Also of what is not loaded: a directory of which a part is missing was not copied as a
        # whole.
        self._places = {chunk: self._checked(place) for chunk, place in places.items()}

    def place(self, name: str, offsets: tuple[int, ...]) -> tuple[StoredFile, int, int]:
        """Where a chunk is: the file, its first byte there, and how many it has."""
        place = self._places.get((name, str(offsets)))
        if place is None:
            raise BadContentError(f"a part of {name} is stored nowhere")
        file, start, length = place
        self._used.append((file.path.name, start, start + length))
        return place

    def count_chunks(self, count: int) -> None:
        """Raises `BadContentError` if there are more, with those that were counted before, than a
        checkpoint has.
        """
        self._chunks += count
        require(
            self._chunks <= _MOST_CHUNKS, f"its weights are in more than {_MOST_CHUNKS:,} parts"
        )

    def check_disjoint(self) -> None:
        """Raises `BadContentError` if two chunks share bytes: reading a file would take many
        times as long as its size.
        """
        for (file, _, end), (next_file, start, _) in itertools.pairwise(sorted(self._used)):
            require(file != next_file or end <= start, f"two parts share bytes of {file}")

    def _checked(self, info: object) -> tuple[StoredFile, int, int]:
        """Checks that a place is in a file beside `.metadata` that is long enough."""
        fields = _state(info, "_StorageInfo")
        file_name, start, length = fields["relative_path"], fields["offset"], fields["length"]
        require(
            type(file_name) is str,
            "it refers to a shard without a name, which is no file of this directory",
        )
        plain = file_name not in ("", ".", "..") and not set(file_name) & set("/\\\0")
        require(plain, f"it refers to {file_name!r}, which is no file of this directory")
        require(
            all(type(n) is int and n >= 0 for n in (start, length)),
            f"it gives no place in {file_name}",
        )
        require(
            not fields.get("transform_descriptors"),
            "its shards are compressed, which is not supported",
        )
        file = self._file(file_name)
        if file.size < start + length:
            raise CheckpointError(
                self.path, f"the shard {file_name} is cut short; copy the whole directory again"
            )
        return file, start, length

    def _file(self, name: str) -> StoredFile:
        if name not in self._files:
            if not (self.path / name).is_file():
                raise CheckpointError(
                    self.path, f"the shard {name} is missing; copy the whole directory again"
                )
            self._files[name] = StoredFile(self.path / name)
        return self._files[name]


def _state(value: Any, kind: str, wanted: type = Pairs) -> Any:
    """The state of a record of that kind; a dictionary by its names."""
    there = type(value) is Record and value.kind == kind
    require(there, f"a {kind} is not what it should be")
    state = _exactly(wanted, value.state)
    require(len(state) <= _MOST_FIELDS, f"a {kind} has more fields than it should")
    return state.entries() if wanted is Pairs else state


def _shape(value: Any) -> torch.Size:
    there = type(value) is Record and value.kind == "Size" and len(value.arguments) == 1
    require(there, "something has no shape")
    sides = _exactly(tuple, value.arguments[0])
    require(is_shape(sides), "a shape has impossible sides")
    return torch.Size(sides)


def _exactly(wanted: type, value: object) -> Any:
    require(
        type(value) is wanted, f"a {wanted.__name__} is needed where there is a {kind_of(value)}"
    )
    return value

"""Directories written by torch.distributed.checkpoint (FSDP's sharded state dict), read without a
process group.

The library unpickles the directory's `.metadata`, and entries that are no tensors, freely. Here
`.metadata` and each piece of a tensor become inert records: no name in them is resolved and nothing
is called. Only checked numbers and strings are used.
"""

import functools
import io
import itertools
from pathlib import Path
from typing import Any

import torch

from autoregressive.weights.inert_pickle import (
    MOST_INSTRUCTIONS,
    Name,
    Pairs,
    Record,
    kind_of,
    read_pickle,
)
from autoregressive.weights.stored_tensor import (
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
from autoregressive.weights.torch_file import (
    DTYPES,
    READABLE_DTYPES,
    SavedTensor,
    read_torch_archive,
)

METADATA_FILE = ".metadata"
_WHOLE = "TensorStorageMetadata"  # describes a tensor
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
_PIECE = {"pickle_bytes": 64 * 2**10, "instructions": 1000, "directory_bytes": 16 * 2**10}

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


def open_sharded(path: Path, choose: Choose) -> dict[str, ChunkedTensor]:
    """The weights in such a directory; entries beside them (optimizer, steps) are left alone.

    Args:
        choose: picks the weights among the names: plain name -> name.

    Raises:
        BadContentError: `choose` finds nothing.
        CheckpointError: the metadata is damaged or hostile, or a shard is missing or cut short.
    """
    metadata = path / METADATA_FILE
    pickled = _read_metadata(path)
    with reading(metadata, "refused: {}", _DAMAGED):
        fields = _state(pickled, "Metadata")
        entries = _exactly(Pairs, fields["state_dict_metadata"]).entries()
        names = [name for name, entry in entries.items() if kind_of(entry) == _WHOLE]
        places = _places(path, fields["storage_data"])
    chosen = choose(names)
    with reading(metadata, "refused: {}", _DAMAGED):
        wanted = {name: _state(entries[name], _WHOLE) for name in chosen.values()}
        require(
            sum(len(_exactly(list, entry["chunks"])) for entry in wanted.values()) <= _MOST_CHUNKS,
            f"its weights are in more than {_MOST_CHUNKS:,} parts",
        )
        tensors = {plain: _tensor(name, wanted[name], places) for plain, name in chosen.items()}
        check_coverage(tensors.values())
    return tensors


def _read_metadata(path: Path) -> object:
    file = StoredFile(path / METADATA_FILE)
    with reading(file.path):
        require(
            file.size <= _MOST_METADATA_BYTES,
            f"has {file.size:,} bytes, which is too much; save the weights without the optimizer",
        )
    shards_bytes = sum((path / name).stat().st_size for name in visible_names(path, ".distcp"))
    most = min(MOST_INSTRUCTIONS + shards_bytes // _BYTES_PER_INSTRUCTION, _MOST_INSTRUCTIONS)
    with reading(
        file.path, "refused, this is not what describes a checkpoint: {}", damage=_DAMAGED
    ):
        return read_pickle(
            io.BytesIO(file.read(0, file.size)), _KNOWN_NAMES, most_instructions=most
        )


def _tensor(name: str, fields: dict[str, Any], places: "_Places") -> ChunkedTensor:
    size = _shape(fields["size"])
    named = _state(fields["properties"], "TensorProperties", tuple)[0]
    require(type(named) is Name and named.name in DTYPES, f"{name} has no dtype")
    dtype = DTYPES[named.name]
    require(dtype in READABLE_DTYPES, f"{name} is {named.name}, which torch cannot convert")
    chunks, bytes_stored = [], 0
    for part in fields["chunks"]:
        described = _state(part, "ChunkStorageMetadata")
        offsets, sizes = tuple(_shape(described["offsets"])), tuple(_shape(described["sizes"]))
        if 0 in sizes:  # an empty rank of an uneven split, for which nothing is stored
            continue
        require((name, str(offsets)) in places, f"a part of {name} is stored nowhere")
        place = places[name, str(offsets)]
        bytes_stored += place[2]
        chunks.append(Chunk(offsets, sizes, functools.partial(_read_piece, name, *place)))
    require(bytes_stored >= size.numel() * dtype.itemsize, f"{name} is stored only in part")
    return ChunkedTensor(name, dtype, size, chunks)


def _read_piece(name: str, file: StoredFile, start: int, length: int) -> StoredTensor:
    """Each piece is what `torch.save` writes."""
    saved = read_torch_archive(file, start, length, **_PIECE)
    require(
        isinstance(saved.content, SavedTensor),
        f"the shards of {name} are damaged; copy the whole directory again",
    )
    return saved.find(saved.content)


# Name and offsets of a chunk -> its file, its first byte there, and how many it has. Offsets are
# texts: hashes of numbers can be made to collide.
_Places = dict[tuple[str, str], tuple[StoredFile, int, int]]


def _places(path: Path, storage_data: object) -> _Places:
    """Where everything lies in the files beside `.metadata`, also what is not loaded: a directory
    of which a part is missing was not copied as a whole.
    """
    places: _Places = {}
    files: dict[str, StoredFile] = {}
    for index, info in _exactly(Pairs, storage_data).items:
        described = _state(index, "MetadataIndex")
        if described.get("offset") is None:  # as it is for what is no tensor
            continue
        fields = _state(info, "_StorageInfo")
        name, start, length = fields["relative_path"], fields["offset"], fields["length"]
        shown = repr(name) if type(name) is str else "a shard without a name"
        require(
            type(name) is str and name not in ("", ".", "..") and not set(name) & set("/\\\0"),
            f"it refers to {shown}, which is no file of this directory",
        )
        require(
            all(type(n) is int and n >= 0 for n in (start, length)),
            f"it gives no place in {name}",
        )
        require(
            not fields.get("transform_descriptors"),
            "its shards are compressed, which is not supported",
        )
        with reading(path, "the shard {}; copy the whole directory again"):
            if name not in files:
                require((path / name).is_file(), f"{name} is missing")
                files[name] = StoredFile(path / name)
            require(files[name].size >= start + length, f"{name} is cut short")
        chunk = _exactly(str, described["fqn"]), str(tuple(_shape(described["offset"])))
        places[chunk] = files[name], start, length
    # Reading a file would else take many times as long as its size.
    taken = sorted((file.path.name, start, start + size) for file, start, size in places.values())
    for (name, _, end), (next_name, start, _) in itertools.pairwise(taken):
        require(name != next_name or end <= start, f"two parts share bytes of {name}")
    return places


def _state(value: Any, kind: str, wanted: type = Pairs) -> Any:
    """The state of a record of that kind; a dictionary by its names."""
    require(type(value) is Record and value.kind == kind, f"a {kind} is not what it should be")
    state = _exactly(wanted, value.state)
    fields = state.items if wanted is Pairs else state
    require(len(fields) <= _MOST_FIELDS, f"a {kind} has more fields than it should")
    return state.entries() if wanted is Pairs else state


def _shape(value: Any) -> torch.Size:
    require(
        type(value) is Record and value.kind == "Size" and len(value.arguments) == 1,
        "something has no shape",
    )
    sides = _exactly(tuple, value.arguments[0])
    require(is_shape(sides), "a shape has impossible sides")
    return torch.Size(sides)


def _exactly(wanted: type, value: object) -> Any:
    require(
        type(value) is wanted,
        f"a {wanted.__name__} is needed where there is a {kind_of(value)}",
    )
    return value

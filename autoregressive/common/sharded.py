"""Directories written by torch.distributed.checkpoint (FSDP's sharded state dict), read without a process group.

The library unpickles two things freely: the directory's `.metadata`, and entries that are no tensors. Here `.metadata`
becomes inert records: no name in it is resolved and nothing in it is called. Out of the records' checked numbers and
strings new metadata is made, of tensors alone; it is all that the library sees, and tensors it reads with
`weights_only=True`.
"""

import io
import math
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from autoregressive.common.weight_source import CheckpointError, WeightSource, named_in_refusal, select_flattened

METADATA_FILE = ".metadata"
_DAMAGED = "{}: is damaged or cut short; copy the whole directory again"

_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_BEFORE_TORCH_2_3 = "torch.distributed._shard.sharded_tensor.metadata"
_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
_KNOWN_NAMES = frozenset({
    *((_METADATA, name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    (_FILESYSTEM, "_StorageInfo"),
    (_BEFORE_TORCH_2_3, "TensorProperties"),
    (_BEFORE_TORCH_2_3, "MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    # Where the checkpoint was written. Python 3.13 moved the classes.
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    *(("torch", name) for name in ("Size", *_DTYPES)),
})  # fmt: skip

# All that Python writes for such metadata (protocols 4 and 5). No extension codes, no persistent ids, no other calls.
_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1,
    pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.TUPLE, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.STACK_GLOBAL,
)  # fmt: skip
_STANDARD: Mapping[int, Callable[[Any], None]] = pickle._Unpickler.dispatch


class _BadMetadataError(Exception):
    """Metadata whose fields contradict each other or point elsewhere; the message says which."""


@dataclass(frozen=True, eq=False)
class _Name:
    """A class, function or dtype that the pickle refers to; only its name."""

    name: str


@dataclass(eq=False)
class _Record:
    """What the pickle would have called and with what, and the state that it would have given to the outcome."""

    kind: str
    arguments: tuple[Any, ...]
    state: object = None


class _InertUnpickler(pickle._Unpickler):
    """Reads a pickle as data: strings, numbers, tuples, lists, dictionaries, names and records, all of exact types.

    Python's unpickler in C would call and alter what the pickle says; of the one in Python each opcode can be replaced.
    """

    stack: list[Any]

    def find_class(self, module: str, name: str) -> _Name:
        """The name itself, if it is one that describes checkpoints."""
        if (module, name) not in _KNOWN_NAMES:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _Name(name)

    def _load_call(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if type(called) is not _Name or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"it calls a {type(called).__name__}")
        self.stack.append({} if called.name == "OrderedDict" else _Record(called.name, arguments))

    def _load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not _Record or target.state is not None:
            raise pickle.UnpicklingError(f"it changes a {type(target).__name__}")
        target.state = state

    def _load_item(self) -> None:
        self._check_keys(self.stack[-2:-1])
        _STANDARD[pickle.SETITEM[0]](self)

    def _load_items(self) -> None:
        self._check_keys(self.stack[::2])
        _STANDARD[pickle.SETITEMS[0]](self)

    def _check_keys(self, keys: Sequence[object]) -> None:
        """Hashing a million tuples, each inside the other, would end the process without a word."""
        if not all(type(key) in (str, int, _Record) for key in keys):
            raise pickle.UnpicklingError("a dictionary has an odd key")

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it has an instruction that none needs")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **dict.fromkeys(range(256), _refuse),
        **{opcode[0]: _STANDARD[opcode[0]] for opcode in _OPCODES},
        **dict.fromkeys((pickle.REDUCE[0], pickle.NEWOBJ[0]), _load_call),
        pickle.BUILD[0]: _load_build,
        pickle.SETITEM[0]: _load_item,
        pickle.SETITEMS[0]: _load_items,
    }


class _CheckedReader(FileSystemReader):
    """The library's reader, handed metadata that has been checked instead of reading it itself."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._checked_metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checked metadata, whichever rank's the library asks for."""
        return self._checked_metadata


def open_sharded(path: Path, ema: bool) -> WeightSource:
    """The weights in such a directory; entries beside them (optimizer, steps) are left alone.

    Raises:
        CheckpointError: the metadata is damaged or hostile, a shard is missing or cut short, or `ema` is not there.
    """
    metadata = _checked_metadata(_read_pickle(path / METADATA_FILE), path)
    entries: dict[str, Any] = dict(metadata.state_dict_metadata)
    stored = select_flattened(entries, path, ema)
    reader = _CheckedReader(path, metadata)

    def read_into(name: str, target: Tensor) -> None:
        try:
            with warnings.catch_warnings():
                # A single process is what is meant; the library warns about it each time.
                warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
                dcp.load({stored[name]: target}, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # a BaseException, and no Exception
            (cause, _), *_ = error.failures.values()
            # torch's own words are kept back: they advise to load without care.
            if isinstance(cause, pickle.UnpicklingError) and (named := named_in_refusal(cause)):
                raise CheckpointError(
                    f"{path}: refused, a shard of {name} holds more than weights and could run code ({named}); "
                    "use a checkpoint that you trust to hold weights alone"
                ) from error
            raise CheckpointError(f"{path}: the shards of {name} are damaged; copy the whole directory again") from error

    return WeightSource(
        path=path,
        is_fsdp=True,
        shapes={name: entries[key].size for name, key in stored.items()},
        dtypes={name: entries[key].properties.dtype for name, key in stored.items()},
        read_into=read_into,
    )


def _read_pickle(file: Path) -> object:
    try:
        return _InertUnpickler(io.BytesIO(file.read_bytes())).load()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file}: refused, this is not what describes a checkpoint: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(_DAMAGED.format(file)) from error


def _checked_metadata(pickled: object, path: Path) -> Metadata:
    """New metadata of the tensors alone, out of numbers, strings and dtypes that have been checked one by one."""
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    try:
        fields = _state(pickled, "Metadata")
        places = _places(fields["storage_data"])
        for name, entry in _exactly(dict, fields["state_dict_metadata"]).items():
            if type(entry) is not _Record or entry.kind != "TensorStorageMetadata":
                continue
            tensors[_exactly(str, name)] = tensor = _tensor(name, entry)
            bytes_stored = 0
            for chunk in tensor.chunks:
                info = _storage_info(path, places.get((name, tuple(chunk.offsets))))
                storage[MetadataIndex(name, chunk.offsets)] = info
                bytes_stored += info.length
            bytes_needed = math.prod(tensor.size) * tensor.properties.dtype.itemsize
            _check(bytes_stored >= bytes_needed, f"{name} is stored only in part")
    except CheckpointError:
        raise
    except _BadMetadataError as error:
        raise CheckpointError(f"{path / METADATA_FILE}: refused: {error}") from error
    except Exception as error:  # what is missing or of another type can raise anything
        raise CheckpointError(_DAMAGED.format(path / METADATA_FILE)) from error
    return Metadata(tensors, planner_data={}, storage_data=storage, storage_meta=StorageMeta())


def _places(pickled: object) -> dict[tuple[str, tuple[int, ...]], object]:
    """Name and offsets of a chunk -> where it is stored, unchecked."""
    places = {}
    for index, place in _exactly(dict, pickled).items():
        fields = _state(index, "MetadataIndex")
        if fields.get("offset") is not None:  # as it is for what is no tensor
            places[_exactly(str, fields["fqn"]), tuple(_shape(fields["offset"]))] = place
    return places


def _tensor(name: str, entry: _Record) -> TensorStorageMetadata:
    fields = _state(entry, "TensorStorageMetadata")
    size = _shape(fields["size"])
    dtype, *_ = _state(fields["properties"], "TensorProperties", tuple)
    _check(type(dtype) is _Name and dtype.name in _DTYPES, f"{name} has no dtype")
    chunks = []
    for part in _exactly(list, fields["chunks"]):
        described = _state(part, "ChunkStorageMetadata")
        chunks.append(ChunkStorageMetadata(_shape(described["offsets"]), _shape(described["sizes"])))
    # An empty rank of an uneven split has a chunk without elements, and nothing stored for it.
    chunks = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    _check_chunks(name, size, chunks)
    return TensorStorageMetadata(TensorProperties(dtype=_DTYPES[dtype.name]), size, chunks)


def _check_chunks(name: str, size: torch.Size, chunks: Sequence[ChunkStorageMetadata]) -> None:
    """Inside, of the tensor's volume together, and nowhere over each other: then they cover all of it."""
    for chunk in chunks:
        ends = _ends(chunk)
        inside = all(end <= side for end, side in zip(ends, size, strict=True))
        _check(inside, f"a part of {name} lies outside of it")
    _check(sum(math.prod(chunk.sizes) for chunk in chunks) == math.prod(size), f"parts of {name} are missing or overlap")
    if len(chunks) < 2:
        return
    # Along the axis that is cut most, few parts reach beyond the start of the next: only those are compared with it.
    axis = max(range(len(size)), key=lambda axis: len({chunk.offsets[axis] for chunk in chunks}))
    reaching: list[ChunkStorageMetadata] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[axis]):
        reaching = [other for other in reaching if _ends(other)[axis] > chunk.offsets[axis]]
        _check(not any(_overlap(chunk, other) for other in reaching), f"parts of {name} overlap")
        reaching.append(chunk)


def _ends(chunk: ChunkStorageMetadata) -> list[int]:
    return [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    starts = zip(one.offsets, other.offsets, strict=True)
    ends = zip(_ends(one), _ends(other), strict=True)
    return all(max(start) < min(end) for start, end in zip(starts, ends, strict=True))


def _storage_info(path: Path, pickled: object) -> _StorageInfo:
    """Where a chunk is: in a file that is there, beside `.metadata`, and long enough."""
    fields = _state(pickled, "_StorageInfo")
    name, offset, length = fields["relative_path"], fields["offset"], fields["length"]
    plain = type(name) is str and name not in ("", ".", "..") and not set(name) & set("/\\\0")
    _check(plain, f"it refers to {name!r}, which is no file of this directory")
    _check(all(type(n) is int and n >= 0 for n in (offset, length)), f"it gives no place in {name}")
    _check(not fields.get("transform_descriptors"), "its shards are compressed, which is not supported")
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"{path}: the shard {name} is missing; copy the whole directory again")
    if file.stat().st_size < offset + length:
        raise CheckpointError(f"{path}: the shard {name} is cut short; copy the whole directory again")
    return _StorageInfo(name, offset, length)


def _state(value: object, kind: str, wanted: type = dict) -> Any:
    """The state of a record of that kind."""
    _check(type(value) is _Record and value.kind == kind, f"a {kind} is not what it should be")
    return _exactly(wanted, value.state)  # type: ignore[attr-defined]


def _shape(value: object) -> torch.Size:
    _check(type(value) is _Record and value.kind == "Size" and len(value.arguments) == 1, "something has no shape")
    sides = _exactly(tuple, value.arguments[0])  # type: ignore[attr-defined]
    _check(all(type(side) is int and 0 <= side < 2**63 for side in sides), "a shape has impossible sides")
    return torch.Size(sides)


def _exactly(wanted: type, value: object) -> Any:
    _check(type(value) is wanted, f"a {wanted.__name__} is needed where there is a {type(value).__name__}")
    return value


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise _BadMetadataError(what)

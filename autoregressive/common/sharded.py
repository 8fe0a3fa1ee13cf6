"""Directories written by torch.distributed.checkpoint (FSDP's sharded state dict), read without a process group.

The library unpickles two things freely: the directory's `.metadata`, and entries that are no tensors. Here `.metadata`
goes through an unpickler that knows a short list of classes and nothing else, what comes out is checked field by field,
and only tensors are ever asked for; those the library reads with `weights_only=True`.
"""

import pickle
import warnings
from collections import OrderedDict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from autoregressive.common.weight_source import CheckpointError, WeightSource, select_flattened

METADATA_FILE = ".metadata"
_DAMAGED = "{}: is damaged or cut short; copy the whole directory again"

_METADATA_CLASSES = (
    BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties,
    TensorStorageMetadata, _MEM_FORMAT_ENCODING,
)  # fmt: skip
_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch.distributed.checkpoint.metadata", cls.__name__): cls for cls in _METADATA_CLASSES},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    # Before torch 2.3 these two lived elsewhere.
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): TensorProperties,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): _MEM_FORMAT_ENCODING,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    # Where the checkpoint was written: never used. Python 3.13 moved the classes; pure ones touch no file.
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
    **{(module, "WindowsPath"): PureWindowsPath for module in ("pathlib", "pathlib._local")},
    **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
}


class _BadMetadataError(Exception):
    """Metadata whose fields contradict each other or point elsewhere; the message says which."""


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes that describe a checkpoint and refuses every other name."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}") from None


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
    metadata = _tensors_only(_read_metadata(path / METADATA_FILE), path)
    stored = select_flattened(metadata.state_dict_metadata, path, ema)
    reader = _CheckedReader(path, metadata)
    entries: dict[str, TensorStorageMetadata] = {
        name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }

    def read_into(name: str, target: Tensor) -> None:
        try:
            with warnings.catch_warnings():
                # A single process is what is meant; the library warns about it each time.
                warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
                dcp.load({stored[name]: target}, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # a BaseException, and no Exception
            (cause, _), *_ = error.failures.values()
            reason = str(cause).strip().partition("\n")[0]
            raise CheckpointError(f"{path}: the shards of {name} are damaged ({reason})") from error

    return WeightSource(
        path=path,
        is_fsdp=True,
        shapes={name: entries[key].size for name, key in stored.items()},
        dtypes={name: entries[key].properties.dtype for name, key in stored.items()},
        read_into=read_into,
    )


def _read_metadata(file: Path) -> Metadata:
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file}: refused, this is not what describes a checkpoint: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(_DAMAGED.format(file)) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file}: refused, this is not what describes a checkpoint")
    return metadata


def _tensors_only(metadata: Metadata, path: Path) -> Metadata:
    """The part of the metadata that describes tensors, with every field checked: a pickle can put anything anywhere."""
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    try:
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            _check(isinstance(name, str) and _is_shape(entry.size), "a tensor without name or shape")
            _check(isinstance(entry.properties.dtype, torch.dtype), f"{name} has no dtype")
            # An empty rank of an uneven split has a chunk without elements, and nothing stored for it.
            chunks = [chunk for chunk in entry.chunks if not _is_shape(chunk.sizes) or chunk.sizes.numel()]
            infos = {
                MetadataIndex(name, chunk.offsets): metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                for chunk in chunks
            }
            _check_chunks(name, entry, chunks)
            bytes_stored = sum(_stored_bytes(path, info) for info in infos.values())
            _check(
                bytes_stored >= entry.size.numel() * entry.properties.dtype.itemsize, f"{name} is stored only in part"
            )
            tensors[name] = TensorStorageMetadata(entry.properties, entry.size, chunks)
            storage.update(infos)
    except CheckpointError:
        raise
    except _BadMetadataError as error:
        raise CheckpointError(f"{path / METADATA_FILE}: refused: {error}") from error
    except Exception as error:  # a field of another type can raise anything
        raise CheckpointError(_DAMAGED.format(path / METADATA_FILE)) from error
    return Metadata(tensors, planner_data={}, storage_data=storage, storage_meta=StorageMeta())


def _check_chunks(name: str, entry: TensorStorageMetadata, chunks: list[ChunkStorageMetadata]) -> None:
    for chunk in chunks:
        ends = [offset + size for offset, size in zip(tuple(chunk.offsets), tuple(chunk.sizes), strict=True)]
        inside = all(end <= side for end, side in zip(ends, tuple(entry.size), strict=True))
        _check(_is_shape(chunk.offsets) and _is_shape(chunk.sizes) and inside, f"a part of {name} lies outside of it")
    _check(len({chunk.offsets for chunk in chunks}) == len(chunks), f"parts of {name} overlap")
    _check(sum(chunk.sizes.numel() for chunk in chunks) == entry.size.numel(), f"parts of {name} are missing")


def _stored_bytes(path: Path, info: Any) -> int:
    """Length of a chunk in its file, which is there, beside `.metadata`, and long enough."""
    _check(isinstance(info, _StorageInfo), "no place is given for a part")
    name, offset, length = info.relative_path, info.offset, info.length
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
    _check(plain, f"it refers to {name!r}, which is no file of this directory")
    _check(all(isinstance(n, int) and n >= 0 for n in (offset, length)), f"it gives no place in {name}")
    _check(not info.transform_descriptors, "its shards are compressed, which is not supported")
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"{path}: the shard {name} is missing; copy the whole directory again")
    if file.stat().st_size < offset + length:
        raise CheckpointError(f"{path}: the shard {name} is cut short; copy the whole directory again")
    return length


def _is_shape(value: object) -> bool:
    return isinstance(value, torch.Size) and min(value, default=0) >= 0


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise _BadMetadataError(what)

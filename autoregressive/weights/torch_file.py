"""Reads what `torch.save` wrote, the zip archives of today and the streams of before torch 1.6,
without unpickling it.

`torch.load` would build whatever the pickle says, and hash its keys, before anything can be
checked. Here the pickle becomes inert records, and tensors become places in the file.
"""

import argparse
import functools
import io
import struct
import sys
import zipfile
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._weights_only_unpickler import _get_allowed_globals
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from autoregressive.weights.inert_pickle import (
    MOST_INSTRUCTIONS,
    InertUnpickler,
    Name,
    OddKey,
    Pairs,
    PickleRefused,
    Record,
    UnknownName,
    kind_of,
)
from autoregressive.weights.stored_tensor import (
    StoredFile,
    StoredTensor,
    contiguous_stride,
    is_shape,
    reach,
)
from autoregressive.weights.weight_source import DAMAGED, CheckpointError

MOST_PICKLE_BYTES = 16 * 2**20
_LOCAL_HEADER_BYTES = 30
# A pickle can give one record to thousands of names. What is done with a record is therefore
# bounded.
_MOST_WRAPPERS = 3  # of a tensor: torch.save writes at most two
_MOST_ARGUMENTS = 16  # of a call that builds a tensor
_LONGEST_KEY = 100  # of a storage
_OTHER_BYTE_ORDER = (
    "was written on a machine of the other byte order; load and save it there as .safetensors"
)

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
# torch converts these to any floating-point dtype. It has no code for the others: parts of bytes,
# and quantized numbers.
READABLE_DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e4m3fnuz, torch.float8_e5m2,
    torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32,
    torch.uint16, torch.uint8, torch.bool, torch.complex128, torch.complex64, torch.complex32,
})  # fmt: skip
DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}


@dataclass(frozen=True)
class ArchiveLimits:
    """How much of an archive is read to find its tensors."""

    pickle_bytes: int = MOST_PICKLE_BYTES
    instructions: int = MOST_INSTRUCTIONS
    directory_bytes: int = 4 * 2**20  # some 50,000 tensors


WHOLE_FILE = ArchiveLimits()


@dataclass(frozen=True)
class TorchFile:
    """What was saved, inert, and where its tensors' numbers are."""

    file: StoredFile
    content: Any
    # key of a storage -> its offset in the file and its size, bytes
    _places: dict[str, tuple[int, int]] = field(repr=False)

    def tensor(self, value: object) -> StoredTensor | None:
        """The tensor that a value of the content stands for; None if it is no plain tensor (sparse,
        nested, of 4 bits, none).

        Raises:
            CheckpointError: it lies outside of what is stored.
        """
        rebuilt = _plain_rebuild(value)
        if rebuilt is None:
            return None
        storage, offset, shape, stride, *rest = rebuilt.arguments
        if not (
            is_shape(shape)
            and is_shape(stride)
            and is_shape([offset])
            and len(shape) == len(stride)
        ):
            return None
        typed = _storage_of(storage.arguments) if kind_of(storage) == "storage" else None
        if typed is None:
            return None
        dtype, key, view_offset = typed
        if rebuilt.kind == "_rebuild_tensor_v3":  # has its dtype, and a storage without one
            named = rest[2] if len(rest) > 2 else None
            if type(named) is not Name or named.name not in DTYPES:
                return None
            dtype, rest = DTYPES[named.name], [*rest[:2], *rest[3:]]
        if dtype not in READABLE_DTYPES:
            return None
        if len(rest) > 2 and rest[2]:  # conjugated, negated or otherwise marked
            return None
        if key not in self._places:
            raise CheckpointError(self.file.path, DAMAGED)
        start, size = self._places[key]
        first = (view_offset + offset) * dtype.itemsize
        # An empty tensor may begin anywhere, as an empty part of a view does.
        if 0 not in shape and first + reach(shape, stride) * dtype.itemsize > size:
            raise CheckpointError(
                self.file.path,
                "is damaged: a tensor lies outside of what is stored; download or copy it again",
            )
        contiguous = tuple(stride) == contiguous_stride(shape) or 0 in shape
        return StoredTensor(
            self.file,
            start + first,
            dtype,
            torch.Size(shape),
            None if contiguous else tuple(stride),
        )


def _plain_rebuild(value: object) -> Record | None:
    """The call that builds the tensor alone, without what makes it a parameter or gives it
    attributes.
    """
    for _ in range(_MOST_WRAPPERS + 1):
        if type(value) is not Record or len(value.arguments) > _MOST_ARGUMENTS:
            return None
        arguments = value.arguments
        match value.kind:
            case "_rebuild_parameter" | "_rebuild_parameter_with_state" | "Parameter" if arguments:
                value = arguments[0]
            case "_rebuild_from_type_v2" if len(arguments) == 4 and all(
                type(one) is Name for one in arguments[:2]
            ):
                if (
                    arguments[1].name not in ("Tensor", "Parameter")
                    or type(arguments[2]) is not tuple
                ):
                    return None
                value = Record(arguments[0].name, arguments[2])
            case "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3" if (
                len(arguments) >= 4
            ):
                return value
            case _:
                return None
    return None


def _storage_of(storage: tuple[Any, ...]) -> tuple[torch.dtype, str, int] | None:
    """dtype, key and first element of a storage, or of a view of one; None if it is of no plain
    kind.
    """
    if len(storage) not in (5, 6):
        return None
    _, kind, key, _, _, *view = storage
    offset = 0
    if view and view[0] is not None:
        if not (type(view[0]) is tuple and len(view[0]) == 3 and is_shape([view[0][1]])):
            return None
        offset = view[0][1]
    if type(kind) is not Name or kind.name not in _STORAGE_DTYPES:
        return None
    return (_STORAGE_DTYPES[kind.name], _key(key), offset)


def _key(key: object) -> str:
    if isinstance(key, bytes):
        if len(key) > _LONGEST_KEY:
            return ""
        return key.decode("ascii", "replace")
    return key if type(key) is str else repr(key) if type(key) is int else ""


def read_torch_archive(
    file: StoredFile, start: int = 0, size: int | None = None, limits: ArchiveLimits = WHOLE_FILE
) -> TorchFile:
    """Opens a zip archive that `torch.save` wrote.

    Args:
        start, size: where it lies in the file; all of it by default.
        limits: more is refused.

    Raises:
        CheckpointError: it is damaged, or holds what could run code.
    """
    section = _Section(
        file, start, file.size - start if size is None else size, limits.directory_bytes
    )
    try:
        # Member -> its header's offset. The library checks the directory; members are read here,
        # where they lie.
        members = {member.filename: member for member in zipfile.ZipFile(section).infolist()}
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise CheckpointError(file.path, DAMAGED) from error
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(file.path, DAMAGED)
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in members:
        raise CheckpointError(
            file.path, "is a TorchScript program, which is code; a file of weights is needed"
        )
    places: dict[str, tuple[int, int]] = {}
    storages = f"{folder}data/"
    for name, member in members.items():
        if name.startswith(storages) or name in (pickles[0], f"{folder}byteorder"):
            if (
                member.compress_type != zipfile.ZIP_STORED
                or member.file_size != member.compress_size
                or member.flag_bits & 1
            ):
                raise CheckpointError(
                    file.path,
                    "has compressed or encrypted parts, which torch.save never writes; save it "
                    "anew",
                )
            places[name] = section.place_of(member)
    byte_order = file.read(*_short(places.get(f"{folder}byteorder"))).decode("ascii", "replace")
    if byte_order not in ("", sys.byteorder):
        raise CheckpointError(file.path, _OTHER_BYTE_ORDER)
    offset, pickled_bytes = places[pickles[0]]
    unpickler = _unpickler(file, offset, pickled_bytes, limits)
    content = _load(file, unpickler)
    return TorchFile(
        file, content, {name.removeprefix(storages): place for name, place in places.items()}
    )


def _short(place: tuple[int, int] | None) -> tuple[int, int]:
    """The first eight bytes of a place, or no bytes without a place."""
    return (place[0], min(place[1], 8)) if place is not None else (0, 0)


class _Section(io.RawIOBase):
    """A part of a file as the library for zip archives wants it. It reads no more at a time than a
    directory takes.
    """

    def __init__(self, file: StoredFile, start: int, size: int, most_bytes: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0
        self._most_bytes = most_bytes

    def seekable(self) -> bool:
        """Whether the stream can be moved in: it always can."""
        return True

    def tell(self) -> int:
        """The position in the section, bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a position in the section."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("negative position")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Reads up to `size` bytes, or the rest.

        Raises:
            CheckpointError: that is more than a directory takes.
        """
        left = max(0, self._size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        if size > self._most_bytes:
            told = f"is damaged, or has a directory of more than {self._most_bytes:,} bytes"
            raise CheckpointError(self._file.path, f"{told}; download or copy it again")
        content = self._file.read(self._start + self._position, size)
        self._position += size
        return content

    def place_of(self, member: zipfile.ZipInfo) -> tuple[int, int]:
        """Where in the file its content lies, and how many bytes it has."""
        at = self._start + member.header_offset
        header = self._file.read(at, _LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:])
        offset = at + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        if header[:4] != b"PK\x03\x04" or offset + member.file_size > self._start + self._size:
            raise CheckpointError(self._file.path, DAMAGED)
        return offset, member.file_size


def read_torch_stream(file: StoredFile) -> TorchFile:
    """Opens a file of before torch 1.6: five pickles, then storage after storage.

    Raises:
        CheckpointError: it is damaged, or holds what could run code.
    """
    unpickler = _unpickler(file, 0, min(file.size, MOST_PICKLE_BYTES))
    for wanted in (MAGIC_NUMBER, PROTOCOL_VERSION):
        found = _load(file, unpickler)
        if type(found) is not int or found != wanted:
            raise CheckpointError(file.path, "is damaged or not a checkpoint; download it again")
    system = _load(file, unpickler)
    little = isinstance(system, Pairs) and system.entries().get("little_endian", True)
    if little is not (sys.byteorder == "little"):
        raise CheckpointError(file.path, _OTHER_BYTE_ORDER)
    content = _load(file, unpickler)
    sizes: dict[str, int] = {}
    for storage in unpickler.storage_ids:
        typed = _storage_of(storage)
        kind = storage[1] if len(storage) > 2 else None
        if typed is not None:
            sizes[typed[1]] = typed[0].itemsize
        elif type(kind) is Name and kind.name in ("QInt8Storage", "QUInt8Storage", "QInt32Storage"):
            sizes[_key(storage[2])] = 4 if kind.name == "QInt32Storage" else 1
    keys = _load(file, unpickler)
    places: dict[str, tuple[int, int]] = {}
    position = unpickler.position
    for key in map(_key, keys if type(keys) is list else [None]):
        if key not in sizes or key in places:
            raise CheckpointError(file.path, DAMAGED)
        elements = int.from_bytes(file.read(position, 8), "little", signed=True)
        position += 8
        places[key] = (position, elements * sizes[key])
        if elements < 0 or sum(places[key]) > file.size:
            raise CheckpointError(file.path, DAMAGED)
        position += elements * sizes[key]
    return TorchFile(file, content, places)


@functools.cache
def _known_names() -> frozenset[str]:
    """What `torch.load(weights_only=True)` takes, and the arguments that training saves."""
    return frozenset(
        {
            *_get_allowed_globals(),
            f"{argparse.Namespace.__module__}.{argparse.Namespace.__qualname__}",
        }
    )


def _unpickler(
    file: StoredFile, offset: int, size: int, limits: ArchiveLimits = WHOLE_FILE
) -> InertUnpickler:
    if size > limits.pickle_bytes:
        raise CheckpointError(
            file.path,
            f"describes its content in {size:,} bytes, which is too much; use another file",
        )
    return InertUnpickler(
        file.read(offset, size),
        _known_names(),
        storages=True,
        most_instructions=limits.instructions,
    )


def _load(file: StoredFile, unpickler: InertUnpickler) -> Any:
    """Reads the next pickle."""
    try:
        return unpickler.load()
    except UnknownName as error:
        raise CheckpointError(
            file.path,
            f"refused, it holds more than weights and could run code ({error.name}); "
            "use a file that you trust to hold weights alone",
        ) from error
    except OddKey as error:
        raise CheckpointError(
            file.path, "has a key that no checkpoint needs; save the weights alone"
        ) from error
    except PickleRefused as error:
        raise CheckpointError(
            file.path, f"is damaged or not a checkpoint ({error}); download it again"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(file.path, DAMAGED) from error

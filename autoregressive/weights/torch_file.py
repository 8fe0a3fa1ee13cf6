"""Reads what `torch.save` wrote, the zip archives of today and the streams of before torch 1.6,
without unpickling it.

`torch.load` would build whatever the pickle says, and hash its keys, before anything can be
checked. Here the pickle becomes inert records, and tensors become places in the file.
"""

import functools
import io
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch._weights_only_unpickler import _get_allowed_globals
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from autoregressive.weights.inert_pickle import (
    MOST_INSTRUCTIONS,
    Name,
    Pairs,
    Record,
    UnknownName,
    read_pickle,
)
from autoregressive.weights.stored_tensor import (
    DAMAGED,
    BadContentError,
    StoredFile,
    StoredTensor,
    contiguous_stride,
    is_shape,
    reach,
    reading,
    require,
)

_MOST_PICKLE_BYTES = 16 * 2**20
_MOST_DIRECTORY_BYTES = 4 * 2**20  # some 50,000 tensors
_LOCAL_HEADER_BYTES = 30
_MOST_OTHER_ARGUMENTS = 4  # of a call that builds a tensor, behind the stride
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
    "UntypedStorage": torch.uint8, "QInt8Storage": torch.qint8, "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
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


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor as a pickle describes it. What it says is possible; whether it is stored is not
    known yet.
    """

    dtype: torch.dtype
    key: str  # of its storage
    offset: int  # of its first element in the storage, elements
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class TorchFile:
    """What was saved, inert, and where its tensors' numbers are."""

    file: StoredFile
    content: Any  # plain tensors are `SavedTensor`; sparse and quantized ones are records
    # key of a storage -> its offset in the file and its size, bytes
    _places: dict[str, tuple[int, int]] = field(repr=False)

    def find(self, saved: SavedTensor) -> StoredTensor:
        """Where a tensor of the content is.

        Raises:
            BadContentError: it lies outside of what is stored.
        """
        require(saved.key in self._places, DAMAGED)
        start, size = self._places[saved.key]
        first = saved.offset * saved.dtype.itemsize
        # An empty tensor may begin anywhere, as an empty part of a view does.
        end = first + reach(saved.shape, saved.stride) * saved.dtype.itemsize
        require(
            0 in saved.shape or end <= size,
            "is damaged: a tensor lies outside of what is stored; download or copy it again",
        )
        contiguous = saved.stride == contiguous_stride(saved.shape) or 0 in saved.shape
        return StoredTensor(
            self.file,
            start + first,
            saved.dtype,
            saved.shape,
            stride=None if contiguous else saved.stride,
        )


# --- what a pickle's calls build instead ---


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    key: str
    offset: int  # of its first element, where it is a view of another storage


def _storage(described: tuple[Any, ...]) -> _Storage | None:
    """A storage, or a view of one; None if it is of no plain kind."""
    if len(described) not in (5, 6):
        return None
    _, kind, key, _, _, *view = described
    offset = 0
    if view and view[0] is not None:
        if not (type(view[0]) is tuple and len(view[0]) == 3 and is_shape([view[0][1]])):
            return None
        offset = view[0][1]
    if type(kind) is not Name or kind.name not in _STORAGE_DTYPES:
        return None
    return _Storage(_STORAGE_DTYPES[kind.name], _key(key), offset)


def _key(key: object) -> str:
    if isinstance(key, bytes):
        return key[: _LONGEST_KEY + 1].decode("ascii", "replace")
    return key if type(key) is str else repr(key) if type(key) is int else ""


def _tensor(
    storage: object, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: Any = None
) -> SavedTensor | Record:
    """What `_rebuild_tensor` and `_rebuild_tensor_v2` are given; a record if it is no plain tensor
    (of a dtype that torch cannot convert; conjugated, negated or otherwise marked).
    """
    sizes = is_shape(shape) and is_shape(stride) and is_shape([offset])
    if type(storage) is not _Storage or not sizes or len(shape) != len(stride):
        return Record("tensor")
    dtype, marks = dtype or storage.dtype, rest[2:3]
    if dtype not in READABLE_DTYPES or any(marks) or len(rest) > _MOST_OTHER_ARGUMENTS:
        return Record("tensor")
    return SavedTensor(
        dtype, storage.key, storage.offset + offset, torch.Size(shape), tuple(stride)
    )


def _tensor_v3(*arguments: Any) -> SavedTensor | Record:
    """The same with its dtype behind six others, and a storage without one."""
    named = arguments[6]
    if type(named) is not Name or named.name not in DTYPES:
        return Record("tensor")
    return _tensor(*arguments[:6], *arguments[7:], dtype=DTYPES[named.name])


def _of_type(rebuild: object, kind: object, arguments: object, state: object) -> object:
    """A tensor to which attributes are given."""
    plain = type(kind) is Name and kind.name in ("Tensor", "Parameter")
    if not plain or type(rebuild) is not Name or type(arguments) is not tuple:
        return Record("tensor")
    return rebuild.call(arguments)


def _parameter(tensor: object, *rest: object) -> object:
    return tensor


_BUILDERS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
}


@functools.cache
def _known_names() -> frozenset[str]:
    """What `torch.load(weights_only=True)` takes, and the arguments that training saves."""
    return frozenset({*_get_allowed_globals(), "argparse.Namespace"})


def _load(
    stream: BinaryIO,
    storage: Callable[[tuple[Any, ...]], object] = _storage,
    instructions: int = MOST_INSTRUCTIONS,
) -> Any:
    """Reads the next pickle."""
    try:
        return read_pickle(
            stream,
            _known_names(),
            builders=_BUILDERS,
            storage=storage,
            most_instructions=instructions,
        )
    except UnknownName as error:
        raise BadContentError(
            f"refused, it holds more than weights and could run code ({error.name}); "
            "use a file that you trust to hold weights alone"
        ) from error
    except BadContentError as error:
        raise BadContentError(
            f"is damaged or not a checkpoint ({error}); download it again"
        ) from error


# --- archives ---


def read_torch_archive(
    file: StoredFile,
    start: int = 0,
    size: int | None = None,
    *,
    pickle_bytes: int = _MOST_PICKLE_BYTES,
    instructions: int = MOST_INSTRUCTIONS,
    directory_bytes: int = _MOST_DIRECTORY_BYTES,
) -> TorchFile:
    """Opens a zip archive that `torch.save` wrote.

    Args:
        start, size: where it lies in the file; all of it by default.
        pickle_bytes, instructions, directory_bytes: how much is read to find its tensors; more is
            refused.

    Raises:
        CheckpointError: it is damaged, or holds what could run code.
    """
    with reading(file.path):
        section = _Section(
            file, start, file.size - start if size is None else size, directory_bytes
        )
        # Member -> its header's offset. The library checks the directory; members are read here,
        # where they lie.
        members = {member.filename: member for member in zipfile.ZipFile(section).infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        require(len(pickles) == 1, DAMAGED)
        folder = pickles[0].removesuffix("data.pkl")
        require(
            f"{folder}constants.pkl" not in members,
            "is a TorchScript program, which is code; a file of weights is needed",
        )
        storages, order = f"{folder}data/", f"{folder}byteorder"
        places = {
            name: section.place_of(member)
            for name, member in members.items()
            if name.startswith(storages) or name in (pickles[0], order)
        }
        offset, order_bytes = places.get(order, (0, 0))
        byte_order = file.read(offset, min(order_bytes, 8)).decode("ascii", "replace")
        require(byte_order in ("", sys.byteorder), _OTHER_BYTE_ORDER)
        offset, pickled_bytes = places[pickles[0]]
        require(
            pickled_bytes <= pickle_bytes,
            f"describes its content in {pickled_bytes:,} bytes, which is too much; use another "
            "file",
        )
        content = _load(io.BytesIO(file.read(offset, pickled_bytes)), instructions=instructions)
    return TorchFile(
        file,
        content,
        {name.removeprefix(storages): place for name, place in places.items()},
    )


class _Section:
    """A part of a file as the library for zip archives wants it. It reads no more at a time than a
    directory takes.
    """

    def __init__(self, file: StoredFile, start: int, size: int, most_bytes: int) -> None:
        self._file, self._start, self._size, self._most_bytes = file, start, size, most_bytes
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        self._position = bases[whence] + offset
        require(self._position >= 0, DAMAGED)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Reads up to `size` bytes, or the rest.

        Raises:
            BadContentError: that is more than a directory takes.
        """
        left = max(0, self._size - self._position)
        size = left if size < 0 else min(size, left)
        require(
            size <= self._most_bytes,
            f"is damaged, or has a directory of more than {self._most_bytes:,} bytes; download or "
            "copy it again",
        )
        content = self._file.read(self._start + self._position, size)
        self._position += size
        return content

    def place_of(self, member: zipfile.ZipInfo) -> tuple[int, int]:
        """Where in the file its content lies, and how many bytes it has."""
        require(
            member.compress_type == zipfile.ZIP_STORED
            and not member.flag_bits & 1
            and member.file_size == member.compress_size,
            "has compressed or encrypted parts, which torch.save never writes; save it anew",
        )
        at = self._start + member.header_offset
        header = self._file.read(at, _LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:])
        offset = at + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        require(
            header[:4] == b"PK\x03\x04" and offset + member.file_size <= self._start + self._size,
            DAMAGED,
        )
        return offset, member.file_size


# --- streams ---


def read_torch_stream(file: StoredFile) -> TorchFile:
    """Opens a file of before torch 1.6: five pickles, then storage after storage.

    Raises:
        CheckpointError: it is damaged, or holds what could run code.
    """
    sizes: dict[str, int] = {}  # key of a storage -> bytes of an element

    def storage(described: tuple[Any, ...]) -> _Storage | None:
        found = _storage(described)
        if found is not None:
            sizes[found.key] = found.dtype.itemsize
        return found

    with reading(file.path):
        stream = io.BytesIO(file.read(0, min(file.size, _MOST_PICKLE_BYTES)))
        for wanted in (MAGIC_NUMBER, PROTOCOL_VERSION):
            found = _load(stream)
            require(
                type(found) is int and found == wanted,
                "is damaged or not a checkpoint; download it again",
            )
        system = _load(stream)
        little = isinstance(system, Pairs) and system.entries().get("little_endian", True)
        require(little is (sys.byteorder == "little"), _OTHER_BYTE_ORDER)
        content = _load(stream, storage)
        keys = _load(stream)
        places: dict[str, tuple[int, int]] = {}
        position = stream.tell()
        for key in map(_key, keys):
            require(key not in places, DAMAGED)
            elements = int.from_bytes(file.read(position, 8), "little", signed=True)
            size = elements * sizes[key]
            places[key] = (position + 8, size)
            position += 8 + size
            require(elements >= 0 and position <= file.size, DAMAGED)
    return TorchFile(file, content, places)

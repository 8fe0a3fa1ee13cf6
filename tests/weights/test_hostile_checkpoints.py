"""Checkpoints made to hang, to crash, to fill memory or to flood a terminal: each ends in one short
line, soon, with status 2.

Each file is loaded in a process of its own, which measures its memory and has a limit of time, as
its worst is to kill the process.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_checkpoint import CPU, assert_loads, drawn_weights, error_of, on_meta, tiny_gpt
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from autoregressive.weights import stored_tensor
from autoregressive.weights.checkpoint import (
    CheckpointError,
    WeightSource,
    load_weights,
    open_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]
SECONDS, EXTRA_BYTES = 10, 256 * 2**20
# Opens and reads the checkpoint as conversion does, with nothing of the model to stop it earlier.
PROGRAM = """
import resource, sys, time
from pathlib import Path
import torch
from autoregressive.weights.checkpoint import open_checkpoint
from autoregressive.cli.command import run_command

def peak():
    lines = open("/proc/self/status")
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

def read():
    source = open_checkpoint(Path(sys.argv[1]))
    for name, shape in source.shapes.items():
        source.read_into(name, torch.empty(shape, dtype=source.dtypes[name]))

before, start = peak(), time.process_time()
try:
    run_command(read)
finally:
    print(peak() - before, time.process_time() - start)
"""

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def measured(path: Path) -> tuple[int, str]:
    """The exit status and what was written on stderr, of a process that kept within the bounds."""
    size = (
        sum(file.stat().st_size for file in path.iterdir())
        if path.is_dir()
        else path.stat().st_size
    )
    command = [sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout, f"ended by itself: status {done.returncode}, {done.stderr[-500:]}"
    peak_bytes, seconds = done.stdout.split()
    assert int(peak_bytes) <= size + EXTRA_BYTES
    assert float(seconds) <= SECONDS
    return done.returncode, done.stderr


def assert_refused(path: Path) -> str:
    status, told = measured(path)
    assert status == 2, told
    assert told.count("\n") == 1, told
    assert len(told) <= 500 + len(str(path)) + 20
    assert str(path) in told
    return told


# --- pickles ---


def torch_zip(
    path: Path,
    pickled: bytes,
    storages: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """An archive as `torch.save` writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", sys.byteorder)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def nested(levels: int) -> object:
    """A tuple of the same two tuples, of the same two tuples: its hash visits 2 ** levels of them,
    and so does its repr.
    """
    value: object = ()
    for _ in range(levels):
        value = (value, value)
    return value


def with_key(key: object) -> bytes:
    """{key: None}, as a pickle. As a dictionary it would have to be hashed here."""
    return b"\x80\x02}" + pickle.dumps(key, protocol=2)[2:-1] + b"Ns."


def deep_key(levels: int) -> bytes:
    """{((((...)))): None}, as a pickle."""
    return b"\x80\x02}(" + b")" + b"\x85" * levels + b"Nu."


def in_weights(pickled: bytes) -> bytes:
    """{"model": ...} around another pickle."""
    return b"\x80\x02}X\x05\x00\x00\x00model" + pickled[2:-1] + b"s."


def legacy(pickled: bytes) -> bytes:
    """The stream of before torch 1.6 around a pickle of the content."""
    whole = io.BytesIO()
    torch.save({}, whole, _use_new_zipfile_serialization=False)
    start = whole.getvalue()
    content = pickle.dumps({}, protocol=2)
    place = start.rindex(content)
    return start[:place] + pickled + start[place + len(content) :]


def one_tuple_for_many(called: bytes, call: bytes) -> bytes:
    """20,000 calls with one tuple of 20,000 values. To copy it for each call takes 3 GB."""
    return (
        b"\x80\x02" + called + b"q\x00(" + b"N" * 20_000 + b"tq\x01"
        + (b"h\x00h\x01" + call) * 20_000 + b"."
    )  # fmt: skip


HOSTILE_PICKLES: dict[str, Callable[[], bytes]] = {
    "key of 60 levels": lambda: with_key(nested(60)),
    "key of 26 levels": lambda: with_key(nested(26)),
    "key of 3,000 levels": lambda: deep_key(3000),
    "key of 3,000,000 levels": lambda: deep_key(3_000_000),
    "value of 900,000 levels": lambda: (
        b"\x80\x02}X\x06\x00\x00\x00weight)" + b"\x85" * 900_000 + b"s."
    ),
    "records of 200,000 levels": lambda: (
        b"\x80\x02ctorch\nSize\nq\x00}X\x01\x00\x00\x00a)"
        + b"q\x01h\x00h\x01\x85R" * 200_000
        + b"s."
    ),
    "name of a megabyte": lambda: pickle.dumps({"n" * 2**20: 1}, protocol=2),
    "prefixes without end": lambda: in_weights(pickle.dumps({"module." * 200_000: 1}, protocol=2)),
    "a million dictionaries": lambda: b"\x80\x02" + b"}" * 1_000_000 + b".",
    "marks without end": lambda: b"\x80\x02" + b"(" * 5_000_000 + b".",
    "a text longer than the file": lambda: b"\x80\x02X\xff\xff\xff\xff.",
    "a set of itself": lambda: b"\x80\x02]q\x00h\x00a.",
    "set of nested tuples": lambda: (
        b"\x80\x02c__builtin__\nset\n]" + pickle.dumps(nested(60), protocol=2)[2:-1] + b"a\x85R."
    ),
    "one long tuple for 20,000 records": lambda: one_tuple_for_many(b"ctorch\nSize\n", b"R"),
    "one long tuple for 20,000 objects": lambda: one_tuple_for_many(b"ctorch\nSize\n", b"\x81"),
    "one long tuple for 20,000 tensors": lambda: one_tuple_for_many(
        b"ctorch._utils\n_rebuild_tensor_v2\n", b"R"
    ),
    "nothing at all": lambda: b"",
    "only a protocol": lambda: b"\x80\x02.",
}


@pytest.mark.parametrize("container", ["zip", "zip, in weights", "legacy", "metadata"])
@pytest.mark.parametrize("kind", HOSTILE_PICKLES)
def test_hostile_pickles_are_one_line(tmp_path: Path, container: str, kind: str) -> None:
    """Fails if a pickle hangs, recurses or fills memory, wherever a checkpoint has one."""
    pickled, path = HOSTILE_PICKLES[kind](), tmp_path / "weights.pt"
    if container.startswith("zip"):
        torch_zip(path, in_weights(pickled) if container != "zip" and len(pickled) > 5 else pickled)
    elif container == "legacy":
        path.write_bytes(legacy(pickled))
    else:
        path = tmp_path / "sharded"
        path.mkdir()
        (path / ".metadata").write_bytes(pickled)
    error = error_in_time(path)
    assert len(error) <= max(500, 200 + len(str(path)))


def error_in_time(path: Path) -> str:
    """As in a process of its own, but sooner: for what the fixed code cannot be killed by."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.timing
@pytest.mark.parametrize(
    "kind",
    [
        "key of 60 levels",
        "key of 26 levels",
        "key of 3,000,000 levels",
        "a million dictionaries",
        "one long tuple for 20,000 records",
        "one long tuple for 20,000 objects",
    ],
)
def test_the_worst_pickles_keep_within_time_and_memory(tmp_path: Path, kind: str) -> None:
    """Fails if one takes more than 10 s or the file's size and 256 MiB, or kills the process that
    reads it.
    """
    assert_refused(torch_zip(tmp_path / "weights.pt", HOSTILE_PICKLES[kind]()))


# --- small files that are much work ---


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def shared_tensor(dimensions: int, wrappers: int, more_arguments: int = 0) -> bytes:
    """A tensor of one element as pickle instructions, wrapped as a parameter so many times; it
    becomes memo 2.
    """
    sides = b"(" + b"K\x01" * dimensions + b"t"
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQ"
    )
    arguments = storage + b"K\x00" + sides + sides + b"\x89N" + b"N" * more_arguments
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
    wrapper = b"ctorch._utils\n_rebuild_parameter\n"
    return wrapper * wrappers + tensor + b"\x85R" * wrappers + b"q\x02"


def shared_by_names(path: Path, tensor: bytes, count: int) -> Path:
    """A file that has the same record under so many names."""
    names = b"".join(text(f"{number:05x}") + b"h\x02" for number in range(count))
    pickled = b"\x80\x02}" + text("first") + tensor + b"s(" + names + b"u."
    return torch_zip(path / "weights.pt", pickled, {"0": bytes(4)})


def sharded_directory(
    path: Path,
    chunks: dict[str, list[ChunkStorageMetadata]],
    places: dict[MetadataIndex, _StorageInfo],
    size: int,
    piece: bytes = bytes(16),
) -> Path:
    """A directory whose tensors have one dimension; its only shard is `piece`."""
    (path / "shard.distcp").write_bytes(piece)
    properties = TensorProperties(dtype=torch.float32)
    entries = {
        name: TensorStorageMetadata(properties, torch.Size([size]), parts)
        for name, parts in chunks.items()
    }
    (path / ".metadata").write_bytes(pickle.dumps(Metadata(entries, {}, places)))  # type: ignore[arg-type]
    return path


def one_list_of_chunks(
    path: Path, count: int, names: int, chunk_size: int = 4, size: int = 4
) -> Path:
    """All tensors share one list, which has the same chunk so many times."""
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([chunk_size]))
    parts = [chunk] * count
    places = {
        MetadataIndex(f"n{n}", torch.Size([0])): _StorageInfo("shard.distcp", 16 * n, 16)
        for n in range(names)
    }
    tensors = {f"n{n}": parts for n in range(names)}
    return sharded_directory(path, tensors, places, size, bytes(16 * names))


def pieces(path: Path, piece: bytes, count: int, shared: bool) -> Path:
    """One tensor in so many chunks of one element; each is the whole archive `piece`, shared or
    repeated.
    """
    chunks = [ChunkStorageMetadata(torch.Size([n]), torch.Size([1])) for n in range(count)]
    places = {
        MetadataIndex("w", torch.Size([n])): _StorageInfo(
            "shard.distcp", 0 if shared else n * len(piece), len(piece)
        )
        for n in range(count)
    }
    whole = piece if shared else piece * count
    return sharded_directory(path, {"w": chunks}, places, count, whole)


def large_piece(path: Path, instructions: int, members: int) -> bytes:
    """An archive of a tensor of one element, with so much to read beside it."""
    pickled = b"\x80\x02" + b"N" * instructions + shared_tensor(1, 0) + b"."
    storages = {str(number): bytes(4 if number == 0 else 0) for number in range(members)}
    return torch_zip(path / "piece", pickled, storages).read_bytes()


def one_state_of_places(path: Path, fields: int) -> Path:
    """All places share one state, which has fields that none has."""
    info = _StorageInfo("shard.distcp", 0, 16)
    vars(info).update({f"x{number}": 0 for number in range(fields)})
    places = {MetadataIndex("w", torch.Size([n])): info for n in range(15_000)}
    chunks = [ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))]
    return sharded_directory(path, {"w": chunks}, places, 4)


WORST_FILES: dict[str, Callable[[Path], Path]] = {
    "20,000 names for one parameter of parameters": lambda path: shared_by_names(
        path, shared_tensor(1, 20_000), 20_000
    ),
    "15,000 names for one call with many arguments": lambda path: shared_by_names(
        path, shared_tensor(1, 0, 500_000), 15_000
    ),
    "450,000 names for one tensor of 64 dimensions": lambda path: shared_by_names(
        path, shared_tensor(64, 0), 450_000
    ),
    "450,000 names for one tensor": lambda path: shared_by_names(
        path, shared_tensor(1, 0), 450_000
    ),
    "one list of 20,000 chunks": lambda path: one_list_of_chunks(path, 20_000, 60),
    "one list of 300,000 empty chunks": lambda path: one_list_of_chunks(path, 300_000, 60, 0, 0),
    "15,000 places with one state of 50,000 fields": lambda path: one_state_of_places(path, 50_000),
    "100 chunks that are one large piece": lambda path: pieces(
        path, large_piece(path, 900_000, 30_000), 100, shared=True
    ),
    "100 pieces of many instructions": lambda path: pieces(
        path, large_piece(path, 900_000, 1), 100, shared=False
    ),
    "40 pieces of many members": lambda path: pieces(
        path, large_piece(path, 1, 30_000), 40, shared=False
    ),
}


@pytest.mark.timing
@pytest.mark.parametrize("kind", WORST_FILES)
def test_the_worst_files_keep_within_time_and_memory(tmp_path: Path, kind: str) -> None:
    """Fails if what a file says once and refers to often is work each time, for seconds or hundreds
    of megabytes.
    """
    assert_refused(WORST_FILES[kind](tmp_path))


def test_small_files_of_these_kinds_load(tmp_path: Path) -> None:
    """Fails if the files of the test above are refused for another reason than their size."""
    small = {
        "wrapped": shared_by_names(made(tmp_path / "1"), shared_tensor(1, 2), 10),
        "of 8 dimensions": shared_by_names(made(tmp_path / "2"), shared_tensor(8, 0), 10),
        "in pieces": pieces(made(tmp_path / "3"), large_piece(tmp_path, 1, 5), 30, shared=False),
        "of one list": one_list_of_chunks(made(tmp_path / "4"), 1, 1),
        "empty": one_list_of_chunks(made(tmp_path / "5"), 30, 3, 0, 0),
    }
    for kind, path in small.items():
        source = open_checkpoint(path)
        assert len(source.shapes) in (1, 3, 11), kind
        if kind != "of one list":  # its shard is no archive
            read_all(source)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.timing
def test_a_pickle_that_is_compressed_is_not_inflated(tmp_path: Path) -> None:
    """Fails if a file of 1 MiB becomes 1 GiB."""
    path = tmp_path / "weights.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open("archive/data.pkl", "w") as member,
    ):
        for _ in range(1024):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2 * 2**20
    assert "compressed" in assert_refused(path)


@pytest.mark.timing
def test_an_archive_of_a_million_members_is_refused_before_they_are_listed(tmp_path: Path) -> None:
    """Fails if the directory of an archive takes many times its size in memory."""
    path = tmp_path / "weights.pt"
    entry = (
        struct.pack(
            "<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0
        )
        + b"a"
    )
    directory = entry * 1_000_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(directory), 30, 0)
    path.write_bytes(b"PK\x03\x04" + bytes(26) + directory + end)
    assert "directory" in assert_refused(path)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3).to_sparse(),
        torch.nested.nested_tensor([torch.zeros(2)]),
        torch.zeros(2, device="meta"),
    ],
)
def test_tensors_of_odd_kinds_are_named(tmp_path: Path, value: Tensor) -> None:
    """Fails if a nested tensor is a traceback."""
    torch.save({**drawn_weights(tiny_gpt()), "norm.weight": value}, tmp_path / "weights.pt")
    assert "'norm.weight' is no plain tensor" in error_of(tmp_path / "weights.pt")


def test_quantized_and_conjugated_tensors_are_named(tmp_path: Path) -> None:
    """Fails if numbers that mean something else are read as they are."""
    for value in (
        torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        torch.zeros(3, dtype=torch.complex64).conj(),
    ):
        for new_format in (True, False):
            torch.save(
                {"norm.weight": value},
                tmp_path / "weights.pt",
                _use_new_zipfile_serialization=new_format,
            )
            assert "'norm.weight' is no plain tensor" in error_of(tmp_path / "weights.pt")


# --- tensors that claim what is not there ---


def tensor_pickle(
    elements: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> bytes:
    """{"norm.weight": a tensor over storage 0}."""

    def plain(value: object) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1].replace(b"q\x00", b"").replace(b"q\x01", b"")

    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + plain(elements)
        + b"tQ"
    )
    call = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + plain(offset)
        + plain(size)
        + plain(stride)
        + b"\x89"
    )
    return b"\x80\x02}X\x0b\x00\x00\x00norm.weight" + call + b"ccollections\nOrderedDict\n)RtRs."


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (33,), (1,)),
        (1, (32,), (1,)),
        (0, (32,), (2,)),
        (2**40, (32,), (1,)),
        (0, (2**47, 2**47), (2**47, 1)),
    ],
)
def test_tensors_outside_of_what_is_stored_are_refused(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    """Fails if memory or the file is read beyond a storage's end."""
    path = torch_zip(
        tmp_path / "weights.pt", tensor_pickle(32, offset, size, stride), {"0": bytes(128)}
    )
    assert "outside of what is stored" in error_in_time(path)


def test_the_same_pickle_with_right_sizes_loads(tmp_path: Path) -> None:
    """Fails if the test above refuses for another reason."""
    path = torch_zip(tmp_path / "weights.pt", tensor_pickle(32, 0, (32,), (1,)), {"0": bytes(128)})
    assert open_checkpoint(path).shapes == {"norm.weight": torch.Size([32])}


@pytest.mark.parametrize("size", [(-1,), (True,), (1.0,), ("1",), (1,) * 65, (2**63,)])
def test_sizes_that_no_tensor_has_are_refused(tmp_path: Path, size: tuple[int, ...]) -> None:
    """Fails if a size of another kind is taken for a number."""
    path = torch_zip(
        tmp_path / "weights.pt", tensor_pickle(32, 0, size, (1,) * len(size)), {"0": bytes(128)}
    )
    assert "no plain tensor" in error_in_time(path)


def test_a_conversion_does_not_write_more_than_is_there(tmp_path: Path) -> None:
    """Fails if a file of a few bytes becomes a tensor that fills memory or the disk."""
    torch.save({"norm.weight": torch.zeros(()).expand(2**20, 2**20)}, tmp_path / "weights.pt")
    command = [
        sys.executable,
        "scripts/convert_checkpoint.py",
        str(tmp_path / "weights.pt"),
        str(tmp_path / "out.safetensors"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "than the checkpoint has" in done.stderr
    assert done.stderr.count("\n") == 1


# --- files that change ---


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "sharded"])
@pytest.mark.parametrize("change", ["shorter", "other"])
def test_a_file_that_changes_between_opening_and_reading_is_one_line(
    tmp_path: Path, kind: str, change: str
) -> None:
    """Fails if a file that becomes shorter kills the process, or if weights of two versions are
    mixed.
    """
    path = written(tmp_path, kind)
    source = open_checkpoint(path)
    file = path if path.is_file() else max(path.iterdir(), key=lambda file: file.stat().st_size)
    if change == "shorter":
        os.truncate(file, file.stat().st_size // 2)
    else:
        os.utime(file, (1, 1))
    with pytest.raises(CheckpointError, match="has changed while it was read"):
        read_all(source)


def test_a_file_that_becomes_shorter_during_one_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the end of a file in the middle of a tensor is waited for, or leaves uninitialised
    memory.
    """
    path = written(tmp_path, "safetensors")
    source = open_checkpoint(path)
    source_identity = stored_tensor._identity(path.stat())
    os.truncate(path, path.stat().st_size - 4)
    monkeypatch.setattr(stored_tensor, "_identity", lambda found: source_identity)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        read_all(source)


def read_all(source: WeightSource) -> None:
    for name, shape in source.shapes.items():
        source.read_into(name, torch.empty(shape))


def written(folder: Path, kind: str) -> Path:
    """A good checkpoint of that kind."""
    from safetensors.torch import save_file

    weights, path = drawn_weights(tiny_gpt()), folder / "weights"
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "sharded":
        dcp.save({"model": weights}, checkpoint_id=path, no_dist=True)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    return path


# --- .safetensors ---


def safetensors(
    path: Path, header: object, numbers: bytes = b"", length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + numbers)
    return path


def entry(begin: int, end: int, shape: object = None, dtype: str = "F32") -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("header", "numbers", "length"),
    [
        ({"a": entry(0, 8)}, bytes(8), 2**63),
        ({"a": entry(0, 8)}, bytes(8), 2**64 - 1),
        ({"a": entry(0, 8)}, bytes(8), 10),
        (b"{" + b"[" * 100_000, b"", None),
        (b'{"a":' * 100_000, b"", None),
        (b'{"a":1' + b"1" * 5000 + b"}", b"", None),
        (
            b'{"a":'
            + json.dumps(entry(0, 4)).encode()
            + b',"a":'
            + json.dumps(entry(4, 8)).encode()
            + b"}",
            bytes(8),
            None,
        ),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), None),
        ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), None),
        ({"a": entry(4, 8)}, bytes(8), None),
        ({"a": entry(0, 8)}, bytes(9), None),
        ({"a": entry(0, 8)}, bytes(7), None),
        ({"a": entry(0, 8, [2**40])}, bytes(8), None),
        ({"a": entry(0, 8, [2**63, 2])}, bytes(8), None),
        ({"a": entry(0, 8, [2**32, 2**32])}, bytes(8), None),
        ({"a": entry(0, 0, [2**70, 0])}, b"", None),
        ({"a": entry(0, 8, [-2, -1])}, bytes(8), None),
        ({"a": entry(0, 8, [2.0])}, bytes(8), None),
        ({"a": entry(0, 4, [1] * 100_000)}, bytes(4), None),
        ({"a": entry(0, 8, None, "F32 or so" * 1000)}, bytes(8), None),
        ({"a" * 100_000: entry(0, 8, None, "X")}, bytes(8), None),
        ({"a": entry(0, 8, None, ["F32"])}, bytes(8), None),  # type: ignore[arg-type]
        ({"a": [1]}, b"", None),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8), None),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8), None),
        ({"a": entry(0, 8), "__metadata__": {"a": 1}}, bytes(8), None),
        ({"a": entry(0, 8), "__metadata__": []}, bytes(8), None),
        (b"{", b"", None),
        (b'{"a":NaN}', b"", None),
        (b'{"\xff":1}', b"", None),
    ],
)
def test_safetensors_that_are_not_what_they_say_are_one_line(
    tmp_path: Path, header: object, numbers: bytes, length: int | None
) -> None:
    """Fails if a table of contents is believed."""
    path = safetensors(tmp_path / "weights.safetensors", header, numbers, length)
    assert len(error_in_time(path)) <= max(500, 200 + len(str(path)))


@pytest.mark.timing
def test_a_header_of_megabytes_keeps_within_time_and_memory(tmp_path: Path) -> None:
    """Fails if a table becomes many times its size in memory."""
    assert_refused(safetensors(tmp_path / "large.safetensors", b"{" + b" " * 64 * 2**20 + b"}"))
    lists = b'{"a":[' + b"[]," * 1_300_000 + b"[]]}"
    assert_refused(safetensors(tmp_path / "lists.safetensors", lists))
    names = b"{" + b",".join(b'"%d":1' % number for number in range(300_000)) + b"}"
    assert_refused(safetensors(tmp_path / "names.safetensors", names))


def test_scalars_and_empty_tensors_of_safetensors_load(tmp_path: Path) -> None:
    """Fails if what the format allows at its edges is refused."""
    header = {"a": entry(0, 4, []), "b": entry(4, 4, [0, 2**40]), "__metadata__": {"format": "pt"}}
    source = open_checkpoint(safetensors(tmp_path / "weights", header, struct.pack("<f", 2.5)))
    target = torch.zeros(())
    source.read_into("a", target)
    assert target == 2.5
    assert source.shapes["b"] == (0, 2**40)


# --- what must load as before ---


def test_what_torch_saves_beside_weights_loads(tmp_path: Path) -> None:
    """Fails if a file is refused for the kinds of values that training keeps in its arguments and
    states.
    """
    import argparse
    from collections import Counter, OrderedDict

    weights = drawn_weights(tiny_gpt())
    state = OrderedDict(weights)
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    kept = argparse.Namespace(
        size=torch.Size([2]), dtype=torch.bfloat16, device=torch.device("cpu"), names={"a", "b"},
        raw=b"bytes", ratio=1e-4,
        large=2**70, nested={"betas": (0.9, 0.95), 3: None, (1, "x"): True}, seen=Counter("aab"),
        text="ü模型", z=1 + 2j,
    )  # fmt: skip
    for new_format in (True, False):
        torch.save(
            {"model": state, "args": kept, "optimizer": {"state": {}}},
            tmp_path / "w.pt",
            _use_new_zipfile_serialization=new_format,
        )
        torch.load(tmp_path / "w.pt", weights_only=False)
        assert_loads(tmp_path / "w.pt", weights)


@pytest.mark.parametrize("new_format", [True, False])
def test_views_transposes_and_parameters_load(tmp_path: Path, new_format: bool) -> None:
    """Fails if a tensor is read from another place than its own, or in another order."""
    weights = drawn_weights(tiny_gpt())
    whole = torch.cat([tensor.reshape(-1) for tensor in weights.values()])
    views, start = {}, 0
    for place, (name, tensor) in enumerate(weights.items()):
        view = whole[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
        views[name] = [
            view,
            tensor.t().contiguous().t() if tensor.dim() == 2 else tensor,
            torch.nn.Parameter(tensor),
        ][place % 3]
    torch.save(views, tmp_path / "w.pt", _use_new_zipfile_serialization=new_format)
    assert_loads(tmp_path / "w.pt", weights)
    assert_loads(tmp_path / "w.pt", weights, dtype=torch.bfloat16)


def test_numbers_are_converted_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a tensor larger than a piece is read wrong where pieces meet."""
    monkeypatch.setattr(stored_tensor, "_PIECE_BYTES", 4 * 37)
    weights = drawn_weights(tiny_gpt())
    torch.save(weights, tmp_path / "w.pt")
    assert_loads(tmp_path / "w.pt", weights, dtype=torch.float16)


def test_other_dtypes_load(tmp_path: Path) -> None:
    """Fails if float8, which torch saves in another way than the others, or float64 is
    read wrong.
    """
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        weights = {name: tensor.to(dtype) for name, tensor in drawn_weights(tiny_gpt()).items()}
        torch.save(weights, tmp_path / "w.pt")
        model = on_meta(tiny_gpt)
        load_weights(model, tmp_path / "w.pt", device=CPU, dtype=torch.float32)
        assert all(
            torch.equal(tensor, weights[name].float())
            for name, tensor in model.state_dict().items()
        )

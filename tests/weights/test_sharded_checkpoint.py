"""FSDP's sharded directories: real ones load exactly in one process; damaged and hostile ones end
in one line.
"""

import itertools
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from test_checkpoint import HOSTILE_KINDS, PROGRAM, hostile_file
from torch import distributed
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from autoregressive.cli.command import flag_of
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import Transformer
from autoregressive.weights.checkpoint import CheckpointError, load_weights
from autoregressive.weights.stored_tensor import (
    BadContentError,
    Chunk,
    ChunkedTensor,
    StoredTensor,
    check_coverage,
)

CPU = torch.device("cpu")
RANKS = 2


def tiny_gpt() -> Transformer:
    # 11 classes and 33 codes: rows that two ranks cannot share evenly.
    return Transformer(
        GPTConfig(
            dim=32,
            n_layer=2,
            n_head=4,
            vocab_size=33,
            block_size=16,
            num_classes=10,
            multiple_of=16,
        )
    )


def seeded_gpt(seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = tiny_gpt()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def write_with_fsdp(rank: int, port: int, folder: str) -> None:
    """One of two processes: shards a seeded model with both generations of FSDP and saves it in
    several ways.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import (
        FullyShardedDataParallel,
        ShardedStateDictConfig,
        StateDictType,
        fully_shard,
    )

    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    torch.set_num_threads(1)
    mesh = distributed.init_device_mesh("cpu", (RANKS,))
    tokens = torch.zeros(2, 3, dtype=torch.int64)

    first = FullyShardedDataParallel(
        seeded_gpt(1), device_id=CPU, device_mesh=mesh, use_orig_params=True
    )
    optimizer = torch.optim.AdamW(first.parameters())
    first(idx=tokens, cond_idx=torch.zeros(2, dtype=torch.int64)).sum().backward()
    weights, optimizer_state = get_state_dict(first, optimizer)
    averaged = {name: tensor * 2 for name, tensor in weights.items()}  # type: ignore[operator]
    dcp.save(weights, checkpoint_id=f"{folder}/fsdp1_flat")
    dcp.save(
        {"model": weights, "optimizer": optimizer_state, "steps": 5, "ema": averaged},
        checkpoint_id=f"{folder}/fsdp1_nested",
    )

    with FullyShardedDataParallel.state_dict_type(
        first, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
    ):
        dcp.save({"module": first.state_dict()}, checkpoint_id=f"{folder}/fsdp1_state_dict_type")

    second = seeded_gpt(1)
    for block in second.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(second, mesh=mesh)
    dcp.save({"model": second.state_dict(), "steps": 5}, checkpoint_id=f"{folder}/fsdp2")
    distributed.barrier()
    distributed.destroy_process_group()
    # Everything is written. Leaving the ordinary way aborts now and then, in a gloo thread that
    # torch does not join.
    os._exit(0)


ARRANGEMENTS = ["fsdp1_flat", "fsdp1_nested", "fsdp1_state_dict_type", "fsdp2"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(write_with_fsdp, (port, str(folder)), nprocs=RANKS)
    return folder


@pytest.fixture
def directory(written: Path, tmp_path: Path) -> Path:
    """A copy of one directory, to be damaged."""
    return shutil.copytree(written / "fsdp1_nested", tmp_path / "copy")


def load(
    path: Path, dtype: torch.dtype = torch.float32, ema: bool = False, from_fsdp: bool = False
) -> Transformer:
    with torch.device("meta"):
        model = tiny_gpt()
    load_weights(model, path, device=CPU, dtype=dtype, ema=ema, from_fsdp=from_fsdp)
    return model


def error_of(path: Path, **options: bool) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)  # type: ignore[arg-type]
    message = caught.value.spelled(flag_of)
    assert "\n" not in message
    assert str(path) in message
    return message


def rewrite_metadata(path: Path, change: Callable[[Metadata], Any]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (path / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_of_two_ranks_become_the_weights_they_were(
    written: Path, arrangement: str, dtype: torch.dtype
) -> None:
    assert len(list((written / arrangement).glob("*.distcp"))) == RANKS
    model = load(written / arrangement, dtype=dtype, from_fsdp=True)
    expected = seeded_gpt(1).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype)), name
    assert model.freqs_cis.dtype == torch.float32


def test_averaged_weights_come_from_their_own_entries(written: Path) -> None:
    model = load(written / "fsdp1_nested", ema=True)
    assert torch.equal(model.norm.weight, seeded_gpt(1).norm.weight * 2)
    assert "leave out --ema" in error_of(written / "fsdp2", ema=True)


def test_loading_says_nothing(written: Path, recwarn: pytest.WarningsRecorder) -> None:
    load(written / "fsdp1_flat")
    assert not list(recwarn)


# --- incomplete ---


def test_a_directory_without_metadata_or_with_a_shard_gone_is_incomplete(directory: Path) -> None:
    (directory / "__1_0.distcp").unlink()
    assert "__1_0.distcp is missing" in error_of(directory)
    (directory / ".metadata").unlink()
    assert ".metadata is missing" in error_of(directory)


def test_a_shard_cut_short_is_found_before_anything_is_read(directory: Path) -> None:
    shard = directory / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size // 2)
    assert "__0_0.distcp is cut short" in error_of(directory)


def test_a_shard_of_other_bytes_is_one_line(directory: Path) -> None:
    shard = directory / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert "is damaged" in error_of(directory)


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", b"\x80\x04", pickle.dumps({"state_dict_metadata": 1})]
)
def test_damaged_metadata_is_one_line(directory: Path, content: bytes) -> None:
    (directory / ".metadata").write_bytes(content)
    assert ".metadata: " in error_of(directory)


def test_metadata_cut_short_anywhere_is_one_line(directory: Path) -> None:
    whole = (directory / ".metadata").read_bytes()
    for size in range(0, len(whole), 997):
        (directory / ".metadata").write_bytes(whole[:size])
        assert ".metadata: " in error_of(directory)


# --- hostile ---


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def make_hostile(directory: Path, mark: Path) -> None:
    def change(metadata: Metadata) -> None:
        metadata.planner_data = Hostile(mark)

    rewrite_metadata(directory, change)


def test_metadata_that_runs_code_is_refused_and_runs_nothing(
    directory: Path, tmp_path: Path
) -> None:
    make_hostile(directory, tmp_path / "executed")
    assert "mkdir" in error_of(directory)
    assert not (tmp_path / "executed").exists()
    FileSystemReader(
        directory
    ).read_metadata()  # the file is hostile indeed: the library's own reader executes it
    assert (tmp_path / "executed").exists()


def test_refusal_needs_no_assertions(directory: Path, tmp_path: Path) -> None:
    """Under `python -O` assertions are gone: a refusal resting on one would execute the file, be it
    sharded or not.
    """
    mark = tmp_path / "executed"
    make_hostile(directory, mark)
    paths = [hostile_file(tmp_path / f"{kind}.pt", mark, kind) for kind in HOSTILE_KINDS] + [
        directory
    ]
    unreachable = 'assert False, "unreachable under -O"\n'
    command = [sys.executable, "-O", "-c", unreachable + PROGRAM, *map(str, paths)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert finished.stdout == "2\n" * len(paths), finished.stderr
    lines = finished.stderr.splitlines()
    assert len(lines) == len(paths), finished.stderr
    assert all("could run code" in line for line in lines[:-1]), finished.stderr
    assert not mark.exists()


# --- hostile metadata made of allowed names alone ---

MODULE = "torch.distributed.checkpoint.metadata"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def named(name: str, module: str = MODULE) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def mapping(*items: bytes) -> bytes:
    return b"}(" + b"".join(items) + b"u"


def altered(target: bytes, attribute: str, value: bytes) -> bytes:
    """A state for slots: the standard library would do setattr(target, attribute, value)."""
    return target + b"(N" + mapping(text(attribute), value) + b"tb0"


def shape(*sides: int) -> bytes:
    return called(named("Size", "torch"), b"](" + b"".join(map(number, sides)) + b"e")


def altering_metadata(genuine: bytes) -> bytes:
    """Takes effect on the classes, then describes the checkpoint as it is."""
    assert genuine.startswith(b"\x80\x04")
    return b"\x80\x04" + altered(named("Metadata"), "__len__", named("Size", "torch")) + genuine[2:]


def disguised_metadata(shard: Path) -> bytes:
    """An entry that is a tensor when it is checked and a pickle, which the library executes, when
    it is read.
    """
    name = text("norm.weight")
    chunk = called(named("ChunkStorageMetadata"), shape(0), shape(32))
    disguise = mapping(
        text("__class__"), named("BytesStorageMetadata"), text("size"), shape(32), text("offset"),
        b"N", text("index"), b"N",
        text("properties"), called(named("TensorProperties"), named("float32", "torch")),
        text("chunks"), b"](" + chunk + b"e",
        text("fqn"), name,
    )  # fmt: skip
    place = (text(shard.name), number(0), number(shard.stat().st_size))
    info = called(named("_StorageInfo", "torch.distributed.checkpoint.filesystem"), *place)
    return b"".join([
        b"\x80\x04",
        altered(named("_MEM_FORMAT_ENCODING"), "_value2member_map_", disguise),
        altered(named("TensorStorageMetadata"), "__getattribute__", named("_MEM_FORMAT_ENCODING")),
        altered(named("MetadataIndex"), "__getattribute__", named("_MEM_FORMAT_ENCODING")),
        called(
            named("Metadata"), mapping(name, named("TensorStorageMetadata") + b")\x81"), b"N",
            mapping(called(named("MetadataIndex"), name), info),
        ),
        b".",
    ])  # fmt: skip


UNALTERED = """
import pickle, sys
from pathlib import Path, PurePosixPath
import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from autoregressive.weights.checkpoint import CheckpointError, load_weights
from autoregressive.models.gpt import GPT_models
known = [cls for cls in vars(metadata).values() if isinstance(cls, type)]
known += [_StorageInfo, PurePosixPath]
def state():
    members = dict(metadata._MEM_FORMAT_ENCODING._value2member_map_)
    return members, [{key: id(value) for key, value in vars(cls).items()} for cls in known]
before = state()
with torch.device("meta"):
    model = GPT_models["GPT-demo"]()
for folder in map(Path, sys.argv[1:]):
    try:
        load_weights(model, folder, device=torch.device("cpu"), dtype=torch.float32)
    except CheckpointError as error:
        print(error)
if state() != before:
    sys.exit(3)
for folder in map(Path, sys.argv[1:]):
    before = state()
    pickle.loads((folder / ".metadata").read_bytes())
    if state() == before:
        sys.exit(4)
"""


def test_metadata_cannot_alter_the_classes_it_may_name(directory: Path, tmp_path: Path) -> None:
    """Allowed classes are no protection by themselves: altered, they call what the file says."""
    altering, disguised = directory, shutil.copytree(directory, tmp_path / "disguised")
    (altering / ".metadata").write_bytes(altering_metadata((altering / ".metadata").read_bytes()))
    with (disguised / "__0_0.distcp").open("wb") as stream:
        torch.save({"a": Hostile(tmp_path / "executed"), "pad": torch.zeros(1000)}, stream)
    (disguised / ".metadata").write_bytes(disguised_metadata(disguised / "__0_0.distcp"))
    command = [sys.executable, "-O", "-c", UNALTERED, str(altering), str(disguised)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    # 3: altered by what should have been refused; 4: not even altered by the standard library, so
    # no attack at all.
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (
        finished.stdout.count("refused, this is not what describes a checkpoint: it changes a Name")
        == 2
    )
    assert not (tmp_path / "executed").exists()


SIZE = named("Size", "torch")


@pytest.mark.parametrize(
    "instructions",
    [
        called(text("text"), text("text")),
        SIZE + b"NR",
        b"(itorch\nSize\n",
        b"(" + SIZE + b"o",
        SIZE + b")}\x92",
        b"ctorch\nSize\n",
        b"\x82\x01",
        b"\x84\x01\x00\x00\x00",
        b"Pname\n",
        text("name") + b"Q",
        b"}" + mapping(text("a"), number(1)) + b"b",
        called(named("Metadata")) + mapping(text("a"), number(1)) + b"b" + mapping() + b"b",
        b")" + b"\x85" * 10**6 + b"\x94}h\x00Ns",
        b"}(" + b")" + b"\x85" * 10**6 + b"Nu",
        named("getattr", "builtins"),
        named("Metadata.__init__.__globals__"),
    ],
    ids=[
        "call of a text", "call without a tuple", "INST", "OBJ", "NEWOBJ_EX", "GLOBAL", "EXT1",
        "EXT4", "PERSID", "BINPERSID",
        "state of a dictionary", "state twice", "deep key", "deep keys", "getattr", "dotted name",
    ],
)  # fmt: skip
def test_instructions_that_no_metadata_needs_are_refused(
    directory: Path, instructions: bytes
) -> None:
    file = directory / ".metadata"
    file.write_bytes(b"\x80\x04" + instructions + b"0" + file.read_bytes()[2:])
    assert "refused, this is not what describes a checkpoint: " in error_of(directory)


@pytest.mark.parametrize("value", [True, "text", 1.0, -1, 2**63, None, (1,)])
def test_sides_of_a_weight_are_whole_numbers_of_a_plain_kind(directory: Path, value: Any) -> None:
    def change(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["model.norm.weight"]
        assert isinstance(entry, TensorStorageMetadata)
        entry.size = Sides(value)  # type: ignore[assignment]

    rewrite_metadata(directory, change)
    assert ".metadata: " in error_of(directory)


class Sides:
    """Pickled, it says that it is a torch.Size."""

    def __init__(self, *sides: Any) -> None:
        self.sides = sides

    def __reduce__(self) -> tuple[object, tuple[Any]]:
        return torch.Size, (self.sides,)


# --- hostile shards ---


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_weight_declared_to_be_a_pickle_is_not_unpickled(directory: Path, tmp_path: Path) -> None:
    """The library loads entries that are no tensors without care, so none may ever be asked for."""
    name, shard = "model.norm.weight", directory / "__0_0.distcp"
    start = shard.stat().st_size
    with shard.open("ab") as stream:
        torch.save(Hostile(tmp_path / "executed"), stream)

    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(name)] = _StorageInfo(
            shard.name, start, shard.stat().st_size - start
        )

    rewrite_metadata(directory, change)
    assert "1 of 18 weights are missing: norm.weight" in error_of(directory)
    assert not (tmp_path / "executed").exists()
    dcp.load({name: None}, checkpoint_id=directory, no_dist=True)
    assert (tmp_path / "executed").exists()


def test_a_shard_that_runs_code_is_refused_and_runs_nothing(
    directory: Path, tmp_path: Path
) -> None:
    shard = directory / "hostile.distcp"
    with shard.open("wb") as stream:
        torch.save({"a": Hostile(tmp_path / "executed"), "pad": torch.zeros(10**5)}, stream)

    def change(metadata: Metadata) -> None:
        info = next(
            info
            for index, info in metadata.storage_data.items()
            if index.fqn == "model.norm.weight"
        )
        info.relative_path, info.offset, info.length = shard.name, 0, shard.stat().st_size

    rewrite_metadata(directory, change)
    message = error_of(directory)
    assert "holds more than weights and could run code (posix.mkdir)" in message
    assert "weights_only" not in message  # torch's advice would execute the file
    assert not (tmp_path / "executed").exists()
    torch.load(shard, weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("elsewhere", ["../copy/__0_0.distcp", "/etc/passwd", "..", "", "a\0b", 7])
def test_shards_are_looked_for_nowhere_but_in_the_directory(
    directory: Path, elsewhere: Any
) -> None:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = elsewhere

    rewrite_metadata(directory, change)
    assert "no file of this directory" in error_of(directory)


def forget_a_chunk(entry: TensorStorageMetadata) -> None:
    entry.chunks.pop()


def repeat_a_chunk(entry: TensorStorageMetadata) -> None:
    entry.chunks[-1] = entry.chunks[0]


def move_a_chunk(entry: TensorStorageMetadata) -> None:
    entry.chunks[0].sizes = torch.Size([100, 32])


def enlarge(entry: TensorStorageMetadata) -> None:
    entry.size = torch.Size([2**40, 32])
    entry.chunks = [type(entry.chunks[0])(offsets=torch.Size([0, 0]), sizes=entry.size)]


def spoil(entry: TensorStorageMetadata) -> None:
    entry.chunks = "text"  # type: ignore[assignment]


def overlap_chunks(entry: TensorStorageMetadata) -> None:
    """Of 33 rows 17 and 16: the second part starts in the first, so that the last rows
    are in none.
    """
    entry.chunks[1].offsets = torch.Size([8, 0])


@pytest.mark.parametrize(
    "damage", [forget_a_chunk, repeat_a_chunk, move_a_chunk, overlap_chunks, enlarge, spoil]
)
def test_chunks_that_do_not_cover_a_weight_are_refused(
    directory: Path, damage: Callable[[TensorStorageMetadata], None]
) -> None:
    """What no chunk covers would stay uninitialised memory."""

    def change(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["model.output.weight"]
        assert isinstance(entry, TensorStorageMetadata)
        places = [
            metadata.storage_data.pop(MetadataIndex("model.output.weight", chunk.offsets))
            for chunk in entry.chunks
        ]
        damage(entry)
        for chunk, place in zip(entry.chunks, places, strict=False):
            if isinstance(chunk, ChunkStorageMetadata):
                metadata.storage_data[MetadataIndex("model.output.weight", chunk.offsets)] = place

    rewrite_metadata(directory, change)
    message = error_of(directory)
    assert ".metadata: " in message
    assert damage is not overlap_chunks or "overlap" in message


def grid(rows: int, columns: int) -> list[Chunk]:
    return [Chunk((2 * i, 3 * j), (2, 3), unread) for i in range(rows) for j in range(columns)]


def bricks(rows: int, columns: int) -> list[Chunk]:
    """Each row is cut elsewhere than the row above: no grid."""
    chunks = []
    for i in range(rows):
        cuts = [0, *range(3 - i % 2, 3 * columns, 3), 3 * columns]
        chunks += [
            Chunk((2 * i, start), (2, end - start), unread)
            for start, end in itertools.pairwise(cuts)
        ]
    return chunks


def staircase(steps: int) -> list[Chunk]:
    """Covers a square by strips that reach to its end: along each axis half of them would have to
    be compared with each other.
    """
    down = [Chunk((i, i), (steps - i, 1), unread) for i in range(steps)]
    across = [Chunk((i, i + 1), (1, steps - i - 1), unread) for i in range(steps - 1)]
    return down + across


def unread() -> StoredTensor:
    raise AssertionError("it is checked without being read")


def as_weight(chunks: list[Chunk], *size: int) -> ChunkedTensor:
    return ChunkedTensor("weight", torch.float32, torch.Size(size), chunks)


@pytest.mark.timing
@pytest.mark.parametrize(
    ("few", "many"),
    [
        ((1, 1000), (1, 4000)),
        ((1000, 1), (4000, 1)),
        ((32, 32), (64, 64)),
        ((200, 200), (400, 400)),
    ],
)
def test_the_time_to_compare_parts_grows_as_their_number(
    few: tuple[int, int], many: tuple[int, int]
) -> None:
    """Fails if each part is compared with each other: four times the parts would take 16 times as
    long, and millions of comparisons in Python.
    """
    assert seconds_to_check(*many) < 9 * seconds_to_check(*few)


@pytest.mark.parametrize(("rows", "columns"), [(1, 4000), (60, 70), (400, 400)])
def test_one_of_thousands_of_parts_that_is_there_twice_is_found(rows: int, columns: int) -> None:
    chunks = grid(rows, columns)
    chunks[-1] = chunks[0]
    with pytest.raises(BadContentError, match=r"overlap|takes too long"):
        check_coverage([as_weight(chunks, 2 * rows, 3 * columns)])


def seconds_to_check(rows: int, columns: int) -> float:
    """The processor's time to check a grid of parts: the least of three."""
    weight = as_weight(grid(rows, columns), 2 * rows, 3 * columns)

    def once() -> float:
        start = time.process_time()
        check_coverage([weight])
        return time.process_time() - start

    return min(once() for _ in range(3))


def test_parts_that_form_no_grid_are_compared_with_their_neighbours() -> None:
    """Fails if only grids pass, or if an overlap outside of a grid is missed."""
    chunks = bricks(6, 5)
    check_coverage([as_weight(chunks, 12, 15)])
    place = next(i for i, chunk in enumerate(chunks) if chunk.offsets == (2, 2))
    chunks[place] = Chunk((2, 3), (2, 3), unread)  # leaves a hole and covers as much twice
    with pytest.raises(BadContentError, match="overlap"):
        check_coverage([as_weight(chunks, 12, 15)])


@pytest.mark.timing
def test_parts_that_each_reach_beyond_all_others_are_refused_in_time() -> None:
    """Fails if thousands of hostile parts cost the square of their number: it was 45 s."""
    check_coverage([as_weight(staircase(100), 100, 100)])  # nothing is wrong with a small one
    start = time.process_time()
    with pytest.raises(BadContentError, match="takes too long"):
        check_coverage([as_weight(staircase(5000), 5000, 5000)])
    assert time.process_time() - start < 5

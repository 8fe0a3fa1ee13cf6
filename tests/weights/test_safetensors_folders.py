"""Folders of .safetensors files: Hugging Face's with an index, and what
torch.distributed.checkpoint writes in that format.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import assert_loads, drawn_weights, error_of, tiny_gpt
from torch import Tensor, distributed
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from autoregressive.models.gpt import GPT_models
from autoregressive.weights.checkpoint import CheckpointError, open_checkpoint
from autoregressive.weights.conversion import check_complete

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
INDEX = "model.safetensors.index.json"

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def in_two_files() -> dict[str, int]:
    return {name: 1 + place % 2 for place, name in enumerate(drawn_weights(tiny_gpt()))}


def write_with_two_ranks(rank: int, port: int, folder: str) -> None:
    """One of two processes, which hold each weight's rows between them: 10 classes and 11
    embeddings, uneven.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    mesh = distributed.init_device_mesh("cpu", (RANKS,))
    weights = drawn_weights(tiny_gpt())
    sharded = {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in weights.items()
    }
    for name, options in {
        "shards": {},
        "shards_of_two_files": {"fqn_to_index_mapping": in_two_files()},
        "consolidated": {"fqn_to_index_mapping": in_two_files(), "enable_consolidation": True},
    }.items():
        writer = HuggingFaceStorageWriter(f"{folder}/{name}", save_distributed=True, **options)  # type: ignore[arg-type]
        dcp.save(dict(sharded), storage_writer=writer)
    writer = HuggingFaceStorageWriter(f"{folder}/nested", save_distributed=True)
    dcp.save({"app": {"model": sharded}}, storage_writer=writer)
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads can abort a process that leaves the ordinary way


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(write_with_two_ranks, (port, str(folder)), nprocs=RANKS)
    weights = drawn_weights(tiny_gpt())
    writer = HuggingFaceStorageWriter(str(folder / "rank_0"), fqn_to_index_mapping=in_two_files())
    dcp.save(dict(weights), storage_writer=writer, no_dist=True)
    return folder


KINDS = ["shards", "shards_of_two_files", "consolidated", "nested", "rank_0"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_torch_writes_in_this_format_loads(
    written: Path, kind: str, dtype: torch.dtype
) -> None:
    """Fails if a kind of folder that torch's HuggingFaceStorageWriter leaves is not recognised, or
    a weight differs.
    """
    files = {file.name for file in (written / kind).glob("*.safetensors")}
    assert (written / kind / INDEX).exists() == (kind in ("consolidated", "rank_0"))
    assert any(name.startswith("shard-00002-model-") for name in files) == (
        "shards" in kind or kind == "nested"
    )
    assert_loads(written / kind, drawn_weights(tiny_gpt()), dtype=dtype, from_fsdp=True)


def test_a_folder_of_shards_becomes_one_file(written: Path, tmp_path: Path) -> None:
    """Fails if conversion cannot read what loading can."""
    output = tmp_path / "out.safetensors"
    command = [
        sys.executable,
        "scripts/convert_checkpoint.py",
        str(written / "shards_of_two_files"),
        str(output),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    converted = load_file(output)
    assert converted.keys() == drawn_weights(tiny_gpt()).keys()
    assert all(
        torch.equal(converted[name], tensor) for name, tensor in drawn_weights(tiny_gpt()).items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_is_read_before_it_is_asked_for(
    written: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a folder is held in memory instead of one weight at a time."""
    from autoregressive.weights.stored_tensor import StoredTensor

    read: list[torch.Size] = []
    original = StoredTensor.read_into

    def counted(self: StoredTensor, target: Tensor) -> None:
        read.append(self.shape)
        original(self, target)

    monkeypatch.setattr(StoredTensor, "read_into", counted)
    source = open_checkpoint(written / kind)
    assert not read
    source.read_into("norm.weight", torch.empty(32))
    assert sum(shape.numel() for shape in read) == 32


# --- Hugging Face's folders ---


def hugging_face(folder: Path, weights: dict[str, Tensor] | None = None) -> Path:
    """Two parts and their index, as the transformers library writes them."""
    folder.mkdir(exist_ok=True)
    weights = drawn_weights(tiny_gpt()) if weights is None else weights
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {name: names[place % 2] for place, name in enumerate(weights)}
    for part in names:
        save_file(
            {name: weights[name] for name in weights if index[name] == part},
            folder / part,
            {"format": "pt"},
        )
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return folder


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    changed = change(index)
    (folder / INDEX).write_text(json.dumps(index if changed is None else changed))


def test_parts_with_an_index_load(tmp_path: Path) -> None:
    """Fails if the most common kind of folder is not read."""
    assert_loads(hugging_face(tmp_path / "folder"), drawn_weights(tiny_gpt()))


def test_parts_may_be_links_as_the_hub_stores_them(tmp_path: Path) -> None:
    """Fails if a snapshot in the hub's cache, whose files are links out of the folder, is
    refused.
    """
    folder, blobs = hugging_face(tmp_path / "folder"), tmp_path / "blobs"
    blobs.mkdir()
    for number, part in enumerate(folder.glob("*.safetensors")):
        part.rename(blobs / str(number))
        part.symlink_to(blobs / str(number))
    assert_loads(folder, drawn_weights(tiny_gpt()))


def test_a_folder_with_one_file_loads(tmp_path: Path) -> None:
    """Fails if a small model's folder is not read, or its other files disturb."""
    save_file(drawn_weights(tiny_gpt()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert_loads(tmp_path, drawn_weights(tiny_gpt()))


def test_averaged_weights_of_a_folder_are_found(tmp_path: Path) -> None:
    """Fails if --ema takes other weights, or is ignored."""
    averaged = drawn_weights(tiny_gpt(), seed=1)
    both = {f"model.{name}": tensor for name, tensor in drawn_weights(tiny_gpt()).items()}
    both |= {f"ema.{name}": tensor for name, tensor in averaged.items()}
    folder = hugging_face(tmp_path / "folder", both)
    assert_loads(folder, averaged, ema=True)
    assert_loads(folder, drawn_weights(tiny_gpt()))
    assert "leave out --ema" in error_of(hugging_face(tmp_path / "plain"), ema=True)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    """Fails if a folder that was copied in part loads."""
    folder = hugging_face(tmp_path / "folder")
    part = folder / "model-00002-of-00002.safetensors"
    part.unlink()
    assert (
        "model-00002-of-00002.safetensors, which model.safetensors.index.json names, is no file"
        in error_of(folder)
    )


def test_parts_without_their_index_are_refused(tmp_path: Path) -> None:
    """Fails if it is guessed which files belong together."""
    folder = hugging_face(tmp_path / "folder")
    (folder / INDEX).unlink()
    assert "no model.safetensors.index.json" in error_of(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert "part 1 of 2 is missing" in error_of(folder)


def test_an_index_that_says_otherwise_than_its_parts_is_refused(tmp_path: Path) -> None:
    """Fails if a part of another version, with other weights in it, passes."""

    def swap(index: dict[str, Any]) -> None:
        first, second, *_ = index["weight_map"]
        index["weight_map"][first] = index["weight_map"][second]

    def add(index: dict[str, Any]) -> None:
        index["weight_map"]["new.weight"] = "model-00001-of-00002.safetensors"

    for change in (swap, add, lambda index: index["weight_map"].pop("norm.weight") and None):
        folder = hugging_face(tmp_path / "folder")
        change_index(folder, change)
        assert "says otherwise" in error_of(folder)


@pytest.mark.parametrize(
    "elsewhere",
    ["../other/model.safetensors", "/etc/passwd", "..", "", ".", "a\0b", "sub/model.safetensors"],
)
def test_parts_are_looked_for_nowhere_but_in_the_folder(tmp_path: Path, elsewhere: str) -> None:
    """Fails if an index leads to files outside of its folder."""
    hugging_face(tmp_path / "other")
    folder = hugging_face(tmp_path / "folder")
    change_index(folder, lambda index: index["weight_map"].update({"norm.weight": elsewhere}))
    assert "is no file of this folder" in error_of(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        "[" * 100_000,
        '{"weight_map": {"a": "b", "a": "c"}}',
        "x" * 5 * 2**20,
    ],
    ids=range(8),
)
def test_a_damaged_index_is_one_line(tmp_path: Path, content: str) -> None:
    """Fails if an index of another kind is a traceback."""
    folder = hugging_face(tmp_path / "folder")
    (folder / INDEX).write_text(content)
    assert INDEX in error_of(folder)


def test_two_indices_are_refused(tmp_path: Path) -> None:
    """Fails if one of two variants is chosen without a word."""
    folder = hugging_face(tmp_path / "folder")
    shutil.copy(folder / INDEX, folder / "model.fp16.safetensors.index.json")
    assert "more than one index" in error_of(folder)


# --- damaged and hostile shards ---


def rewrite(file: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> None:
    with safe_open(file, framework="pt") as opened:
        extra = dict(opened.metadata())
    tensors = load_file(file)
    change(tensors, extra)
    save_file(tensors, file, extra)


@pytest.fixture
def shards(written: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(written / "shards", tmp_path / "copy")


def sharding(
    change: Callable[[dict[str, Any]], object],
) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    def changed(tensors: dict[str, Tensor], extra: dict[str, str]) -> None:
        info = json.loads(extra["DCP_SHARDING_INFO"])
        change(info)
        extra["DCP_SHARDING_INFO"] = json.dumps(info)

    return changed


SECOND = "shard-00002-model-00001-of-00001.safetensors"


def test_a_missing_shard_is_noticed(shards: Path) -> None:
    """Fails if rows that no shard has stay uninitialised memory."""
    (shards / SECOND).rename(shards / "kept")
    assert "have another shape" in error_of(shards)
    (shards / "kept").rename(shards / SECOND)
    (shards / SECOND.replace("00002", "00001")).unlink()
    assert "missing or overlap" in error_of(shards)


def whole_tensors_in_shards(folder: Path, weights: dict[str, Tensor], count: int) -> Path:
    """Shards as torch writes them where each process keeps some of the weights that all have."""
    folder.mkdir()
    for number in range(count):
        held = {
            name: tensor
            for place, (name, tensor) in enumerate(weights.items())
            if place % count == number
        }
        places = {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in held.items()}
        extra = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(places)}
        save_file(held, folder / f"shard-0000{number + 1}-model-00001-of-00001.safetensors", extra)
    return folder


@pytest.mark.parametrize("model", ["gpt", "vq"])
def test_conversion_notices_that_a_known_model_lacks_weights(tmp_path: Path, model: str) -> None:
    """Fails if a shard is missing and the rest is converted as if it were all: no shard tells how
    many there are.
    """
    weights = load_file(ROOT / f"pretrained_models/demo_{model}.safetensors")
    folder = whole_tensors_in_shards(tmp_path / "folder", weights, 3)
    check_complete(open_checkpoint(folder))
    for shard in sorted(folder.iterdir()):
        moved = shard.rename(tmp_path / "moved")
        with pytest.raises(
            CheckpointError, match=rf"is no complete {model.upper()}-demo \(\d+ of \d+ weights"
        ):
            check_complete(open_checkpoint(folder))
        moved.rename(shard)


def test_conversion_notices_that_rows_of_a_known_model_are_missing(tmp_path: Path) -> None:
    """Fails if the last rows of all weights, which only the missing last shard had, are
    left out.
    """
    weights = load_file(ROOT / "pretrained_models/demo_gpt.safetensors")
    first_half = {name: tensor[: len(tensor) // 2].clone() for name, tensor in weights.items()}
    folder = whole_tensors_in_shards(tmp_path / "folder", first_half, 1)
    with pytest.raises(CheckpointError, match="is no complete GPT-demo"):
        check_complete(open_checkpoint(folder))


def test_conversion_takes_models_of_other_sizes_and_unknown_ones(tmp_path: Path) -> None:
    """Fails if a model is taken for a part of another one."""
    save_file(drawn_weights(tiny_gpt()), tmp_path / "unknown")
    check_complete(open_checkpoint(tmp_path / "unknown"))
    with torch.device("meta"):
        shapes = GPT_models["GPT-demo"](vocab_size=9, num_classes=3).state_dict()
    save_file(
        {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()},
        tmp_path / "other_sizes",
    )
    check_complete(open_checkpoint(tmp_path / "other_sizes"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda info: info["output.weight"].update(saved_offsets=[8, 0]), "missing or overlap"),
        (lambda info: info["output.weight"].update(saved_offsets=[0, 0]), "missing or overlap"),
        (lambda info: info["output.weight"].update(saved_offsets=[2**40, 0]), "missing or overlap"),
        (
            lambda info: info["output.weight"].update(saved_offsets=[24]),
            "where output.weight belongs",
        ),
        (
            lambda info: info["output.weight"].update(saved_offsets=[-1, 0]),
            "where output.weight belongs",
        ),
        (
            lambda info: info["output.weight"].update(saved_offsets="24"),
            "where output.weight belongs",
        ),
        (lambda info: info.update({"output.weight": 1}), "where output.weight belongs"),
        (lambda info: info.pop("output.weight"), "where output.weight belongs"),
    ],
)
def test_shards_that_do_not_cover_a_weight_are_refused(
    shards: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    """Fails if what no shard covers stays uninitialised memory, or a place that is none is used."""
    rewrite(shards / SECOND, sharding(change))
    assert told in error_of(shards)


def test_shards_of_several_kinds_are_refused(shards: Path) -> None:
    """Fails if pieces of another dtype or rank are read as if they were of the first's."""

    def halve(tensors: dict[str, Tensor], extra: dict[str, str]) -> None:
        tensors["output.weight"] = tensors["output.weight"].half()

    rewrite(shards / SECOND, halve)
    assert "the pieces of output.weight are of several kinds" in error_of(shards)


# --- names below folders ---


@pytest.mark.parametrize(
    "folder",
    [
        "",
        "model.",
        "module.",
        "app.",
        "app.model.",
        "app.module.",
        "model.module.",
        "app.state_dict.",
    ],
)
@pytest.mark.parametrize("kind", ["sharded", "safetensors"])
def test_weights_are_found_below_the_folders_that_training_uses(
    tmp_path: Path, folder: str, kind: str
) -> None:
    """Fails if {"app": AppState(...)}, as torch's examples save it, or another usual nesting is not
    read.
    """
    weights = drawn_weights(tiny_gpt())
    below = {f"{folder}{name}": tensor for name, tensor in weights.items()}
    state = folder.replace("model.", "").replace("module.", "")
    below |= {
        f"{state}optim.state.norm.weight.exp_avg": torch.zeros(32),
        f"{state}optimizer.0.step": torch.zeros(()),
    }
    if kind == "sharded":
        dcp.save(below, checkpoint_id=tmp_path / "weights", no_dist=True)
    else:
        save_file(below, tmp_path / "weights")
    assert_loads(tmp_path / "weights", weights)


class AppState:
    """As torch's tutorial of distributed checkpoints has it."""

    def __init__(self, weights: dict[str, Tensor], averaged: dict[str, Tensor]) -> None:
        self.weights, self.averaged = weights, averaged

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.weights,
            "ema": self.averaged,
            "optim": {"state": {"norm.weight": {"step": torch.zeros(())}}},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def test_the_state_of_an_application_is_read(tmp_path: Path) -> None:
    """Fails if the pattern that torch's documentation teaches cannot be read, with its averages."""
    weights, averaged = drawn_weights(tiny_gpt()), drawn_weights(tiny_gpt(), seed=1)
    dcp.save({"app": AppState(weights, averaged)}, checkpoint_id=tmp_path / "weights", no_dist=True)
    assert_loads(tmp_path / "weights", weights)
    assert_loads(tmp_path / "weights", averaged, ema=True)


@pytest.mark.parametrize(
    ("one", "other"), [("model", "app.model"), ("model", "module"), ("app.model", "app.module")]
)
def test_several_sets_of_weights_are_named_and_none_is_chosen(
    tmp_path: Path, one: str, other: str
) -> None:
    """Fails if one of two sets is taken without a word."""
    weights = drawn_weights(tiny_gpt())
    both = {
        f"{folder}.{name}": tensor.clone()
        for folder in (one, other)
        for name, tensor in weights.items()
    }
    save_file(both, tmp_path / "weights")
    message = error_of(tmp_path / "weights")
    assert "several sets of weights" in message
    assert one in message
    assert other in message

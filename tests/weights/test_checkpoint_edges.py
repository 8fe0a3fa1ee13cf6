"""Checkpoints at the edges of what is read: rare dtypes, hidden files, odd keys, failures while a
weight is read.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import CPU, assert_loads, drawn_weights, error_of, on_meta, tiny_gpt
from test_hostile_checkpoints import deep_key, nested, safetensors, torch_zip, with_key
from test_safetensors_folders import hugging_face
from torch import Tensor

from autoregressive.files import unused_name
from autoregressive.weights import safetensors_file
from autoregressive.weights.checkpoint import CheckpointError, load_weights, open_checkpoint
from autoregressive.weights.stored_tensor import StoredTensor

ALL_DTYPES = sorted({str(value) for value in vars(torch).values() if type(value) is torch.dtype})


@pytest.mark.parametrize("kind", ALL_DTYPES)
def test_each_dtype_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    """Fails if a dtype that torch cannot convert is a traceback while the weights are read."""
    dtype, weights = getattr(torch, kind.removeprefix("torch.")), drawn_weights(tiny_gpt())
    try:
        weights["norm.weight"] = torch.empty(32, dtype=dtype)
        torch.save(weights, tmp_path / "weights.pt")
    except (RuntimeError, KeyError):
        pytest.skip("torch cannot save it")
    if dtype.is_floating_point and dtype is not torch.float4_e2m1fn_x2:
        model = on_meta(tiny_gpt)
        load_weights(model, tmp_path / "weights.pt", device=CPU, dtype=torch.bfloat16)
    else:
        assert "norm.weight" in error_of(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (NotImplementedError("copy"), CheckpointError),
        (RuntimeError("stride"), CheckpointError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError),
    ],
)
def test_a_failure_while_a_weight_is_read_is_one_line_unless_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, raised: type[Exception]
) -> None:
    """Fails if what no check foresaw is a traceback, or if too little memory is called a damaged
    file.
    """
    torch.save(drawn_weights(tiny_gpt()), tmp_path / "weights.pt")

    def fail(self: StoredTensor, target: Tensor) -> None:
        raise failure

    monkeypatch.setattr(StoredTensor, "read_into", fail)
    with pytest.raises(raised) as caught:
        load_weights(on_meta(tiny_gpt), tmp_path / "weights.pt", device=CPU, dtype=torch.float32)
    assert isinstance(caught.value, CheckpointError) == (raised is CheckpointError)


@pytest.mark.parametrize("lack", [RuntimeError("invalid size"), MemoryError()])
def test_a_view_that_is_larger_than_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: Exception
) -> None:
    """Fails if the memory for a tensor with strides is not there, and that is a traceback."""
    torch.save({"norm.weight": torch.zeros(8, 8).t()}, tmp_path / "weights.pt")
    source, target = open_checkpoint(tmp_path / "weights.pt"), torch.empty(8, 8)

    def fail(*size: int, dtype: torch.dtype) -> Tensor:
        raise lack

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(CheckpointError, match="takes 256 bytes of memory to read"):
        source.read_into("norm.weight", target)


# --- folders ---


def test_hidden_files_are_no_parts_of_a_folder(tmp_path: Path) -> None:
    """Fails if an unfinished file of a killed process, or macOS's note on a file, is taken for
    weights.
    """
    weights = drawn_weights(tiny_gpt())
    for folder in (tmp_path / "one", tmp_path / "parts"):
        if folder.name == "one":
            folder.mkdir()
            save_file(weights, folder / "model.safetensors")
        else:
            hugging_face(folder)
        unused_name(folder, ".safetensors", "model.safetensors").write_bytes(b"half of it")
        (folder / "._model.safetensors").write_bytes(b"Mac OS X")
        (folder / "._model.safetensors.index.json").write_bytes(b"Mac OS X")
        assert_loads(folder, weights)


def test_a_folder_of_hidden_files_has_no_checkpoint(tmp_path: Path) -> None:
    """Fails if an unfinished file alone is taken for a damaged checkpoint."""
    unused_name(tmp_path, ".safetensors").write_bytes(b"half of it")
    (tmp_path / "._0_0.distcp").write_bytes(b"Mac OS X")
    assert "is a directory without a checkpoint" in error_of(tmp_path)


def test_files_that_the_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    """Fails if a folder with the weights in two formats, as some repositories have it, is
    refused.
    """
    folder = hugging_face(tmp_path / "folder")
    (folder / "consolidated.safetensors").write_bytes(b"another format")
    assert_loads(folder, drawn_weights(tiny_gpt()))


# --- small things in files ---


def test_metadata_of_null_is_none(tmp_path: Path) -> None:
    """Fails if a header that the library reads is called damaged."""
    path = safetensors(tmp_path / "w.safetensors", {"__metadata__": None})
    assert open_checkpoint(path).shapes == {}


@pytest.mark.parametrize("pickled", [with_key((1,) * 9), with_key(nested(3)), deep_key(3)])
def test_keys_that_no_checkpoint_needs_are_not_called_damage(
    tmp_path: Path, pickled: bytes
) -> None:
    """Fails if the user is sent to download a file again that is as it was saved."""
    message = error_of(torch_zip(tmp_path / "weights.pt", pickled))
    assert "it has a name that is no text, but one tuple" in message
    assert "damaged" not in message


def test_a_long_path_is_cut_in_its_middle(tmp_path: Path) -> None:
    """Fails if a message has more than 500 characters, or hides where the path begins or ends."""
    path = tmp_path / ("d" * 200) / ("e" * 200) / "weights.pt"
    message = str(CheckpointError(path, "is damaged; " + "x" * 600))
    assert len(message) == 500
    assert message.startswith(str(tmp_path)[:100])
    assert "eeee/weights.pt: is damaged" in message


def test_a_process_that_held_nothing_leaves_no_file(tmp_path: Path) -> None:
    """Fails if a folder is refused for a number that torch left out: it writes no file for a rank
    without weights.
    """
    weights = drawn_weights(tiny_gpt())
    info = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in weights.items()}
    name = "shard-00002-model-00001-of-00001.safetensors"
    save_file(weights, tmp_path / name, {"DCP_SHARDING_INFO": json.dumps(info)})
    assert_loads(tmp_path, weights)
    shutil.copy(tmp_path / name, tmp_path / name.replace("00002", "00004"))
    assert "missing or overlap" in error_of(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_an_empty_part_of_a_view_is_no_damage(tmp_path: Path, zipped: bool) -> None:
    """Fails if an empty tensor that begins behind the end of its storage is refused; torch.load
    takes it.
    """
    tensors = {"empty": torch.empty(0, 5)[:, 2:], "rest": torch.ones(3)[3:], "whole": torch.ones(3)}
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    shapes = open_checkpoint(tmp_path / "x.pt").shapes
    assert shapes == {"empty": (0, 3), "rest": (0,), "whole": (3,)}


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        (torch.ones(2), "holds a tensor, not"),
        ([torch.ones(2)], "holds a list, not"),
        ({3: torch.ones(2)}, "a name that is no text, but one int"),
    ],
)
def test_what_else_was_saved_is_named_plainly(tmp_path: Path, saved: object, told: str) -> None:
    """Fails if the message has a function's name in it instead of what the user saved."""
    torch.save(saved, tmp_path / "x.pt")
    assert told in error_of(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("F8_E4M3FNUZ", torch.float8_e4m3fnuz),
        ("F8_E5M2FNUZ", torch.float8_e5m2fnuz),
        ("F8_E8M0", torch.float8_e8m0fnu),
    ],
)
def test_rare_dtypes_of_safetensors_are_read(tmp_path: Path, code: str, kind: torch.dtype) -> None:
    """Fails if a dtype that the library writes is called damage, or read as another one."""
    numbers = bytes(range(1, 101))
    header = {"a": {"dtype": code, "shape": [100], "data_offsets": [0, 100]}}
    source = open_checkpoint(safetensors(tmp_path / "x.safetensors", header, numbers))
    target = torch.empty(100)
    source.read_into("a", target)
    assert torch.equal(target, torch.tensor(list(numbers), dtype=torch.uint8).view(kind).float())
    assert source.dtypes["a"] == kind


def test_a_folder_of_large_headers_is_refused_early(tmp_path: Path) -> None:
    """Fails if many files, each with as many tensors as one may have, take minutes and a GiB."""
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    for number in range(3):
        header = {f"{number}_{place}": empty for place in range(1000)}
        safetensors(tmp_path / f"{number}.safetensors", header)
    read: list[str] = []

    def counted(path: Path) -> safetensors_file.SafetensorsFile:
        read.append(path.name)
        return read_safetensors(path)

    read_safetensors = safetensors_file.read_safetensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "read_safetensors", counted)
        patch.setattr(safetensors_file, "_MOST_FOLDER_JSON_BYTES", 100_000)
        with pytest.raises(
            CheckpointError, match="describes its tensors in more than 100,000 bytes"
        ):
            open_checkpoint(tmp_path)
    assert read == ["0.safetensors", "1.safetensors"]


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_a_directory_in_a_files_place_is_called_one(tmp_path: Path, name: str) -> None:
    """Fails if the message says that a directory is none."""
    folder = hugging_face(tmp_path / "folder")
    (folder / name).unlink()
    (folder / name).mkdir()
    assert f"{name}: is a directory where a file is needed" in error_of(folder)

"""Checkpoint files: every kind loads exactly, and whatever is damaged, hostile or another model's
ends in one line.
"""

import argparse
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from autoregressive.cli.command import flag_of
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.weights.checkpoint import CheckpointError, load_weights
from tokenizer.tokenizer_image.vq_model import VQ_models, VQConfig, VQModel

Weights = dict[str, Tensor]
CPU = torch.device("cpu")


def tiny_gpt(**changes: int) -> Transformer:
    sizes = {
        "dim": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 48,
        "block_size": 16,
        "num_classes": 10,
        "multiple_of": 16,
    }
    return Transformer(GPTConfig(**{**sizes, **changes}))  # type: ignore[arg-type]


def tiny_vq(**changes: int) -> VQModel:
    sizes = {
        "codebook_size": 32,
        "codebook_embed_dim": 4,
        "ch": 32,
        "num_res_blocks": 1,
        "z_channels": 32,
    }
    return VQModel(VQConfig(ch_mult=(1, 1), **{**sizes, **changes}))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def drawn_weights(model: nn.Module, seed: int = 0) -> Weights:
    weights = {}
    for name, tensor in model.state_dict().items():
        generator = torch.Generator().manual_seed(seed * 1000003 + zlib.crc32(name.encode()))
        weights[name] = torch.randn(tensor.shape, generator=generator)
    return weights


def assert_loads(
    path: Path,
    weights: Weights,
    build: Callable[[], nn.Module] = tiny_gpt,
    dtype: torch.dtype = torch.float32,
    ema: bool = False,
    from_fsdp: bool = False,
) -> nn.Module:
    model = on_meta(build)
    load_weights(model, path, device=CPU, dtype=dtype, ema=ema, from_fsdp=from_fsdp)
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in state.items():
        assert tensor.device == CPU
        assert tensor.dtype == dtype
        assert torch.equal(tensor, weights[name].to(dtype)), name
    return model


def error_of(
    path: Path,
    build: Callable[[], nn.Module] = tiny_gpt,
    ema: bool = False,
    from_fsdp: bool = False,
) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(
            on_meta(build), path, device=CPU, dtype=torch.float32, ema=ema, from_fsdp=from_fsdp
        )
    message = caught.value.spelled(flag_of)
    assert "\n" not in message
    assert str(path) in message
    return message


# --- kinds ---


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod."]
)
def test_wrappers_and_prefixes_change_no_weight(
    tmp_path: Path, wrapper: str | None, prefix: str
) -> None:
    weights = drawn_weights(tiny_gpt())
    prefixed = {prefix + name: tensor for name, tensor in weights.items()}
    path = tmp_path / "weights.pt"
    torch.save({wrapper: prefixed} if wrapper else prefixed, path)
    assert_loads(path, weights)


def test_marks_of_wrapped_submodules_are_removed_inside_names_too(tmp_path: Path) -> None:
    weights = drawn_weights(tiny_gpt())
    marked = {
        name.replace("layers.0.", "layers.0._fsdp_wrapped_module._orig_mod."): x
        for name, x in weights.items()
    }
    torch.save(marked, tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", weights)


def test_two_names_for_one_weight_are_refused_rather_than_one_chosen(tmp_path: Path) -> None:
    weights = drawn_weights(tiny_gpt())
    torch.save({**weights, "module.norm.weight": torch.ones(32)}, tmp_path / "weights.pt")
    assert "holds norm.weight twice" in error_of(tmp_path / "weights.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_arrive_in_the_dtype_asked_for_and_the_rotary_table_stays_float32(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    torch.save(drawn_weights(tiny_gpt()), tmp_path / "weights.pt")
    model = assert_loads(tmp_path / "weights.pt", drawn_weights(tiny_gpt()), dtype=dtype)
    assert isinstance(model, Transformer)
    assert torch.equal(model.freqs_cis, tiny_gpt().freqs_cis)
    assert model.freqs_cis.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_load(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = drawn_weights(tiny_gpt())
    save_file(weights, tmp_path / "any_name")  # the kind is found by looking
    assert_loads(tmp_path / "any_name", weights, dtype=dtype)


def test_files_of_old_torch_load_though_they_cannot_be_mapped(tmp_path: Path) -> None:
    weights = drawn_weights(tiny_gpt())
    torch.save({"model": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_loads(tmp_path / "old.pt", weights)


def test_directory_with_consolidated_weights_loads(tmp_path: Path) -> None:
    weights = drawn_weights(tiny_gpt())
    torch.save(weights, tmp_path / "consolidated.pth")
    torch.save({"state": {}}, tmp_path / "optimizer.00000-of-00001.pth")
    (tmp_path / "resume_step.txt").write_text("5000")
    assert_loads(tmp_path, weights, from_fsdp=True)


def llamagen_training_file(path: Path) -> tuple[Weights, Weights]:
    weights, averaged = drawn_weights(tiny_vq()), drawn_weights(tiny_vq(), seed=1)
    torch.save(
        {
            "model": weights,
            "ema": averaged,
            "optimizer": {
                "state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}},
                "param_groups": [{"lr": 1e-4}],
            },
            "discriminator": {"main.0.weight": torch.zeros(2)},
            "optimizer_disc": {"state": {}, "param_groups": []},
            "steps": 5000,
            "args": argparse.Namespace(
                vq_model="VQ-16", lr=1e-4, betas=[0.9, 0.95], ema=True, vq_ckpt=None
            ),
        },
        path,
    )
    return weights, averaged


def test_training_checkpoint_gives_its_weights_and_with_ema_the_averaged_ones(
    tmp_path: Path,
) -> None:
    weights, averaged = llamagen_training_file(tmp_path / "0005000.pt")
    assert_loads(tmp_path / "0005000.pt", weights, tiny_vq)
    assert_loads(tmp_path / "0005000.pt", averaged, tiny_vq, ema=True)


@pytest.mark.parametrize("kind", ["flat", "wrapped", "safetensors"])
def test_ema_is_an_error_where_there_is_none_and_never_the_plain_weights(
    tmp_path: Path, kind: str
) -> None:
    weights, path = drawn_weights(tiny_gpt()), tmp_path / "weights"
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights if kind == "flat" else {"model": weights}, path)
    assert "leave out --ema" in error_of(path, ema=True)


def test_from_fsdp_is_accepted_for_flat_weights_and_refused_for_wrapped_ones(
    tmp_path: Path,
) -> None:
    weights = drawn_weights(tiny_gpt())
    torch.save(weights, tmp_path / "flat.pt")
    torch.save({"model": weights}, tmp_path / "wrapped.pt")
    assert_loads(tmp_path / "flat.pt", weights, from_fsdp=True)
    assert "leave out --from-fsdp" in error_of(tmp_path / "wrapped.pt", from_fsdp=True)


def test_from_fsdp_is_accepted_for_safetensors_which_cannot_tell(tmp_path: Path) -> None:
    weights = drawn_weights(tiny_gpt())
    save_file(weights, tmp_path / "weights.safetensors")
    assert_loads(tmp_path / "weights.safetensors", weights, from_fsdp=True)


def test_loaded_weights_do_not_change_with_the_file(tmp_path: Path) -> None:
    """Same dtype, same device: a mapped tensor kept as the parameter would follow later writes to
    the file.
    """
    weights, path = drawn_weights(tiny_gpt()), tmp_path / "weights.pt"
    torch.save(weights, path)
    model = assert_loads(path, weights)
    with path.open("r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


# --- what is tolerated ---


def test_tables_that_are_computed_here_and_a_missing_code_log_are_tolerated(tmp_path: Path) -> None:
    gpt, vq = drawn_weights(tiny_gpt()), drawn_weights(tiny_vq())
    torch.save(
        {**gpt, "freqs_cis": torch.zeros(3), "causal_mask": torch.ones(2, 2, dtype=torch.bool)},
        tmp_path / "g.pt",
    )
    assert_loads(tmp_path / "g.pt", gpt)
    del vq["quantize.codebook_used"]
    torch.save({"model": vq}, tmp_path / "v.pt")
    assert_loads(tmp_path / "v.pt", {**vq, "quantize.codebook_used": torch.zeros(65536)}, tiny_vq)


def test_a_stray_code_log_is_tolerated_in_any_file(tmp_path: Path) -> None:
    weights = drawn_weights(tiny_gpt())
    torch.save({**weights, "quantize.codebook_used": torch.zeros(5)}, tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", weights)


# --- strictness ---


def test_missing_unexpected_and_misshaped_weights_are_named(tmp_path: Path) -> None:
    weights = drawn_weights(tiny_gpt())
    del weights["layers.1.ffn_norm.weight"]
    weights["layers.0.attention.bias"] = torch.zeros(3)
    weights["norm.weight"] = torch.zeros(31)
    torch.save(weights, tmp_path / "weights.pt")
    message = error_of(tmp_path / "weights.pt")
    assert "1 of 18 weights are missing: layers.1.ffn_norm.weight" in message
    assert "1 are unexpected: layers.0.attention.bias" in message
    assert "norm.weight is [31] and should be [32]" in message


def test_a_long_list_of_missing_weights_is_cut(tmp_path: Path) -> None:
    torch.save({"norm.weight": torch.zeros(32)}, tmp_path / "weights.pt")
    message = error_of(tmp_path / "weights.pt")
    assert "and 14 more" in message
    assert len(message) < 400 + len(str(tmp_path))


def test_whole_numbers_are_not_taken_for_weights(tmp_path: Path) -> None:
    weights = drawn_weights(tiny_gpt())
    weights["norm.weight"] = torch.ones(32, dtype=torch.int64)
    torch.save(weights, tmp_path / "weights.pt")
    assert "norm.weight is int64" in error_of(tmp_path / "weights.pt")


def hollow(model: nn.Module) -> Weights:
    """Weights of the right shapes that take no room on disk."""
    return {
        name: torch.zeros(()).expand(tensor.shape) for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("there", "asked", "message"),
    [
        (
            "GPT-B",
            "GPT-L",
            "this is GPT-B (12 layers, width 768); you asked for GPT-L: use --gpt-model GPT-B",
        ),
        (
            "GPT-XL",
            "GPT-B",
            "this is GPT-XL (36 layers, width 1280); you asked for GPT-B: use --gpt-model GPT-XL",
        ),
        ("GPT-demo", "GPT-B", "this is GPT-demo (8 layers, width 256); you asked for GPT-B"),
        (
            "VQ-16",
            "VQ-8",
            "this is VQ-16 (a tokenizer of 16 x 16 pixels a code); you asked for VQ-8: use "
            "--vq-model VQ-16",
        ),
        (
            "VQ-8",
            "VQ-16",
            "this is VQ-8 (a tokenizer of 8 x 8 pixels a code); you asked for VQ-16: use "
            "--vq-model VQ-8",
        ),
        (
            "VQ-16",
            "GPT-B",
            "you asked for GPT-B: --vq-ckpt takes this file, --gpt-ckpt takes another",
        ),
        (
            "GPT-B",
            "VQ-16",
            "you asked for VQ-16: --gpt-ckpt takes this file, --vq-ckpt takes another",
        ),
    ],
)
def test_weights_of_another_model_say_whose_they_are(
    tmp_path: Path, there: str, asked: str, message: str
) -> None:
    builders: dict[str, Callable[..., nn.Module]] = {**GPT_models, **VQ_models}
    torch.save({"model": hollow(on_meta(builders[there]))}, tmp_path / "weights.pt")
    assert message in error_of(tmp_path / "weights.pt", builders[asked])


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"num_classes": 7}, "use --num-classes 7"),
        ({"vocab_size": 24}, "use --codebook-size 24"),
        ({"num_classes": 7, "vocab_size": 24}, "use --num-classes 7 --codebook-size 24"),
    ],
)
def test_transformers_of_other_sizes_name_the_flags(
    tmp_path: Path, changes: dict[str, int], flags: str
) -> None:
    torch.save(drawn_weights(tiny_gpt(**changes)), tmp_path / "weights.pt")
    assert error_of(tmp_path / "weights.pt").endswith(flags)


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"codebook_size": 16}, "use --codebook-size 16"),
        ({"codebook_embed_dim": 8}, "use --codebook-embed-dim 8"),
        (
            {"codebook_size": 16, "codebook_embed_dim": 8},
            "use --codebook-size 16 --codebook-embed-dim 8",
        ),
    ],
)
def test_tokenizers_of_other_sizes_name_the_flags(
    tmp_path: Path, changes: dict[str, int], flags: str
) -> None:
    torch.save(drawn_weights(tiny_vq(**changes)), tmp_path / "weights.pt")
    assert error_of(tmp_path / "weights.pt", tiny_vq).endswith(flags)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cls_embedding.embedding_table.weight", (0, 32)),
        ("cls_embedding.embedding_table.weight", (1, 32)),
        ("tok_embeddings.weight", (0, 32)),
    ],
)
def test_sizes_that_no_model_has_are_not_advised_as_flags(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    torch.save({**drawn_weights(tiny_gpt()), name: torch.zeros(shape)}, tmp_path / "weights.pt")
    message = error_of(tmp_path / "weights.pt")
    assert f"{name} is {list(shape)} and should be" in message
    assert "--num-classes" not in message
    assert "--codebook-size" not in message


def test_text_to_image_weights_are_refused_in_words(tmp_path: Path) -> None:
    weights = drawn_weights(tiny_gpt())
    del weights["cls_embedding.embedding_table.weight"]
    weights["cls_embedding.cap_proj.fc1.weight"] = torch.zeros(2, 2)
    torch.save(weights, tmp_path / "t2i.pt")
    assert "text-to-image" in error_of(tmp_path / "t2i.pt")


# --- damaged, hostile, or no checkpoint at all ---


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_program_is_not_run_and_no_careless_loading_is_advised(
    tmp_path: Path,
) -> None:
    torch.jit.save(torch.jit.trace(nn.Identity(), torch.zeros(1)), tmp_path / "program.pt")
    assert error_of(tmp_path / "program.pt").endswith(
        "is a TorchScript program, which is code; a file of weights is needed"
    )


def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "No such file" in error_of(tmp_path / "missing.pt")
    assert "is an empty directory" in error_of(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "is a directory without a checkpoint" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is a text", "is not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (struct.pack("<Q", 2**60) + b'{"a"', "is damaged or cut short"),
        (b"PK\x03\x04" + bytes(100), "is damaged or cut short"),
        (b"\x80\x02" + bytes(100), "is damaged"),
        (pickle.dumps([1, 2, 3]), "is damaged"),
    ],
)
def test_other_files_are_told_from_checkpoints(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    assert message in error_of(tmp_path / "weights.pt")


def test_a_picture_and_a_list_are_no_checkpoints(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    assert "is not a checkpoint" in error_of(tmp_path / "picture.png")
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    assert "holds a list" in error_of(tmp_path / "list.pt")
    torch.save({"model": {"norm.weight": "text"}}, tmp_path / "text.pt")
    assert "'norm.weight' is no plain tensor" in error_of(tmp_path / "text.pt")


@pytest.mark.parametrize("kind", ["pt", "old pt", "safetensors"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
def test_a_file_cut_short_never_loads(tmp_path: Path, kind: str, kept: float) -> None:
    weights, path = drawn_weights(tiny_gpt()), tmp_path / "weights"
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "pt")
    os.truncate(path, int(path.stat().st_size * kept))
    assert "is damaged" in error_of(path)


class Hostile:
    """Unpickled freely, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def hostile_file(path: Path, mark: Path, kind: str) -> Path:
    weights = {"model": drawn_weights(tiny_gpt()), "args": Hostile(mark)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(weights["args"], protocol=2))
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    return path


HOSTILE_KINDS = ["zip", "old", "bare pickle"]


@pytest.mark.parametrize("kind", HOSTILE_KINDS)
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    path = hostile_file(tmp_path / "weights.pt", tmp_path / "executed", kind)
    message = error_of(path)
    assert "could run code" in message
    assert "mkdir" in message
    assert not (tmp_path / "executed").exists()
    # The file is hostile indeed: read without care, it executes.
    if kind != "bare pickle":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert (tmp_path / "executed").exists()


# Loads one path after the other, and prints with which status a command would have ended.
PROGRAM = """
import sys
from pathlib import Path
import torch
from autoregressive.weights.checkpoint import load_weights
from autoregressive.cli.command import run_command
from autoregressive.models.gpt import GPT_models
with torch.device("meta"):
    model = GPT_models["GPT-demo"]()
for path in sys.argv[1:]:
    try:
        cpu = torch.device("cpu")
        run_command(lambda: load_weights(model, Path(path), device=cpu, dtype=torch.float32))
    except SystemExit as ended:
        print(ended.code)
"""


def test_empty_weights_and_an_impossible_path_are_one_line(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "empty.pt")
    assert "holds no weights" in error_of(tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_weights(on_meta(tiny_gpt), tmp_path / ("long" * 100), device=CPU, dtype=torch.float32)
    assert len(str(caught.value)) <= 500


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "pipe.pt")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert finished.stdout == "2\n", finished.stderr
    assert "is neither a file nor a directory" in finished.stderr


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_name_that_is_no_utf_8_is_not_called_damage(tmp_path: Path, kind: str) -> None:
    weights, path = drawn_weights(tiny_gpt()), tmp_path / "weights"
    if kind == "pt":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    odd = path.rename(tmp_path / os.fsdecode(b"\xff.pt"))
    assert error_of(odd).endswith("is not UTF-8; rename it")


def test_attributes_that_a_pickle_gives_its_parameters_are_never_called(tmp_path: Path) -> None:
    weights = drawn_weights(tiny_gpt())
    parameter = nn.Parameter(weights["norm.weight"])
    parameter.detach = "text"  # type: ignore[assignment, method-assign]
    torch.save({**weights, "norm.weight": parameter}, tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", weights)

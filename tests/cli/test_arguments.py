"""Flags: what was not typed follows the chosen model, what was typed is checked, and all that
before any long work.
"""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
from refusals import refused

from autoregressive.cli.command import OneLineParser, flag_of
from autoregressive.cli.drawing import Settings, find_weights_and_warn, resolve_settings
from autoregressive.cli.flags import build_parser, model_options
from autoregressive.devices import resolve_device
from autoregressive.errors import Change, UserError
from autoregressive.weights.finding import (
    FoundWeights,
    find_weights,
    missing_weights,
    smaller_precision,
)
from autoregressive.weights.options import chosen_classes
from autoregressive.weights.published import DEMO_GPT, DEMO_VQ, PublishedFile


def parsed(*typed: str) -> argparse.Namespace:
    """What the parser makes of a command line."""
    return build_parser("purpose", "command.py").parse_args(typed)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of pretrained models; the current folder is empty and writable."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").mkdir()
    return tmp_path / "pretrained"


def resolved(folder: Path, *typed: str) -> Settings:
    """The settings of a command line that looks for weights in this folder."""
    return resolve_settings(parsed("--pretrained-dir", str(folder), *typed))


def test_nothing_typed_means_the_demo_model_where_gpt_b_is_not_there(folder: Path) -> None:
    """Fails if a fresh checkout does not run its own model with its own shapes."""
    settings = resolved(folder)
    model = settings.model
    assert (model.gpt_model, model.vq_model, model.image_size, model.downsample_size) == (
        "GPT-demo",
        "VQ-demo",
        128,
        8,
    )
    assert (model.codebook_size, model.codebook_embed_dim, model.num_classes) == (1024, 8, 64)
    assert (model.grid, model.tokens_per_image) == (16, 256)
    assert settings.labels == tuple(range(8))


def test_a_bare_checkpoint_name_may_be_in_the_folder_of_pretrained_models(folder: Path) -> None:
    """Fails if what download_models.py fetched is not found under the name that it was
    fetched by.
    """
    (folder / "c2i_XL_384.pt").touch()
    typed = ["--gpt-model", "GPT-XL", "--gpt-ckpt", "c2i_XL_384.pt"]
    assert resolved(folder, *typed).model.gpt_ckpt == folder / "c2i_XL_384.pt"
    Path("c2i_XL_384.pt").touch()
    assert resolved(folder, *typed).model.gpt_ckpt == Path("c2i_XL_384.pt"), (
        "the current folder comes first"
    )
    for missing in ("vq_ds16_c2i.pt", "elsewhere/c2i_XL_384.pt"):
        with refused(
            match="no such file or folder.*; leave out --vq-ckpt and add --download",
        ):
            resolved(folder, "--gpt-model", "GPT-XL", "--vq-ckpt", missing)
    with refused(match=r"there is no such file or folder, nor in [^;]*$"):
        resolved(folder, "--gpt-model", "GPT-XL", "--gpt-ckpt", "mine.pt")


def test_the_warning_names_the_sizes_that_are_published(folder: Path) -> None:
    """Fails if the user of a size without weights is not told that another has some."""
    model = resolved(folder, "--gpt-model", "GPT-XL", "--image-size", "256").model
    missing = missing_weights(model, find_weights(model))
    assert missing is not None
    assert "there are some for 384 px" in missing.spelled(flag_of)


def test_defaults_are_llamagens_for_its_models(folder: Path) -> None:
    """Fails if LlamaGen's command without flags would draw something else."""
    settings = resolved(folder, "--gpt-model", "GPT-XL")
    model, sampling = settings.model, settings.sampling
    assert (model.gpt_model, model.vq_model, model.image_size, model.downsample_size) == (
        "GPT-XL",
        "VQ-16",
        384,
        16,
    )
    assert (model.codebook_size, model.codebook_embed_dim, model.num_classes) == (16384, 8, 1000)
    assert dataclasses.astuple(sampling) == (4.0, -1, 1.0, 2000, 1.0, 0, 1)
    assert settings.labels == (207, 360, 387, 974, 88, 979, 417, 279)
    assert not settings.compile


def test_precision_is_bf16_on_a_gpu_and_float32_on_a_cpu_unless_typed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a CPU runs slow bf16 unasked, a GPU does not run LlamaGen's bf16, or the typed
    precision is ignored.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert resolved(folder).model.precision == torch.bfloat16
    assert resolved(folder).model.note is None
    assert resolved(folder).model.device == torch.device("cuda:0")
    assert resolved(folder, "--device", "cuda:1").model.device == torch.device("cuda:1")
    assert resolved(folder, "--device", "cpu").model.precision == torch.float32
    assert (
        resolved(folder, "--device", "cpu", "--precision", "bf16").model.precision == torch.bfloat16
    )
    assert resolved(folder, "--precision", "none").model.precision == torch.float32
    with refused(match="cuda:0 to cuda:1"):
        resolved(folder, "--device", "cuda:2")


def test_a_gpu_without_bf16_runs_in_fp16_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an older GPU, such as a T4, is given bf16, which it does not compute in, or changes
    to fp16 in silence.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    settings = resolved(folder)
    assert settings.model.precision == torch.float16
    assert (
        settings.model.note
        == "cuda:0 has compute capability 7.5, and bf16 takes 8.0: the transformer runs in fp16"
    )
    for typed, precision in (("fp16", torch.float16), ("none", torch.float32)):
        settings = resolved(folder, "--precision", typed)
        assert (settings.model.precision, settings.model.note) == (precision, None)
    assert smaller_precision(settings.model) == [Change("use", "precision", "fp16")]
    match = r"^--precision bf16: cuda:0 has .* 7\.5, and bf16 takes 8\.0; use fp16 or none$"
    with refused(match):
        resolved(folder, "--precision", "bf16")
    assert (
        resolved(folder, "--device", "cpu", "--precision", "bf16").model.precision == torch.bfloat16
    )


@pytest.mark.parametrize(
    ("there", "typed", "expected"),
    [
        ([], [], ("GPT-demo", 128)),
        (["c2i_B_256.pt"], [], ("GPT-B", 256)),
        (["c2i_B_384.pt"], [], ("GPT-B", 384)),
        (["c2i_B_256.pt", "c2i_B_384.pt"], [], ("GPT-B", 384)),
        (["c2i_B_256.safetensors"], [], ("GPT-B", 256)),
        (["c2i_L_256.pt"], [], ("GPT-demo", 128)),
        (["c2i_L_256.pt"], ["--gpt-model", "GPT-L"], ("GPT-L", 256)),
        (["c2i_L_256.pt"], ["--gpt-model", "GPT-L", "--random-weights"], ("GPT-L", 384)),
        (["c2i_B_256.pt"], ["--image-size", "256"], ("GPT-B", 256)),
        (["c2i_B_256.pt"], ["--gpt-model", "GPT-demo"], ("GPT-demo", 128)),
        ([], ["--download"], ("GPT-B", 384)),
        ([], ["--gpt-ckpt", "c2i_B_256.pt"], ("GPT-B", 256)),
        ([], ["--gpt-ckpt", "c2i_3B_384.pt"], ("GPT-3B", 384)),
        ([], ["--gpt-ckpt", "mine.pt"], ("GPT-B", 384)),
        ([], ["--gpt-ckpt", DEMO_GPT], ("GPT-demo", 128)),
        (["c2i_B_256.pt"], ["--gpt-ckpt", "mine.pt"], ("GPT-B", 384)),
    ],
)
def test_model_and_size_follow_the_weights(
    folder: Path, there: list[str], typed: list[str], expected: tuple[str, int]
) -> None:
    """Fails if weights that are there are not used, or are used at a size that they were not
    trained for.
    """
    for name in there:
        (folder / name).touch()
    if "--gpt-ckpt" in typed:
        Path(typed[typed.index("--gpt-ckpt") + 1]).touch()
    model = resolved(folder, *typed).model
    assert (model.gpt_model, model.image_size) == expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], ("VQ-16", 16)),
        (["--downsample-size", "8"], ("VQ-8", 8)),
        (["--vq-model", "VQ-8"], ("VQ-8", 8)),
        (["--vq-ckpt", "vq_ds8_c2i.pt"], ("VQ-8", 8)),
        (["--vq-model", "VQ-16", "--downsample-size", "16"], ("VQ-16", 16)),
    ],
)
def test_tokenizer_and_downsample_size_agree(
    folder: Path, typed: list[str], expected: tuple[str, int]
) -> None:
    """Fails if the picture would come out larger or smaller than --image-size."""
    Path("vq_ds8_c2i.pt").touch()
    model = resolved(folder, "--gpt-model", "GPT-B", *typed).model
    assert (model.vq_model, model.downsample_size) == expected


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("--temperature -0.1", "--temperature -0.1: must be 0 (greedy) to 1e+38"),
        ("--temperature 1e39", "--temperature 1e+39: must be 0 (greedy) to 1e+38"),
        ("--temperature nan", "--temperature nan"),
        ("--temperature inf", "--temperature inf"),
        ("--top-p 0", "--top-p 0.0: must be above 0 and at most 1"),
        ("--top-p 1.01", "--top-p 1.01"),
        ("--top-p nan", "--top-p nan"),
        ("--top-k -1", "--top-k -1: must be 0 "),
        (f"--top-k {2**31}", "0 (all) to 2**31 - 1"),
        ("--cfg-scale -1", "--cfg-scale -1.0: must be 0 to 1000"),
        ("--cfg-scale inf", "--cfg-scale inf"),
        ("--cfg-scale nan", "--cfg-scale nan"),
        ("--cfg-scale 1e300", "must be 0 to 1000"),
        ("--cfg-interval -2", "--cfg-interval -2: must be -1 (all) to"),
        ("--seed -1", "--seed -1: must be 0 to"),
        (f"--seed {2**63}", "--seed"),
        ("--image-size 300", "--image-size 300: must be 128"),
        ("--image-size 384 --gpt-model GPT-demo", "--image-size 384: must be 128 for GPT-demo"),
        ("--image-size 300 --gpt-model GPT-B", "256, 384 or 512"),
        ("--image-size 384 --gpt-ckpt c2i_B_256.pt", "c2i_B_256.pt makes pictures of 256 px"),
        ("--downsample-size 4 --gpt-model GPT-B", "--downsample-size 4: must be 8 or 16"),
        ("--downsample-size 8 --vq-model VQ-16 --gpt-model GPT-B", "must be 16 for VQ-16"),
        ("--cls-token-num 2", "--cls-token-num 2: must be 1"),
        ("--num-classes 0", "--num-classes 0: must be 1 to 1000000"),
        ("--codebook-size 0", "--codebook-size 0"),
        ("--num-classes 3000000000", "must be 1 to 1000000"),
        ("--codebook-size 3000000000", "must be 1 to 1000000"),
        ("--codebook-embed-dim 3000000000", "must be 1 to 1000000"),
        ("--gpt-type t2i", "text to image is not supported"),
        ("--device cuda", "no GPU here"),
        ("--device cuda:99999999999999999999", "no GPU here"),
        ("--device tpu", "must be cpu, cuda or cuda:N"),
        ("--device cuda:x", "must be cpu, cuda or cuda:N"),
        ("--gpt-ckpt missing.pt", "--gpt-ckpt missing.pt: there is no such file"),
        ("--vq-ckpt missing.pt", "--vq-ckpt missing.pt: there is no such file"),
        ("--gpt-ckpt c2i_B_256.pt --random-weights", "contradict"),
        ("--ema", "--gpt-ckpt"),
        ("--class-labels 64", "0 to 63"),
        ("--class-labels unicorn", "closest"),
        ("--class-labels 9 --num-classes 9", "0 to 8"),
        ("--output missing/x.png", "no folder missing"),
        ("--output x.gif", "must end in .png, .jpg, .jpeg or .webp"),
        ("--save-codes missing/x.npy", "no folder missing"),
        ("--save-codes x.txt", "must end in .npy"),
        ("--save-individual missing/deeper", "no folder missing"),
        ("--save-individual /proc/each", "cannot make this folder"),
        ("--save-individual c2i_B_256.pt", "this is a file"),
        ("--save-individual " + "n" * 300, "File name too long"),
        ("--save-codes " + "n" * 300 + ".npy", "File name too long"),
        ("--output " + "n" * 300 + ".png", "File name too long"),
        ("--output " + "n" * 300 + "/x.png", "there is no folder"),
        ("--gpt-ckpt " + "n" * 300, "there is no such file"),
        ("--vq-ckpt " + "n" * 300, "there is no such file"),
        ("--output loop.png", "leads to itself"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag_and_the_range(
    folder: Path, monkeypatch: pytest.MonkeyPatch, typed: str, complaint: str
) -> None:
    """Fails if a bad value passes, or its message does not say what is allowed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("c2i_B_256.pt").touch()
    Path("loop.png").symlink_to("loop.png")
    with pytest.raises(UserError) as caught:
        resolved(folder, *typed.split())
    message = caught.value.spelled(flag_of)
    assert complaint in message
    assert "\n" not in message


@pytest.mark.parametrize("number", ["2", "99999999999999999999", "1" * 5000, "01"])
def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    """Fails if a number that torch or Python cannot hold ends in a traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with refused(match="cuda:0 to cuda:1"):
        resolve_device(f"cuda:{number}")


def test_a_folder_of_weights_that_cannot_exist_holds_none(folder: Path) -> None:
    """Fails if an overlong name ends in a traceback."""
    model = resolved(folder, "--pretrained-dir", "n" * 300).model
    assert find_weights(model) == FoundWeights(None, None)


@pytest.mark.parametrize("name", ["sample_c2i.png", "sample_c2i_untrained.png"])
def test_both_default_names_are_checked_before_the_work(folder: Path, name: str) -> None:
    """Fails if a folder in the way of the picture is found only after the sampling."""
    Path(name).mkdir()
    with refused(match="this is a folder"):
        resolved(folder)
    resolved(folder, "--output", "x.png")


def test_checking_the_folder_of_single_pictures_leaves_nothing_behind(folder: Path) -> None:
    """Fails if a mistake in a later flag leaves an empty folder."""
    resolved(folder, "--save-individual", "each")
    assert not Path("each").exists()
    Path("each").mkdir()
    resolved(folder, "--save-individual", "each")
    assert list(Path("each").iterdir()) == []


def test_an_unknown_class_says_which_model_was_chosen(folder: Path) -> None:
    """Fails if someone who wants ImageNet's classes is not told that the demo model was chosen, and
    how to change it.
    """
    hint = "these are the classes of GPT-demo; --gpt-model GPT-B has ImageNet's"
    with refused(match=hint):
        resolved(folder, "--class-labels", "golden retriever")
    with refused(match=hint):
        chosen_classes(model_options(parsed("--pretrained-dir", str(folder)))).listing("retriever")
    with pytest.raises(UserError) as caught:
        resolved(folder, "--gpt-model", "GPT-demo", "--class-labels", "golden retriever")
    assert hint not in caught.value.spelled(flag_of)


@pytest.mark.parametrize(
    "typed",
    ["--precision fp8", "--gpt-model GPT-9", "--seed x", "--bogus", "--vq-model VQ-1", "--gpt 1"],
)
def test_what_argparse_refuses_is_one_line_too(
    typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a usage message hides the error, or an abbreviated flag is guessed at."""
    with pytest.raises(SystemExit) as caught:
        parsed(*typed.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_parser_guesses_an_abbreviated_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a part of a flag does what the flag does: --al of llamagen-download fetched all."""
    parser = OneLineParser()
    parser.add_argument("--all", action="store_true")
    with pytest.raises(SystemExit):
        parser.parse_args(["--al"])
    assert "did you mean --all?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed",
    [
        f"--seed {2**63 - 1}",
        "--top-k 0",
        f"--top-k {2**31 - 1}",
        "--temperature 0",
        "--top-p 1",
        "--cfg-scale 0",
    ],
)
def test_the_ends_of_the_ranges_are_allowed(folder: Path, typed: str) -> None:
    """Fails if a check is off by one, or the value is bent on the way."""
    flag, value = typed.split()
    got = getattr(resolved(folder, flag, value).sampling, flag.removeprefix("--").replace("-", "_"))
    assert got == type(got)(value)


def test_defaults_fit_a_smaller_data_set_and_codebook(folder: Path) -> None:
    """Fails if a default that was never typed is reported as the user's mistake."""
    settings = resolved(
        folder, "--gpt-model", "GPT-B", "--num-classes", "5", "--codebook-size", "100"
    )
    assert settings.labels == (0, 1, 2, 3, 4)
    assert settings.sampling.top_k == 2000  # which is all of them


def test_labels_may_be_many_and_mixed(folder: Path) -> None:
    """Fails if names and ids cannot be mixed, repeated, or given in great number."""
    settings = resolved(folder, "--class-labels", "fox", "0", "FOX", "soccer ball", *["3"] * 5000)
    assert settings.labels[:4] == (7, 0, 7, 62)
    assert len(settings.labels) == 5004


def test_classes_are_listed_for_the_chosen_model() -> None:
    """Fails if --list-classes shows another data set, or needs a writable folder or a GPU."""
    arguments = parsed(
        "--gpt-model",
        "GPT-B",
        "--list-classes",
        "lesser",
        "--output",
        "missing/x.png",
        "--device",
        "cuda",
    )
    classes = chosen_classes(model_options(arguments))
    assert classes.listing(arguments.list_classes) == " 387  lesser panda"
    demo = model_options(parsed("--gpt-model", "GPT-demo"))
    assert len(chosen_classes(demo).listing().splitlines()) == 64


def test_help_states_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a flag has no help or its default is not stated."""
    parser = build_parser("purpose", "command.py")
    switches = (argparse._StoreTrueAction, argparse._HelpAction, argparse._VersionAction)
    optional = {
        "--output",
        "--save-individual",
        "--save-codes",
        "--gpt-ckpt",
        "--vq-ckpt",
        "--list-classes",
    }
    for action in parser._actions:
        assert action.help
        if not isinstance(action, switches) and not optional & set(action.option_strings):
            assert "default: " in action.help, action.option_strings
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert "examples:" in text


def test_weights_are_found_in_order(folder: Path) -> None:
    """Fails if a flag does not win, a file that is there is not used, or --random-weights
    uses one.
    """
    (folder / DEMO_GPT).touch()
    (folder / DEMO_VQ).touch()
    Path("mine.pt").touch()
    found = find_weights(resolved(folder).model)
    assert (found.gpt, found.vq, found.trained) == (folder / DEMO_GPT, folder / DEMO_VQ, True)
    found = find_weights(resolved(folder, "--gpt-model", "GPT-demo", "--gpt-ckpt", "mine.pt").model)
    assert (found.gpt, found.vq) == (Path("mine.pt"), folder / DEMO_VQ)
    found = find_weights(resolved(folder, "--random-weights").model)
    assert (found.gpt, found.vq, found.trained) == (None, None, False)


def test_one_untrained_model_makes_the_picture_untrained(folder: Path) -> None:
    """Fails if noise of an untrained tokenizer passes as a picture."""
    (folder / DEMO_GPT).touch()
    assert not find_weights(resolved(folder).model).trained


def test_download_fetches_what_is_published_and_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if --download fetches what is there, or nothing."""
    fetched: list[str] = []

    def fetch(file: PublishedFile, into: Path) -> Path:
        fetched.append(file.file_name)
        return into / file.file_name

    monkeypatch.setattr("autoregressive.weights.hub.fetch", fetch)
    (folder / "vq_ds16_c2i.pt").touch()
    assert find_weights(resolved(folder, "--gpt-model", "GPT-L").model).gpt is None
    assert not fetched
    found = find_weights(resolved(folder, "--gpt-model", "GPT-L", "--download").model)
    assert fetched == ["c2i_L_384.pt"]
    assert (found.gpt, found.vq) == (folder / "c2i_L_384.pt", folder / "vq_ds16_c2i.pt")
    assert (
        find_weights(
            resolved(folder, "--gpt-model", "GPT-XL", "--image-size", "256", "--download").model
        ).gpt
        is None
    )


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "--gpt-model GPT-XL",
            "get them with --download, which puts c2i_XL_384.pt and vq_ds16_c2i.pt into ",
        ),
        ("--gpt-model GPT-XL --image-size 256", "none are published for GPT-XL for 256 px"),
        ("--gpt-model GPT-B --downsample-size 8", "none are published for GPT-B"),
        (
            "--gpt-model GPT-demo",
            "demo_vq.safetensors ship with the program",
        ),
        ("--random-weights", "leave out --random-weights"),
    ],
)
def test_the_warning_says_noise_and_how_to_get_weights(
    folder: Path, capsys: pytest.CaptureFixture[str], typed: str, said: str
) -> None:
    """Fails if a user takes noise for the model's work, or is not told the command that helps."""
    find_weights_and_warn(resolved(folder, *typed.split()))
    warning = capsys.readouterr().err
    assert "noise; only the speed is real" in warning
    assert said in warning

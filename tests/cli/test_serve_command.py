"""The engine's command end to end: what it prints, writes and refuses. The demo architecture on the
CPU.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from safetensors.torch import save_file

from autoregressive.cli import drawing
from autoregressive.models.gpt import GPT_models
from autoregressive.output.images import JSON_KEY
from autoregressive.sample import sample_c2i as naive_command
from autoregressive.serve import pipeline, sample_c2i
from autoregressive.serve.engine import memory
from autoregressive.serve.engine.engine import Engine, EngineTotals
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.floor import Ceilings, JobFloor, speed_lines
from autoregressive.serve.worker.rank_processes import ModelRanks
from autoregressive.weights.finding import ModelSettings, resolve_model
from autoregressive.weights.loading import LoadedModels
from autoregressive.weights.options import ModelOptions
from tokenizer.tokenizer_image.vq_model import VQ_models

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "autoregressive/serve/sample_c2i.py"


FLAGS = ["--gpt-model", "GPT-demo", "--device", "cpu", "--pretrained-dir", "pretrained"]


def draw(*typed: str) -> None:
    """Runs the command in this process on the CPU, without weights unless the flags say
    otherwise.
    """
    sample_c2i.main([*FLAGS, *typed])


def test_the_command_runs_as_typed_and_owns_up_to_noise(tmp_path: Path) -> None:
    """Fails if the command needs a PYTHONPATH, a terminal, a GPU or weights, hides that there were
    none, or its speed.
    """
    typed = [
        "--gpt-model",
        "GPT-demo",
        "--random-weights",
        "--device",
        "cpu",
        "--class-labels",
        "otter",
        "62",
        "--cfg-scale",
        "1",
        "--lookahead",
        "off",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }
    files = ["--output", str(tmp_path / "x.png"), "--save-codes", str(tmp_path / "codes.npy")]
    done = subprocess.run(
        [sys.executable, COMMAND, *typed, *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"gpt sampling takes about \d+\.\d\d seconds\.", lines[0])
    assert re.fullmatch(r"decoder takes about \d+\.\d\d seconds\.", lines[1])
    assert lines[2] == f"image is saved to {tmp_path / 'x.png'}"
    assert re.fullmatch(
        r"\d+ tokens/s, \d+\.\d\d images/s with decoding, \d+\.\d\d\d ms/step\.", lines[3]
    )
    assert len(lines) == 4  # no line about the floor, which only a GPU has
    assert "noise" in done.stderr
    assert "\r" not in done.stderr  # no progress bar: this is no terminal
    codes = np.load(tmp_path / "codes.npy")
    assert (codes.shape, codes.dtype) == ((2, 256), np.int32)
    assert codes.min() >= 0
    assert codes.max() < 1024
    assert not np.array_equal(codes[0], codes[1])
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (2 + 2 * 130, 132)


@pytest.mark.usefixtures("small_demo")
def test_the_likeliest_tokens_are_the_naive_commands(work: Path) -> None:
    """Fails if a flag means something else here: where nothing is left to chance both commands must
    draw the same codes. The last bits of pixels depend on how many images are decoded together.
    """
    gpt = GPT_models["GPT-demo"](vocab_size=1024, block_size=256, num_classes=64)
    gpt.init_weights(torch.Generator().manual_seed(3), std=0.1)  # far enough from ties
    save_file(gpt.state_dict(), "gpt.safetensors")
    flags = [
        "--gpt-ckpt",
        "gpt.safetensors",
        "--class-labels",
        "3",
        "9",
        "--cfg-scale",
        "2",
        "--cfg-interval",
        "99",
    ]
    flags += ["--top-k", "1"]
    naive_command.main([*FLAGS, *flags, "--output", "a.png", "--save-codes", "a.npy"])
    # one picture after the other
    draw(*flags, "--output", "b.png", "--save-codes", "b.npy", "--max-num-seqs", "2")
    assert np.array_equal(np.load("a.npy"), np.load("b.npy"))
    with Image.open("a.png") as first, Image.open("b.png") as second:
        levels = np.asarray(first).astype(int) - np.asarray(second)
        assert np.abs(levels).max() <= 1


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize("damaged", ["gpt", "vq"])
def test_weights_that_give_nan_end_in_an_error_that_says_so(work: Path, damaged: str) -> None:
    """Fails if NaN becomes a black picture, or replaces a good one."""
    (work / "x.png").write_bytes(b"old")
    gpt = GPT_models["GPT-demo"](vocab_size=1024, block_size=256, num_classes=64).state_dict()
    vq = VQ_models["VQ-demo"]().state_dict()
    {"gpt": gpt["norm.weight"], "vq": vq["decoder.conv_out.bias"]}[damaged].fill_(torch.nan)
    save_file(gpt, "gpt.safetensors")
    save_file(vq, "vq.safetensors")
    flags = [
        "--gpt-ckpt",
        "gpt.safetensors",
        "--vq-ckpt",
        "vq.safetensors",
        "--class-labels",
        "0",
        "--cfg-scale",
        "1",
    ]
    with refused(match="NaN"):
        draw(*flags, "--output", "x.png")
    assert (work / "x.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--class-labels", "unicorn"], "unicorn"),
        (["--temperature", "-1"], "--temperature"),
        (["--page-size", "0"], "--page-size 0: must be a whole number, 1 to"),
        (["--num-pages", "0"], "--num-pages 0"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization 1.5"),
        (["--max-num-seqs", "0"], "--max-num-seqs 0"),
        *(
            (["--lookahead", value], f"--lookahead {value}: must be auto, off or a whole number, 1")
            for value in ("0", "-4", "65", "3.5", "x", "")
        ),
        (
            ["--max-num-seqs", "1"],
            "needs 2 rows (a guided image has two) and --max-num-seqs is 1: raise",
        ),
        (
            ["--num-pages", "31"],
            "needs 32 pages of 16 tokens and the pool has 31: raise --num-pages",
        ),
        (
            ["--attention-backend", "triton"],
            "--attention-backend triton: cpu is no GPU of compute capability 8.0 or above",
        ),
    ],
)
def test_a_mistake_is_found_before_loading(
    work: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], said: str
) -> None:
    """Fails if anything is loaded in spite of a mistake, the message does not name the flag, or the
    picture before is lost.
    """
    (work / "x.png").write_bytes(b"old")

    def loaded(*_: object, **__: object) -> None:
        pytest.fail("weights were looked for")

    monkeypatch.setattr(drawing, "find_weights", loaded)
    with refused(match=re.escape(said)):
        draw("--output", "x.png", *typed)
    assert (work / "x.png").read_bytes() == b"old"
    assert os.listdir(work) == ["x.png"]


def test_the_flags_reach_the_engine(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a flag is parsed and then forgotten."""
    seen: dict[str, object] = {}

    def fake(engine: Engine, labels: object, params: object, **rest: object) -> torch.Tensor:
        seen.update(labels=labels, params=params, config=engine.config)
        return torch.zeros(2, 256, dtype=torch.int32)

    monkeypatch.setattr(Engine, "generate", fake)
    sampling = {
        "cfg_scale": 3.0,
        "cfg_interval": 5,
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.25,
        "seed": 4,
    }
    engine = {
        "max_num_seqs": 6,
        "page_size": 8,
        "num_pages": 777,
        "gpu_memory_utilization": 0.5,
        "attention_backend": "torch",
        "lookahead": 4,
        "quantization": "int8",
        "kv_cache_dtype": "fp8",
    }
    values = (sampling | engine).items()
    flags = [word for name, value in values for word in (f"--{name.replace('_', '-')}", str(value))]
    draw(*flags, "--enforce-eager", "--deterministic", "--class-labels", "fox", "1")
    assert seen["labels"] == (7, 1)
    assert vars(seen["params"]) == sampling | {"n": 1}
    assert vars(seen["config"]) == engine | {
        "enforce_eager": True,
        "deterministic": True,
        "scheduling_policy": "fcfs",
        "tensor_parallel_size": 1,  # more of them: tests/engine/test_rank_processes.py
        "engines_on_cpu": 1,
    }
    draw("--class-labels", "fox", "1", "--lookahead", "auto")
    assert vars(seen["config"])["max_num_seqs"] == 4  # what the pictures need
    assert vars(seen["config"])["lookahead"] == "auto"


@pytest.mark.usefixtures("small_demo")
def test_the_process_is_left_as_it_was(work: Path) -> None:
    """Fails if the command leaves a switch behind that changes the numbers of whatever the process
    does next.
    """
    draw("--class-labels", "0", "--cfg-scale", "1")
    assert torch.get_float32_matmul_precision() == "highest"  # as every test starts: conftest.py
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("command", [sample_c2i, naive_command])
def test_a_changed_precision_is_said_once(
    work: Path,
    small_demo: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: ModuleType,
) -> None:
    """Fails if one of the commands passes over in silence that an older GPU runs in fp16, or
    repeats it.
    """

    def resolve(options: ModelOptions, seed: int) -> ModelSettings:
        return replace(resolve_model(options, seed), note="in fp16")

    monkeypatch.setattr(drawing, "resolve_model", resolve)
    command.main([*FLAGS, "--class-labels", "0", "--cfg-scale", "1"])
    assert capsys.readouterr().err.count("in fp16\n") == 1


def test_compile_is_accepted_and_said_to_do_nothing(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a script written for the plain command breaks, or the picture's record claims a
    compilation or the plain loop.
    """
    monkeypatch.setattr(Engine, "generate", lambda *_, **__: torch.zeros(1, 256, dtype=torch.int32))
    draw("--compile", "--class-labels", "0", "--output", "x.png")
    assert "--compile has no effect" in capsys.readouterr().err
    with Image.open("x.png") as image:
        image.load()
        record = json.loads(image.text[JSON_KEY])  # type: ignore[attr-defined]
        assert (record["compile"], record["loop"]) == (False, "paged")


def test_help_says_that_the_seeds_differ(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if users who compare both commands by seed are not told; and if a flag is described
    twice.
    """
    with pytest.raises(SystemExit):
        sample_c2i.main(["--help"])
    shown = capsys.readouterr().out
    assert "From the same seed it draws other pictures than the plain loop" in shown
    assert shown.count("  --compile") == shown.count("  --precision") == 1
    assert "the tokenizer runs in float32" not in " ".join(shown.split())  # it does not, on a GPU
    assert f"python {COMMAND} --gpt-model GPT-demo" in shown


@pytest.mark.parametrize("source", ["--help", "docs/cli.md"])
def test_what_a_flag_does_not_do_is_said(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a flag's line promises something on a CPU, or of torch's operations, that
    is not so.
    """
    if source == "--help":
        with pytest.raises(SystemExit):
            sample_c2i.main(["--help"])
        entries = capsys.readouterr().out.split("\n  --")
    else:
        text = (ROOT / source).read_text().split("## Flags of the engine's command")[1]
        entries = text.split("\n## ")[0].split("\n- `--")[1:]
    of_flag = {entry.split()[0].strip("`:"): " ".join(entry.split()) for entry in entries}
    assert "none on a CPU" in of_flag["gpu-memory-utilization"]
    assert "no effect on a CPU" in of_flag["enforce-eager"]
    assert "with torch's operations (a CPU, an older GPU, " in of_flag["deterministic"]
    assert "no promise" in of_flag["deterministic"]
    assert "may then differ" in of_flag["lookahead"]
    assert "deterministic they are equal" in of_flag["lookahead"].replace("`", "")


def test_classes_are_listed_and_nothing_is_drawn(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if --list-classes draws, or shows nothing."""
    draw("--list-classes", "ion")
    assert capsys.readouterr().out.splitlines() == ["   9  lion"]
    assert os.listdir(work) == []


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't"),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS)
@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        ("", "lower --max-num-seqs, use a smaller model or use --precision bf16"),
        ("--precision bf16", "lower --max-num-seqs or use a smaller model"),
        (
            "--num-pages 700",
            "lower --num-pages, lower --max-num-seqs, use a smaller model or use --precision bf16",
        ),
        (
            "--page-size 64",
            "lower --page-size, lower --max-num-seqs, use a smaller model or use --precision bf16",
        ),
    ],
)
def test_too_little_memory_is_one_line(
    work: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, typed: str, advice: str
) -> None:
    """Fails if running out of memory ends in a traceback, or the advice passes over the flag that
    was typed.
    """

    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Engine, "generate", exhausted)
    with refused(match=f"^cpu has too little free memory: {advice}$"):
        draw(*typed.split())
    assert os.listdir(work) == []


@pytest.mark.parametrize("error", MEMORY_ERRORS)
def test_weights_that_do_not_fit_are_one_line(
    work: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    """Fails if the advice is about pages and rows, of which there are none while weights are
    loaded.
    """

    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "load_models", exhausted)
    match = r"^cpu has too little free memory: use a smaller model or use --precision bf16$"
    with refused(match):
        draw("--num-pages", "700")


LESS = "give --num-pages or use a smaller model"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        # A page of 16 tokens of GPT-demo takes 256 KiB in float32; of 16 MiB, a quarter is for
        # pages that nobody asked for.
        ("", f"needs 32 pages of 16 tokens and the pool has 16: {LESS}"),
        (
            "--page-size 256",
            f"needs 2 pages of 256 tokens and the pool has 1: lower --page-size, {LESS}",
        ),
        (
            "--page-size 1024",
            "25% of it may be pages, a page of 1024 tokens takes 16.0 MiB: lower --page-size, "
            f"{LESS}",
        ),
        (
            "--num-pages 65",
            "--num-pages 65: a page of 16 tokens takes 0.2 MiB, and cpu has 16.0 MiB of 16.0 MiB "
            "free: lower",
        ),
        ("--max-num-seqs 9999 --num-pages 32", "--max-num-seqs 9999: steps of so many rows take"),
        ("--page-size 128 --num-pages 9", "lower --num-pages to 7 or less"),
        (
            "--page-size 2048 --num-pages 2",
            "16.0 MiB free: lower --page-size or use a smaller model",
        ),
    ],
)
def test_a_pool_that_does_not_fit_is_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch, typed: str, said: str
) -> None:
    """Fails if the process is left to run out of memory, or the line advises another flag than the
    one that was typed.
    """
    monkeypatch.setattr(memory, "memory_of", lambda device: (16 * 2**20, 16 * 2**20))
    with refused(match=re.escape(said)):
        draw("--class-labels", "0", *typed.split())


def test_other_failures_are_not_dressed_up(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a bug is reported as the user's mistake."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Engine, "generate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        draw()


def test_the_speed_is_held_against_the_floor() -> None:
    """Fails if a rate is computed from the wrong time, or the share is inverted."""
    job, ceilings = JobFloor(steps=576, seconds=0.35), Ceilings(4.24e12, 790e12)
    totals = EngineTotals(passes=576)
    rates, share = speed_lines(8, 576, (0.5, 0.3), job, ceilings, totals)
    assert rates == "9216 tokens/s, 10.00 images/s with decoding, 0.868 ms/step."
    assert share.startswith(
        "share of the memory floor: 70.0% (at best 0.350 seconds, with the 4.24 TB/s and 790 "
        "TFLOP/s"
    )


def test_lookahead_is_held_against_the_passes_that_it_took() -> None:
    """Fails if a pass is priced as a step of one token, the mean is not that of one image, or the
    floor is taken for the floor of these passes.
    """
    job, ceilings = JobFloor(steps=576, seconds=0.35), Ceilings(4.24e12, 790e12)
    # Two images; the slower one took 250 passes, and the faster one 230.
    totals = EngineTotals(passes=250, drafted=3 * 480, accepted=2 * 576 - 480)
    rates, ahead, share = speed_lines(2, 576, (0.25, 0.3), job, ceilings, totals)
    assert rates == "4608 tokens/s, 3.64 images/s with decoding, 1.000 ms/pass."
    assert ahead == (
        "lookahead: 250 passes, where one token a pass takes 576; 2.40 tokens of an image kept a "
        "pass."
    )
    assert share.startswith("share of the memory floor of one token a pass: 140.0% (at best 0.350")


@pytest.mark.usefixtures("small_demo")
def test_the_command_says_what_lookahead_brought(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the passes are not those of the engine, or something is said with lookahead off."""
    typed = ["--class-labels", "0", "--cfg-scale", "1", "--random-weights"]
    draw(*typed, "--lookahead", "off")
    assert "lookahead" not in capsys.readouterr().out
    draw(*typed, "--lookahead", "4")
    told = re.search(
        r"\d\.\d\d\d ms/pass\.\nlookahead: (\d+) passes, where one token a pass takes 256; "
        r"(\d\.\d\d) tokens of an image kept a pass\.\n$",
        capsys.readouterr().out,
    )
    assert told is not None
    assert 64 <= int(told[1]) <= 256
    assert float(told[2]) == pytest.approx(256 / int(told[1]), abs=0.006)


def test_no_bar_for_graphs_that_a_cpu_does_not_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if "preparing: 0 graphs" flashes on a terminal before the work on a CPU begins."""
    monkeypatch.setattr(pipeline, "on_terminal", lambda: True)
    with torch.device("meta"):
        gpt = GPT_models["GPT-demo"](vocab_size=1024, block_size=256, num_classes=64)
    gpt = gpt.to_empty(device="cpu").eval()
    ranks = ModelRanks(EngineConfig(max_num_seqs=2))
    pipeline.start_engine(LoadedModels(gpt, VQ_models["VQ-demo"]().eval()), ranks)
    assert capsys.readouterr().err == ""

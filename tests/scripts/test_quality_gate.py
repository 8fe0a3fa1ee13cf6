"""The gate on quality: its distances, its bounds, and the images that it takes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import quality_gate
import torch
from conftest import load_reference, reference_weights
from refusals import refused

from autoregressive.benchmarks.quality import (
    Candidate,
    Distance,
    RealImages,
    distances,
    judged,
    read_images,
)
from autoregressive.errors import UserError
from autoregressive.models.config import GPTConfig
from autoregressive.models.generate import generate
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.weights.finding import ModelSettings, find_weights, resolve_model
from autoregressive.weights.loading import load_models
from autoregressive.weights.options import ModelOptions

PLAIN = EngineConfig(attention_backend="torch")
VOCABULARY, TOKENS, CLASSES = 64, 16, 10


def small_model() -> Transformer:
    config = GPTConfig(
        dim=128, n_layer=2, n_head=2, vocab_size=VOCABULARY, block_size=TOKENS, num_classes=CLASSES
    )
    model = Transformer(config).eval().requires_grad_(False)
    reference_weights(model, 3)
    return model


@pytest.fixture(scope="module")
def real() -> RealImages:
    codes = torch.randint(VOCABULARY, (5, TOKENS), generator=torch.Generator().manual_seed(2))
    return RealImages(codes.int(), [0, 3, 9, 3, 1])


def test_the_distance_is_that_of_the_distributions_of_the_plain_loop(real: RealImages) -> None:
    """Fails if guidance, its interval, the temperature or a filter is left out, or a position is
    compared with another: both distributions are computed anew, from the plain loop's logits.
    """
    params = SamplingParams(cfg_scale=3.0, cfg_interval=6, temperature=0.8, top_k=20)
    other = small_model()
    other.output.weight.mul_(1.1)
    measured = distances(
        small_model(), {"other": Candidate(other, PLAIN)}, real, params, images_at_once=2
    )["other"]

    def distributions(model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
        guided: list[torch.Tensor] = []
        generate(
            model,
            torch.tensor(real.labels),
            TOKENS,
            cfg_scale=params.cfg_scale,
            cfg_interval=params.cfg_interval,
            temperature=1.0,
            sample_logits=False,
            on_logits=lambda step, logits: guided.append(force(step, logits)),
        )
        logits = torch.stack(guided, dim=1)
        least = logits.topk(params.top_k, dim=-1).values[..., -1:]
        kept = logits.masked_fill(logits < least, -torch.inf) / params.temperature
        return kept.softmax(dim=-1), logits.argmax(dim=-1)

    def force(step: int, logits: torch.Tensor) -> torch.Tensor:
        """Makes the loop take the real codes, and returns what it would have drawn from."""
        seen = logits.clone()
        logits.fill_(-1e9).scatter_(1, real.codes[:, step : step + 1].long(), 0.0)
        return seen

    (wanted, likeliest), (got, its_likeliest) = distributions(small_model()), distributions(other)
    variation = (got - wanted).abs().sum(dim=-1).mean() / 2
    assert variation > 0.01
    assert measured.total_variation == pytest.approx(variation.item(), rel=1e-3)
    changed = (likeliest != its_likeliest).double().mean().item()
    assert measured.changed_greedy == pytest.approx(changed)


def test_weights_pages_and_nothing_are_told_apart(real: RealImages) -> None:
    """Fails if a candidate's settings do not reach its passes, or the reference is changed by
    them.
    """
    params = SamplingParams(cfg_scale=2.0, top_k=0)
    configs = {
        "nothing": PLAIN,
        "int8": replace(PLAIN, quantization="int8"),
        "fp8": replace(PLAIN, quantization="fp8"),
        "int4": replace(PLAIN, quantization="int4"),
        "int8 pages": replace(PLAIN, kv_cache_dtype="int8"),
        "fp8 pages": replace(PLAIN, kv_cache_dtype="fp8"),
    }
    candidates = {name: Candidate(small_model(), config) for name, config in configs.items()}
    told: list[tuple[int, int]] = []
    measured = distances(
        small_model(), candidates, real, params, 3, lambda done, total: told.append((done, total))
    )
    variation = {name: each.total_variation for name, each in measured.items()}
    assert variation.pop("nothing") == 0
    assert 0 < variation["int8"] < variation["fp8"] < variation["int4"]
    assert 0 < variation["int8 pages"] < variation["fp8 pages"]
    assert told[-1] == (2 * TOKENS, 2 * TOKENS)


def variations(ratio: float) -> dict[str, Distance]:
    return {"bf16": Distance(0.02, 0.0), "quantised": Distance(0.02 * ratio, 0.0)}


@pytest.mark.parametrize(
    ("quantization", "pages", "bound"),
    [
        ("int8", "auto", 1.5),
        ("int8", "int8", 1.5),
        ("fp8", "auto", 2.5),
        ("fp8", "int8", 2.5),
        ("fp8", "fp8", 3.0),
        (None, "fp8", 3.0),
        (None, "int8", 1.5),
    ],
)
def test_each_setting_has_its_bound(quantization: str | None, pages: str, bound: float) -> None:
    """Fails if a bound is another one, or the shares of recognised pictures do not count."""
    verdict = judged(quantization, pages, variations(bound - 0.01), None)
    assert (verdict.bound, verdict.passed) == (bound, True)
    assert judged(quantization, pages, variations(bound + 0.01), None).passed is False
    near, far = {"plain": 0.98, "quantised": 0.971}, {"plain": 0.98, "quantised": 0.969}
    assert judged(quantization, pages, variations(1.0), near).passed is True
    assert judged(quantization, pages, variations(1.0), far).passed is False


def test_int4_never_passes() -> None:
    """Fails if an experiment passes by chance."""
    assert judged("int4", "auto", variations(0.5), None).passed is None


@pytest.fixture(scope="module")
def demo() -> tuple[ModelSettings, torch.nn.Module]:
    settings = resolve_model(ModelOptions("GPT-demo", device="cpu"))
    return settings, load_models(settings, find_weights(settings)).vq


def test_codes_and_pictures_of_one_image_are_the_same(
    demo: tuple[ModelSettings, torch.nn.Module], tmp_path: Path
) -> None:
    """Fails if pictures are scaled, turned or encoded otherwise than the model's data was."""
    settings, vq = demo
    _, pictures = load_reference("demo_pictures")
    pixels, labels = pictures["pixels"], pictures["labels"]
    np.savez(tmp_path / "pictures.npz", arr_0=pixels.transpose(0, 2, 3, 1), labels=labels)
    from_pictures = read_images(tmp_path / "pictures.npz", 3, settings, vq)  # type: ignore[arg-type]
    assert from_pictures.codes.shape == (3, 256)
    assert list(from_pictures.labels) == labels[:3].tolist()
    np.savez(tmp_path / "codes.npz", codes=from_pictures.codes.numpy(), labels=labels[:3])
    from_codes = read_images(tmp_path / "codes.npz", 64, settings, vq)  # type: ignore[arg-type]
    assert torch.equal(from_codes.codes, from_pictures.codes)
    with torch.no_grad():
        rebuilt = vq.decode_code(from_pictures.codes, [3, settings.codebook_embed_dim, 16, 16])  # type: ignore[operator]
    error = rebuilt - (torch.from_numpy(pixels[:3]).float() / 127.5 - 1)
    assert error.square().mean() < 0.01


BAD_FILES = {
    "no labels": ({"codes": np.zeros((2, 256), int)}, "must have labels [n], each 0 to 63"),
    "a label that is none": (
        {"codes": np.zeros((1, 256), int), "labels": np.array([64])},
        "must have labels [n], each 0 to 63",
    ),
    "codes of another size": (
        {"codes": np.zeros((1, 16), int), "labels": np.array([0])},
        "must have codes [1, 256], each 0 to 1023",
    ),
    "a code that is none": (
        {"codes": np.full((1, 256), 1024), "labels": np.array([0])},
        "must have codes [1, 256], each 0 to 1023",
    ),
    "pictures of another size": (
        {"arr_0": np.zeros((1, 64, 64, 3), np.uint8), "labels": np.array([0])},
        "arr_0 must be uint8 [1, 128, 128, 3]",
    ),
    "labels without a dimension": (
        {"codes": np.zeros((1, 256), int), "labels": np.array(64)},
        "must have labels [n], each 0 to 63",
    ),
    "neither": ({"labels": np.array([0])}, "must have codes [1, 256]"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_does_not_fit_is_refused(
    name: str, demo: tuple[ModelSettings, torch.nn.Module], tmp_path: Path
) -> None:
    """Fails if a wrong file is compared all the same, or ends in a traceback."""
    arrays, told = BAD_FILES[name]
    np.savez(tmp_path / "bad.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError) as raised:
        read_images(tmp_path / "bad.npz", 64, *demo)  # type: ignore[arg-type]
    assert told in str(raised.value)


def test_a_file_that_cannot_be_read_is_refused(
    demo: tuple[ModelSettings, torch.nn.Module], tmp_path: Path
) -> None:
    """Fails if a file that is damaged, or no npz file, ends in a traceback."""
    (tmp_path / "none.npz").write_bytes(b"PK\x03\x04 and no more")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez_compressed(tmp_path / "torn.npz", codes=np.arange(10_000))
    content = bytearray((tmp_path / "torn.npz").read_bytes())
    content[200:400] = bytes(200)
    (tmp_path / "torn.npz").write_bytes(content)
    for name in ("none.npz", "one.npy", "torn.npz", "missing.npz"):
        with pytest.raises(UserError, match="cannot be read"):
            read_images(tmp_path / name, 64, *demo)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ([], "there is nothing to measure: give --quantization or --kv-cache-dtype"),
        (["--quantization", "int8", "--judge", "/no/x.safetensors"], "--judge"),
        (["--gpt-model", "GPT-B", "--quantization", "int8"], "there are no trained weights"),
        (
            ["--quantization", "int8", "--reference", __file__, "--sample-dir", __file__],
            "this is a file; name a folder",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(typed: list[str], told: str, tmp_path: Path) -> None:
    """Fails if a mistake is found out after minutes, or as a traceback."""
    folder = ["--pretrained-dir", str(tmp_path)] if "GPT-B" in typed else []
    with refused(told):
        quality_gate.main([*typed, *folder, "--device", "cpu"])


@pytest.mark.parametrize("kernels", [False, True])
def test_the_yardstick_is_of_torchs_operations(
    kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a GPU's kernels, which keep more digits, make the bounds narrower than a CPU's."""
    asked: dict[str, EngineConfig] = {}

    def distances(exact: object, candidates: dict[str, Candidate], *others: object) -> object:
        asked.update({name: candidate.config for name, candidate in candidates.items()})
        return {}

    typed = quality_gate.parse_arguments(["--quantization", "int8", "--device", "cpu"])
    loaded = SimpleNamespace(gpt=None, vq=None)
    monkeypatch.setattr(quality_gate, "load_models", lambda *arguments: loaded)
    monkeypatch.setattr(quality_gate, "real_images", lambda *arguments: None)
    monkeypatch.setattr(quality_gate, "distances", distances)
    monkeypatch.setattr(quality_gate, "triton_runs_on", lambda device: kernels)
    quality_gate.compare(typed, *quality_gate.find_model(typed))
    assert asked["bf16"].attention_backend == "torch"
    assert asked["quantised"].attention_backend == "auto"
    assert ("bf16_kernels" in asked) == kernels


def test_the_script_reports_and_judges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the figures do not reach the report, or a bound that is not kept ends in status
    0.
    """
    codes = np.random.default_rng(0).integers(0, 1024, (2, 256))
    np.savez(tmp_path / "codes.npz", codes=codes, labels=np.array([1, 2]))
    measured = variations(1.2)
    monkeypatch.setattr(quality_gate, "compare", lambda *arguments: measured)
    flags = ["--codes", str(tmp_path / "codes.npz"), "--device", "cpu", "--pictures", "0"]
    output = tmp_path / "figures.json"
    quality_gate.main([*flags, "--quantization", "int8", "--output", str(output)])
    figures = json.loads(output.read_text())
    assert (figures["ratio"], figures["passed"]) == (pytest.approx(1.2), True)
    assert figures["distances"]["bf16"]["total_variation"] == 0.02
    assert (
        "times that of bf16 with torch's operations: 1.20 (at most 1.5)" in capsys.readouterr().out
    )
    measured.update(variations(1.7))
    with pytest.raises(SystemExit) as ended:
        quality_gate.main([*flags, "--quantization", "int8"])
    assert ended.value.code == 1
    quality_gate.main([*flags, "--quantization", "int4"])
    assert "experimental" in capsys.readouterr().out

"""The demo model: its data, its training (on made-up sprites, so that no font is needed) and the
weights that ship.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import load_reference
from evaluate_demo import draw_with_engine, load_models, mean_pairwise_distance
from safetensors import safe_open
from train_demo import export, train

from autoregressive.demo_training.emoji_data import (
    DEFAULT_FONT,
    IMAGE_SIZE,
    SPRITE_SIZE,
    load_sprites,
    render,
    render_batch,
    step_generator,
)
from autoregressive.demo_training.judge import blurred
from autoregressive.demo_training.stages import GPTStage, Plan, TokenizerStage, TrainingStage
from autoregressive.errors import UserError
from autoregressive.models.demo_classes import DEMO_EMOJI
from autoregressive.models.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = replace(
    Plan(), tokenizer_steps=3, tokenizer_batch=2, revive_every=2, gpt_steps=3, gpt_batch=2
)
needs_font = pytest.mark.skipif(
    not DEFAULT_FONT.exists(), reason="needs Debian's package fonts-noto-color-emoji"
)


def made_up_sprites() -> torch.Tensor:
    """Noise in the form of emoji: [64, 4, side, side], colours multiplied by opacity."""
    generator = torch.Generator().manual_seed(0)
    rgba = torch.rand(len(DEMO_EMOJI), 4, SPRITE_SIZE, SPRITE_SIZE, generator=generator)
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)


def stage_of(name: str, folder: Path) -> TrainingStage:
    if name == "tokenizer":
        return TokenizerStage(SMALL, made_up_sprites())
    export(TokenizerStage(SMALL, made_up_sprites()).average, folder / "vq.safetensors", "test")
    return GPTStage(SMALL, made_up_sprites(), folder / "vq.safetensors")


def trained(name: str, folder: Path, steps_at_a_time: int) -> dict[str, torch.Tensor]:
    """The weights of a stage trained in runs of so many steps, each with new objects."""
    folder.mkdir()
    for _ in range(10):
        stage = stage_of(name, folder)
        if train(name, stage, folder, stop_after=steps_at_a_time, save_every=1000):
            return stage.average
    raise AssertionError("training never ended")


@pytest.mark.parametrize("name", ["tokenizer", "gpt"])
def test_an_interrupted_training_ends_with_the_weights_of_an_unbroken_one(
    name: str, tmp_path: Path
) -> None:
    """A part of the state that is not saved (averages, moments, used codes, random numbers) would
    show in the weights.
    """
    torch.use_deterministic_algorithms(True)
    try:
        whole = trained(name, tmp_path / "whole", steps_at_a_time=3)
        broken = trained(name, tmp_path / "broken", steps_at_a_time=1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    start = stage_of(name, tmp_path).average
    assert any(not torch.equal(whole[key], start[key]) for key in whole), "nothing was trained"


def test_a_state_of_another_plan_is_not_resumed(tmp_path: Path) -> None:
    """Weights of seed 0 would be exported as seed 1's."""
    trained("tokenizer", tmp_path / "run", steps_at_a_time=3)
    other = TokenizerStage(replace(SMALL, seed=1), made_up_sprites())
    with pytest.raises(UserError, match="another seed"):
        train("tokenizer", other, tmp_path / "run", stop_after=3, save_every=1000)


def test_no_two_steps_of_the_default_plans_draw_the_same_pictures() -> None:
    """A checksum of 32 bits may collide: then a picture would be trained on twice, or tested after
    training.
    """
    plan = Plan()
    streams = {"tokenizer": plan.tokenizer_steps, "gpt": plan.gpt_steps}
    keys = [
        step_generator(0, name, step, CPU).initial_seed()
        for name, steps in streams.items()
        for step in range(steps)
    ]
    judge = [("classifier training", step) for step in range(2000)] + [
        ("classifier test", 0),
        ("distance", 0),
    ]
    keys += [step_generator(1, name, step, CPU).initial_seed() for name, step in judge]
    assert len(set(keys)) == len(keys)


def test_pictures_depend_on_seed_stream_and_step_alone() -> None:
    """Test pictures that training has seen would flatter the classifier."""
    sprites = made_up_sprites()
    first, labels = render_batch(sprites, 4, seed=0, stream="a", step=0)
    again, _ = render_batch(sprites, 4, seed=0, stream="a", step=0)
    assert first.shape == (4, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert labels.shape == (4,)
    assert first.min() >= -1
    assert first.max() <= 1
    assert torch.equal(first, again)
    for other in ((1, "a", 0), (0, "b", 0), (0, "a", 1)):
        assert not torch.equal(render_batch(sprites, 4, *other)[0], first)


def test_two_pictures_of_a_class_differ() -> None:
    """A model of pictures that never vary would pass every other test of variety."""
    pictures = render(
        made_up_sprites(), torch.zeros(8, dtype=torch.int64), step_generator(0, "x", 0, CPU)
    )
    assert mean_pairwise_distance(pictures[None]) > 0.2
    assert mean_pairwise_distance(pictures[:1].expand(8, -1, -1, -1)[None]) == 0


def test_blur_removes_what_is_finer_than_four_pixels() -> None:
    """A blur that kept detail would make the bound on blurred pictures worthless."""
    stripes = torch.ones(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    stripes[..., ::2] = -1
    assert blurred(stripes).abs().max() < 1e-6


def test_the_engine_draws_pictures_to_judge() -> None:
    """Fails if the pictures are out of range, empty or all alike, or the seed is ignored."""
    gpt, tokenizer = load_models(ROOT / "pretrained_models", CPU)
    guided, plain = (SamplingParams(cfg_scale=3.0 - seed, top_k=0, seed=seed) for seed in (1, 2))
    first, second = draw_with_engine(gpt, tokenizer, torch.tensor([3, 3]), guided, batch=2)
    (other,) = draw_with_engine(gpt, tokenizer, torch.tensor([3]), plain, batch=2)
    for picture in (first, second, other):
        assert picture.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
        assert picture.abs().max() <= 1
        assert picture.std() > 0.1
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_missing_or_wrong_font_is_one_line(tmp_path: Path) -> None:
    """PIL's own error names neither the font nor the package."""
    done = subprocess.run(
        [sys.executable, "scripts/demo_training/train_demo.py", "--font",
        str(tmp_path / "no.ttf"), "--run-dir", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "fonts-noto-color-emoji" in done.stderr


def test_the_shipped_files_are_small_enough_and_say_what_they_are() -> None:
    """Each at most 15 MiB, 30 MB together; the font's licence is noted."""
    files = sorted((ROOT / "pretrained_models").glob("demo_*.safetensors"))
    assert [file.name for file in files] == ["demo_gpt.safetensors", "demo_vq.safetensors"]
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) <= 15 * 2**20
    assert sum(sizes) <= 30e6
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            assert "SIL Open Font License" in tensors.metadata()["description"]


def test_equal_weights_make_equal_files(tmp_path: Path) -> None:
    """Two runs from one seed are compared by their files' digests."""
    weights = stage_of("tokenizer", tmp_path).average
    for i in range(6):
        export(weights, tmp_path / f"{i}.safetensors", "test")
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(6)}) == 1


def recorded_pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of the data that were rendered once, so that no font is needed: ([8, 3, 128, 128] in
    -1..1, labels [8]).
    """
    _, arrays = load_reference("demo_pictures")
    return torch.from_numpy(arrays["pixels"]).float() / 127.5 - 1, torch.from_numpy(
        arrays["labels"]
    )


def test_the_shipped_tokenizer_keeps_what_it_encodes() -> None:
    """The wrong weights, or a decoder that no longer fits them, would blur or scramble every
    picture.
    """
    _, tokenizer = load_models(ROOT / "pretrained_models", CPU)
    pictures, _ = recorded_pictures()
    with torch.no_grad():
        made = tokenizer(pictures)[0].clamp(-1, 1)
    assert 10 * torch.log10(4 / (made - pictures).square().mean()) > 27


def test_the_shipped_transformer_knows_the_classes() -> None:
    """Codes of a picture must be likelier under its own class than under another; "no class" lies
    between, for guidance.
    """
    gpt, tokenizer = load_models(ROOT / "pretrained_models", CPU)
    pictures, labels = recorded_pictures()
    with torch.no_grad():
        codes = tokenizer.encode(pictures).codes.flatten(1)

        def surprise(given: torch.Tensor) -> torch.Tensor:
            logits = gpt(idx=codes[:, :-1], cond_idx=given)
            return torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), codes, reduction="none"
            ).mean(dim=1)

        right, wrong, none = (
            surprise(labels),
            surprise((labels + 7) % 64),
            surprise(torch.full_like(labels, 64)),
        )
    assert (right < wrong).all()
    assert right.mean() < none.mean() < wrong.mean()


@needs_font
def test_the_font_still_draws_the_recorded_pictures() -> None:
    """Another version of the font, or a change of the renderer, would make another data set."""
    pictures, labels = recorded_pictures()
    drawn, drawn_labels = render_batch(load_sprites(DEFAULT_FONT), 8, seed=7, stream="test", step=0)
    assert torch.equal(drawn_labels, labels)
    assert (drawn - pictures).abs().mean() < 0.01


def test_missing_demo_weights_are_one_line(tmp_path: Path) -> None:
    """The evaluation of an empty folder must not end in a traceback."""
    with pytest.raises(UserError, match="demo_vq"):
        load_models(tmp_path, CPU)


def test_the_stages_log_is_json_lines(tmp_path: Path) -> None:
    """Whoever plots a run reads this file."""
    trained("gpt", tmp_path / "run", steps_at_a_time=3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "gpt.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3
    assert 5 < lines[-1]["loss"] < 8  # log(1024) is 6.9

"""Building models: trained weights arrive whole, untrained ones depend on the seed alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autoregressive.cli.drawing import resolve_settings
from autoregressive.cli.flags import build_parser
from autoregressive.models.gpt import GPT_models
from autoregressive.weights.checkpoint import CheckpointError
from autoregressive.weights.finding import FoundWeights, ModelSettings, find_weights
from autoregressive.weights.loading import LoadedModels, load_models


def settings_of(folder: Path, *typed: str) -> ModelSettings:
    """The demo model's settings, on the CPU."""
    common = ["--gpt-model", "GPT-demo", "--device", "cpu", "--pretrained-dir", str(folder)]
    common += ["--output", str(folder / "x.png")]
    return resolve_settings(
        build_parser("purpose", "command.py").parse_args([*common, *typed])
    ).model


def untrained(folder: Path, *typed: str) -> LoadedModels:
    """The demo model with weights drawn from the seed."""
    return load_models(settings_of(folder, *typed), FoundWeights(None, None))


def all_weights(models: LoadedModels) -> dict[str, torch.Tensor]:
    """Every tensor of both models."""
    gpt = {f"gpt.{name}": tensor for name, tensor in models.gpt.state_dict().items()}
    return gpt | {f"vq.{name}": tensor for name, tensor in models.vq.state_dict().items()}


def test_untrained_weights_follow_the_seed_and_nothing_else(tmp_path: Path) -> None:
    """Fails if a benchmark cannot be repeated, or drawing weights disturbs the draws of tokens."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = all_weights(untrained(tmp_path, "--seed", "3"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = all_weights(untrained(tmp_path, "--seed", "3"))
    other = all_weights(untrained(tmp_path, "--seed", "4"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("gpt.layers.0.attention.wqkv.weight", "vq.decoder.conv_in.weight"):
        assert not torch.equal(first[name], other[name])
    assert all(tensor.isfinite().all() for tensor in first.values())


def test_models_are_ready_in_the_precision_asked_for(tmp_path: Path) -> None:
    """Fails if dropout is on, the tokenizer leaves float32, or the rotary table is empty or
    rounded.
    """
    models = untrained(tmp_path, "--precision", "bf16")
    assert not models.gpt.training
    assert not models.vq.training
    assert {parameter.dtype for parameter in models.gpt.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in models.vq.parameters()} == {torch.float32}
    assert not any(
        parameter.requires_grad
        for model in (models.gpt, models.vq)
        for parameter in model.parameters()
    )
    expected = GPT_models["GPT-demo"](vocab_size=1024, block_size=256, num_classes=64).freqs_cis
    assert torch.equal(models.gpt.freqs_cis, expected)


def test_shipped_weights_are_loaded_as_they_are(tmp_path: Path) -> None:
    """Fails if a weight is lost, or is drawn instead of read."""
    saved = untrained(tmp_path, "--seed", "3")
    for model, name in ((saved.gpt, "demo_gpt.safetensors"), (saved.vq, "demo_vq.safetensors")):
        save_file(
            {key: tensor.half() for key, tensor in model.state_dict().items()}, tmp_path / name
        )
    settings = settings_of(tmp_path)
    loaded, expected = (
        all_weights(load_models(settings, find_weights(settings))),
        all_weights(saved),
    )
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name].half().float()) for name in expected)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    """Fails if weights of another shape are taken in part."""
    wrong = GPT_models["GPT-demo"](vocab_size=1024, block_size=256, num_classes=10)
    save_file(wrong.state_dict(), tmp_path / "demo_gpt.safetensors")
    settings = settings_of(tmp_path)
    with pytest.raises(CheckpointError):
        load_models(settings, find_weights(settings))


def test_the_model_that_ships_is_whole() -> None:
    """Fails if the repository's own weights are missing, do not fit the demo model, or hold NaN."""
    typed = ["--gpt-model", "GPT-demo", "--device", "cpu"]
    settings = resolve_settings(build_parser("purpose", "command.py").parse_args(typed)).model
    found = find_weights(settings)
    assert found.trained
    assert all(
        tensor.isfinite().all() for tensor in all_weights(load_models(settings, found)).values()
    )

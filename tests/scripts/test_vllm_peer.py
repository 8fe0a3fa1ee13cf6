"""The benchmark of vLLM, with a stand-in for vLLM that records what it is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vllm_peer
from refusals import refused

from autoregressive.benchmarks.harness import empty_transformer
from autoregressive.benchmarks.script import PAPER_MODELS

# A line of the record is what a model is made with, or one call of `generate`. By its width, GPT-L
# ends its sequences too early, GPT-XXL dies, and GPT-3B has no kernels.
STAND_IN = """
import json, os, pathlib, types

__version__ = "9.9.9"


def record(**found):
    with open(os.environ["VLLM_RECORD"], "a") as file:
        file.write(json.dumps(found) + "\\n")


class SamplingParams:
    def __init__(self, **given):
        self.given = given


class LLM:
    def __init__(self, **given):
        self.config = json.loads(pathlib.Path(given.pop("model"), "config.json").read_text())
        record(given=given, config=self.config)
        if self.config["hidden_size"] == 1536:
            os._exit(7)
        if self.config["hidden_size"] == 3200:
            raise ValueError("no kernels for 100\\nmore words")
        print("INFO Using FLASH_ATTN attention backend out of potential backends: []", flush=True)

    def generate(self, prompts, sampling, use_tqdm):
        record(prompts=prompts, sampling=sampling.given)
        count = sampling.given["max_tokens"] - (self.config["hidden_size"] == 1024)
        output = types.SimpleNamespace(token_ids=[0] * count)
        return [types.SimpleNamespace(outputs=[output]) for _ in prompts]
"""
Record = list[dict[str, Any]]


def run(folder: Path, *typed: str) -> subprocess.CompletedProcess[str]:
    """How the script ends if vLLM is what the folder has of it."""
    environment = os.environ | {"PYTHONPATH": str(folder), "VLLM_RECORD": str(folder / "record")}
    command = [sys.executable, vllm_peer.__file__, *typed]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def run_with_vllm(folder: Path, *typed: str) -> tuple[subprocess.CompletedProcess[str], Record]:
    """How the script ends with the stand-in, and what that has recorded."""
    (folder / "vllm.py").write_text(STAND_IN)
    done = run(folder, *typed)
    return done, [json.loads(line) for line in (folder / "record").read_text().splitlines()]


def test_vllm_is_asked_for_the_same_job(tmp_path: Path) -> None:
    """Fails if vLLM runs other layers, fewer sequences or fewer tokens than the engine does, or if
    the table or the figures lack what measured them.
    """
    path = tmp_path / "x.json"
    words = ["--rows", "4,2", "--image-size", "256", "--repeats", "2", "--output", str(path)]
    done, [made, *calls] = run_with_vllm(tmp_path, "--models", "GPT-XL", *words)
    assert done.returncode == 0, done.stderr
    assert made["config"] == vllm_peer.llama_config(empty_transformer("GPT-XL", 256).config)
    assert made["given"] == {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": 257,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
    }
    # Each number of rows has one warm run, and two that are timed.
    assert [len(call["prompts"]) for call in calls] == [4, 4, 4, 2, 2, 2]
    prompts = [{"prompt_token_ids": [16384 + row]} for row in range(4)]
    sampling = {"temperature": 1.0, "top_k": 2000, "max_tokens": 256}
    for call in calls:
        assert call["prompts"] == prompts[: len(call["prompts"])]
        assert call["sampling"] == sampling | {"ignore_eos": True, "detokenize": False}

    heading, _, *lines, told, _ = done.stdout.splitlines()
    assert heading == "vLLM, plain sequences without guidance, median of 2"
    assert [line.split()[:4] for line in lines] == [
        ["GPT-XL", "9.9.9", "FLASH_ATTN", rows] for rows in ("4", "2")
    ]
    assert told.startswith("measured with vLLM 9.9.9 and torch ")
    figures = json.loads(path.read_text())
    assert figures["options"] == {"rows": [4, 2], "image_size": 256, "repeats": 2}
    [report] = figures["models"]
    assert (report["vllm"], report["attention"]) == ("9.9.9", "FLASH_ATTN")
    for result, images in zip(report["results"], (2, 1), strict=True):
        assert result["seconds"] == sum(result["repeats"]) / 2
        assert result["step_ms"] == result["seconds"] / 256 * 1e3
        assert result["images_per_second"] == images / result["seconds"]


def test_a_model_that_fails_leaves_the_others_their_turn(tmp_path: Path) -> None:
    """Fails if sequences that ended early are timed, a crash of vLLM ends the run, or a run with a
    failure passes for a whole one.
    """
    done, _ = run_with_vllm(tmp_path, "--models", "GPT-L,GPT-XXL,GPT-3B,GPT-B", "--repeats", "1")
    assert done.returncode == 1
    _, _, *failed, line, _, figures = done.stdout.splitlines()
    assert failed == [
        "GPT-L     failed: vLLM drew 9200 tokens, not 16 times 576",
        "GPT-XXL   failed: the process ended with status 7",
        "GPT-3B    failed: no kernels for 100",
    ]
    assert line.split()[:4] == ["GPT-B", "9.9.9", "FLASH_ATTN", "16"]
    assert "more words" in done.stderr
    reasons = [report.get("error") for report in json.loads(figures)["models"]]
    assert reasons == [*(line.partition("failed: ")[2] for line in failed), None]


def test_without_vllm_one_line_says_how_to_install_it(tmp_path: Path) -> None:
    """Fails if the script ends in a traceback where vLLM is missing, as it is by default."""
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "vllm_peer.py: error: vLLM is not installed: pip install vllm, in an environment of its own"
    )
    assert done.stderr.count("\n") == 1


def test_an_image_size_is_refused_before_vllm_starts() -> None:
    """Fails if minutes pass before a size that no model has is refused."""
    with refused("--image-size 100: must be 256, 384 or 512 for GPT-B"):
        vllm_peer.main(["--image-size", "100"])


@pytest.mark.parametrize("model", PAPER_MODELS)
def test_the_llama_has_the_layers_of_the_transformer(model: str) -> None:
    """Fails if a width, a number of heads or a number of layers differs, so that another model is
    timed.
    """
    gpt = empty_transformer(model)
    llama = vllm_peer.llama_config(gpt.config)
    width, heads = llama["hidden_size"], llama["num_attention_heads"]
    assert llama["num_key_value_heads"] == heads
    attention = 4 * width * heads * llama["head_dim"]
    layer = attention + 3 * width * llama["intermediate_size"] + 2 * width
    weights = sum(weight.numel() for weight in gpt.layers.parameters())
    assert llama["num_hidden_layers"] * layer == weights
    assert llama["vocab_size"] == 17408
    assert llama["max_position_embeddings"] == 577

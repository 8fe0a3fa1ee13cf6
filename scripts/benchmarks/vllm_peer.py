"""Times vLLM on plain sequences of the same length, through a Llama of the same layers: seconds and
milliseconds a step, for each model and number of rows. Ends in JSON.

    python scripts/benchmarks/vllm_peer.py
    python scripts/benchmarks/vllm_peer.py --models GPT-XL --rows 2,16,512 --image-size 256

vLLM is no dependency of this program. Install it in an environment of its own, because it brings
its own torch, and this repository beside it: pip install vllm && pip install --no-deps -e .

A row is one sequence: a prompt of one token, then as many tokens as an image has, drawn with the
model's temperature and top-k in bf16. The weights are vLLM's dummy weights, for speed does not
depend on them. vLLM has no guidance, so each row is on its own. For images/s two rows count as one
guided image, as in bench_decode.py; no pixels are decoded. vLLM's defaults hold but for its prefix
cache, which is off because no prompts share a prefix. Each model runs in a fresh process, where one
engine has room for the largest number of rows. Times are medians of the repeats, after one whole
run of those rows. The attention backend is the one that vLLM's log names, or a dash. Exit status 1
if a model failed; the others are measured all the same.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import torch

    from autoregressive.benchmarks.harness import empty_transformer
    from autoregressive.benchmarks.script import (
        Table,
        add_image_size,
        add_models,
        add_output,
        add_repeats,
        give_figures,
        listed,
        row_count,
        script_parser,
    )
    from autoregressive.models.config import GPTConfig
    from autoregressive.models.defaults import model_defaults
    from autoregressive.output.records import device_name
    from autoregressive.weights.options import check_image_size

_ROWS = [16]  # eight guided images, the job of the speed-up table
_VOCABULARY_MULTIPLE = 1024
_BACKEND = re.compile(r"Using (?:AttentionBackendEnum\.)?(\w+) (?:attention )?backend", re.I)
_COLUMNS = {
    "model": "<9",
    "vLLM": "<9",
    "attention": "<12",
    "rows": ">5",
    "seconds": ">8.3f",
    "ms/step": ">9.3f",
    "images/s": ">9.2f",
}


def llama_config(config: GPTConfig) -> dict[str, Any]:
    """The Hugging Face config of a Llama whose layers have the transformer's shapes.

    A Llama has one vocabulary, so the classes and the unconditional one follow the codes in it. It
    is rounded up, to 17,408 for ImageNet: the head has 6 % more outputs than LlamaGen's.
    """
    classes = config.num_classes + 1
    length = 1 + config.block_size
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "head_dim": config.head_size,
        "vocab_size": config.vocab_size
        + -(-classes // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": length,
        "tie_word_embeddings": False,
    }


def measure(model: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """In the fresh process: all numbers of rows of one model.

    Only what vLLM has had for years is used: `LLM`, `SamplingParams`, and prompts as dictionaries.

    Args:
        folder: an empty one, which becomes vLLM's model.
    """
    import vllm

    config = empty_transformer(model, options.image_size).config
    llama = llama_config(config)
    (folder / "config.json").write_text(json.dumps(llama))
    began = time.perf_counter()
    llm = vllm.LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=llama["max_position_embeddings"],
        max_num_seqs=max(options.rows),
        enable_prefix_caching=False,
    )
    started = time.perf_counter()
    params = model_defaults(model).sampling
    # No min_tokens: without an end token it changes nothing, and vLLM masks logits for it.
    sampling = vllm.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k or -1,
        max_tokens=config.block_size,
        ignore_eos=True,
        detokenize=False,
    )
    results = [time_rows(llm, sampling, config, rows, options.repeats) for rows in options.rows]
    return {
        "model": model,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "config": llama,
        "start_seconds": started - began,
        "results": results,
    }


def time_rows(
    llm: Any, sampling: Any, config: GPTConfig, rows: int, repeats: int
) -> dict[str, Any]:
    """The figures of so many sequences at once.

    Raises:
        UserError: a sequence did not get all its tokens.
    """
    tokens = config.block_size
    prompts = [
        {"prompt_token_ids": [config.vocab_size + row % config.num_classes]} for row in range(rows)
    ]
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        times.append(time.perf_counter() - began)
        drawn = [len(answer.outputs[0].token_ids) for answer in answers]
        if drawn != [tokens] * rows:
            raise UserError(f"vLLM drew {sum(drawn)} tokens, not {rows} times {tokens}")
    warm_up_seconds, *times = times
    seconds = median(times)
    return {
        "rows": rows,
        "images": rows // 2,
        "steps": tokens,
        "seconds": seconds,
        "repeats": times,
        "warm_up_seconds": warm_up_seconds,
        "step_ms": seconds / tokens * 1e3,
        "images_per_second": rows // 2 / seconds,
    }


def work(options: argparse.Namespace) -> None:
    """In the fresh process: leaves the figures of its model, or the reason why there are none, in
    the file that --worker names. vLLM writes to stdout itself.
    """
    (model,) = options.models
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = measure(model, options, Path(folder))
    except Exception as error:  # vLLM's errors are of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        options.worker.write_text(json.dumps({"model": model, "error": reason}))
        raise
    options.worker.write_text(json.dumps(report))


def run_model(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a model, from a fresh process: vLLM does not return all of the GPU's memory.
    The log of one that failed goes to stderr.
    """
    command = [sys.executable, __file__, "--models", model]
    command += ["--rows", ",".join(map(str, options.rows)), "--repeats", str(options.repeats)]
    if options.image_size is not None:
        command += ["--image-size", str(options.image_size)]
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        with log.open("wb") as file:
            done = subprocess.run(
                [*command, "--worker", str(answer)],
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        logged = log.read_text(errors="replace")
        ended = {"model": model, "error": f"the process ended with status {done.returncode}"}
        report: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else ended
    if "error" in report:
        print(logged, file=sys.stderr)
        return report
    found = _BACKEND.search(logged)
    return {**report, "attention": found and found[1]}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    add_models(parser, gpu_only=True)
    parser.add_argument(
        "--rows",
        type=listed(row_count),
        default=",".join(map(str, _ROWS)),
        metavar="NUMBERS",
        help="sequences that run at once: even numbers, with commas between them (default: "
        "%(default)s)",
    )
    add_image_size(parser)
    add_repeats(parser, 3)
    add_output(parser)
    # in the fresh process
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for model in options.models if options.image_size is not None else []:
        check_image_size(model, options.image_size)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    options = parse_arguments(argv)
    if options.worker is not None:
        work(options)
        return
    if find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed: pip install vllm, in an environment of its own because it "
            "brings its own torch"
        )
    print(f"vLLM, plain sequences without guidance, median of {options.repeats}")
    table, reports = Table(_COLUMNS), []
    for model in options.models:
        report = run_model(model, options)
        reports.append(report)
        if "error" in report:
            print(f"{model:<9} failed: {report['error']}", flush=True)
        for result in report.get("results", []):
            figures = [result[key] for key in ("rows", "seconds", "step_ms", "images_per_second")]
            table.row(model, report["vllm"], report["attention"], *figures)
    measured = [report for report in reports if "error" not in report]
    if measured:
        print("measured with vLLM {vllm} and torch {torch} on {device}".format(**measured[0]))
    kept = {key: getattr(options, key) for key in ("rows", "image_size", "repeats")}
    give_figures({"benchmark": "vllm_peer", "options": kept, "models": reports}, options.output)
    if len(measured) < len(reports):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)

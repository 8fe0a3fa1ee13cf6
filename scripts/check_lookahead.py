"""Checks that lookahead draws the tokens of one token a pass: it draws many pictures without it and
with each setting, and compares all codes. Ends in JSON.

    python scripts/check_lookahead.py --pictures 200
    python scripts/check_lookahead.py --pictures 10000 --precision fp16 --lookahead 4,auto

The pictures differ in class, guidance, its interval, temperature, filters, seed and count. They
come while others run, some of their neighbours are cancelled, and the pool holds a quarter of the
pages that the rows may ask for. Each setting has as many rows as make 64 positions a pass, which is
where a GPU's sums have a fixed order by default. With --deterministic, --max-num-seqs may be more.
Exit status 1 if a picture differs.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import torch

    from autoregressive.benchmarks.guessing import kept_a_pass
    from autoregressive.benchmarks.harness import use_device
    from autoregressive.benchmarks.mixed_requests import (
        MOST_ROWS,
        Wanted,
        draw_mixed,
        equal_pictures,
        mixed_requests,
        scarce_config,
    )
    from autoregressive.benchmarks.script import (
        add_device,
        add_model,
        add_output,
        add_quantization,
        give_figures,
        listed,
        lookahead,
        script_parser,
        whole_number,
    )
    from autoregressive.devices import PRECISIONS, limited_cpu_threads, now
    from autoregressive.models.defaults import DEMO_MODEL
    from autoregressive.models.gpt import Transformer
    from autoregressive.output.records import device_name, quantized_record
    from autoregressive.serve.engine.engine import Engine
    from autoregressive.serve.engine.engine_config import LookaheadSetting
    from autoregressive.serve.engine.request import Request
    from autoregressive.weights.finding import find_weights, resolve_model
    from autoregressive.weights.loading import load_models
    from autoregressive.weights.options import ModelOptions
    from kernels.operations import MANY_ROWS

_SETTINGS: list[LookaheadSetting] = [3, 4, 8, 16, "auto"]


def check(gpt: Transformer, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Draws the pictures without lookahead, then with each setting. Prints a line for each."""
    model = gpt.config
    wanted = mixed_requests(options.pictures, model.block_size, model.num_classes, options.seed)
    expected: list[Request] = []
    for number, setting in enumerate(["off", *options.lookahead]):
        drawn, seconds = draw(gpt, wanted, setting, number, options)
        expected = expected or drawn
        equal, kept = equal_pictures(drawn, expected), kept_a_pass(drawn)
        print(
            f"lookahead {setting}: {equal} of {options.pictures} pictures equal, "
            f"{kept:.3f} tokens kept a pass, {seconds:.1f} s",
            flush=True,
        )
        yield {"lookahead": setting, "equal": equal, "tokens_a_pass": kept, "seconds": seconds}


def draw(
    gpt: Transformer,
    wanted: Sequence[Wanted],
    setting: LookaheadSetting,
    seed: int,
    options: argparse.Namespace,
) -> tuple[list[Request], float]:
    """Draws the pictures with one setting. Returns the requests, and the seconds that they took."""
    config = scarce_config(
        setting,
        gpt.config.block_size,
        max_num_seqs=options.max_num_seqs,
        deterministic=options.deterministic,
    )
    pages = options.kv_cache_dtype
    config = replace(config, quantization=options.quantization, kv_cache_dtype=pages)
    engine = Engine(gpt, None, config)
    began = now(options.device)
    drawn = draw_mixed(engine, wanted, seed)
    return drawn, now(options.device) - began


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    add_model(parser, DEMO_MODEL)
    parser.add_argument(
        "--pictures",
        type=whole_number(1),
        default=200,
        metavar="N",
        help="pictures that each setting draws (default: %(default)s)",
    )
    parser.add_argument(
        "--lookahead",
        type=listed(lookahead),
        default=_SETTINGS,
        metavar="SETTINGS",
        help="auto, off or numbers of positions, with commas between them (default: "
        f"{','.join(map(str, _SETTINGS))})",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        metavar="P",
        help="none (float32), fp16 or bf16 (default: bf16 on a GPU that has it, else fp16; on a "
        "CPU none)",
    )
    parser.add_argument(
        "--max-num-seqs",
        type=whole_number(MOST_ROWS),
        metavar="ROWS",
        help="rows that run at once (default: as many as make 64 positions a pass; 24 with auto)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="as the engine's flag: more than 64 positions a pass may be computed",
    )
    add_quantization(parser)
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="chooses the pictures (default: %(default)s)",
    )
    add_device(parser)
    add_output(parser)
    typed = parser.parse_args(argv)
    typed.device = use_device(typed.device)
    for setting in typed.lookahead:
        window = 1 if isinstance(setting, str) else setting
        rows = typed.max_num_seqs or MOST_ROWS
        if rows * window > MANY_ROWS and not typed.deterministic:
            raise UserError(
                f"--lookahead {setting}: {rows} rows make more than {MANY_ROWS} positions a pass; "
                "add --deterministic"
            )
    return typed


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    typed = parse_arguments(argv)
    settings = resolve_model(
        ModelOptions(typed.gpt_model, precision=typed.precision, device=str(typed.device))
    )
    found = find_weights(settings)
    gpt = load_models(settings, found, typed.quantization).gpt
    device = device_name(typed.device)
    precision = next(name for name, known in PRECISIONS.items() if known == settings.precision)
    print(f"{device}, {typed.gpt_model}, precision {precision}, trained: {found.trained}")
    with limited_cpu_threads(gpt.config, typed.device):
        results = list(check(gpt, typed))
    figures = {
        "benchmark": "check_lookahead",
        "device": device,
        "torch": torch.__version__,
        "model": typed.gpt_model,
        "precision": precision,
        "trained": found.trained,
        **quantized_record(found, typed.quantization, typed.kv_cache_dtype),
        "pictures": typed.pictures,
        "results": results,
    }
    give_figures(figures, typed.output)
    if any(result["equal"] < typed.pictures for result in results):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)

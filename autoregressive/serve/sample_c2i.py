"""Draws pictures of classes with the engine: the plain command's flags, files and output lines, and
how fast it went.

All pictures are requests of one engine, which runs as many rows at once as --max-num-seqs and its
memory allow.
"""

from collections.abc import Sequence
from typing import NoReturn

from autoregressive.cli.command import OneLineParser, run_command, slow_imports
from autoregressive.errors import tell

with slow_imports(__name__):
    from autoregressive.cli.flags import build_parser, read_arguments
    from autoregressive.serve.engine_flags import MOST_ROWS, add_engine_flags, engine_config

COMMAND = "autoregressive/serve/sample_c2i.py"
PURPOSE = """\
Draws pictures of classes, token by token, with LlamaGen's models: the fast engine.
From the same seed it draws other pictures than the plain loop, autoregressive/sample/sample_c2i.py:
here a draw depends on the seed, the picture's number and the step alone, there on one generator
that all pictures share, as LlamaGen has it. Both draw from the same probabilities."""


def build_engine_parser() -> OneLineParser:
    """The plain command's flags and the engine's."""
    parser = build_parser(PURPOSE, COMMAND)
    add_engine_flags(parser, max_num_seqs=f"what the pictures need, at most {MOST_ROWS}")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags (the process's own if None), draws, saves, and prints how fast it went.

    Raises:
        UserError: anything that the user can mend.
    """
    # Every typed value, a class too, is checked here, before torch is imported.
    arguments = read_arguments(build_engine_parser(), argv)
    if arguments is None:
        return
    with slow_imports("__main__" if argv is None else __name__):
        from autoregressive.cli import drawing
        from autoregressive.devices import now
        from autoregressive.serve.engine.memory import saying_what_needs_less_memory
        from autoregressive.serve.floor import (
            Ceilings,
            Floor,
            job_floor,
            measure_ceilings,
            speed_lines,
        )
        from autoregressive.serve.pipeline import Pipeline, check_fits
    settings = drawing.resolve_settings(arguments)  # classes are ids from here on
    model, labels, each = settings.model, settings.labels, settings.each
    config = engine_config(arguments, min(sum(one.rows for one in each), MOST_ROWS))
    check_fits(model, config, max(each, key=lambda one: one.rows))
    if settings.compile:
        tell("--compile has no effect here: kernels and CUDA graphs take its place")
    found = drawing.find_weights_and_warn(settings)
    ceilings = None
    if model.device.type == "cuda":  # before the engine fills the memory
        with saying_what_needs_less_memory(model, config):
            ceilings = measure_ceilings(model.device, model.precision)
    pipe = Pipeline(model, found, config)
    started = now(model.device)
    # One for all numbers the pictures through.
    params = settings.sampling if settings.axes is None else each
    codes = pipe.draw(labels, params)  # [images, tokens]
    drawn = now(model.device)
    pixels = pipe.decode(codes, alone=settings.axes is not None)  # [images, 3, height, width]
    seconds = (drawn - started, now(model.device) - drawn)
    drawing.save_results(
        settings,
        found,
        codes,
        pixels,
        seconds,
        loop="paged",
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        tensor_parallel_size=config.tensor_parallel_size,
    )
    # The steps do not depend on the ceilings.
    floor = Floor(
        pipe.models.gpt.config,
        model.precision.itemsize,
        ceilings or Ceilings(1.0, 1.0),
        found.quantized_as(config.quantization),
        config.kv_cache_dtype,
    )
    job = job_floor(floor, pipe.engine.scheduler.limits, each)
    tokens, totals = model.tokens_per_image, pipe.engine.totals
    print("\n".join(speed_lines(len(labels), tokens, seconds, job, ceilings, totals)))


def command() -> NoReturn:
    """Runs the installed command `llamagen-sample`."""
    run_command(main)


if __name__ == "__main__":
    command()

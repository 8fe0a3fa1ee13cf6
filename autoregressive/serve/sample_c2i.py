"""Draws pictures of classes with the engine: the naive command's flags, files and output lines, and
how fast it went.

All pictures are requests of one engine, which runs as many rows at once as --max-num-seqs and its
memory allow.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from autoregressive.cli.command import OneLineParser, run_command, slow_imports
from autoregressive.errors import UserError, on_terminal, tell

with slow_imports(__name__):
    import torch
    from torch import Tensor
    from tqdm import tqdm

    from autoregressive.cli.flags import build_parser
    from autoregressive.cli.results import save_results
    from autoregressive.cli.settings import (
        SamplingSettings,
        Settings,
        list_classes,
        resolve_settings,
    )
    from autoregressive.devices import now, threads_that_pay
    from autoregressive.models.config import GPT_SHAPES
    from autoregressive.models.generate import NonFiniteLogitsError
    from autoregressive.serve.arguments import (
        add_engine_flags,
        as_flags,
        engine_config,
        saying_what_needs_less_memory,
    )
    from autoregressive.serve.engine.batch import BatchShape
    from autoregressive.serve.engine.config import EngineConfig
    from autoregressive.serve.engine.engine import Engine
    from autoregressive.serve.engine.request import SamplingParams
    from autoregressive.serve.engine.scheduler import Limits, Scheduler
    from autoregressive.serve.floor import Ceilings, Floor, JobFloor, job_floor, measure_ceilings
    from autoregressive.weights.finding import find_weights, untrained_warning
    from autoregressive.weights.loading import LoadedModels, load_models
    from kernels.dispatch import select_operations

COMMAND = "autoregressive/serve/sample_c2i.py"
PURPOSE = """\
Draws pictures of classes, token by token, with LlamaGen's models: the fast engine.
From the same seed it draws other pictures than the plain loop, autoregressive/sample/sample_c2i.py:
here a draw depends on the seed, the picture's number and the step alone, there on one generator
that all pictures share, as LlamaGen has it. Both draw from the same probabilities."""
_IMAGES_DECODED_AT_ONCE = 64  # 113 MB of pixels at 384 px, and enough to keep a GPU busy
_MOST_ROWS = 512  # of the default; the matrix units are busy by then


@dataclass(frozen=True)
class Speed:
    """How fast the pictures were drawn."""

    images: int
    tokens: int  # of an image
    sampling_seconds: float
    decoding_seconds: float
    job: JobFloor
    ceilings: Ceilings | None  # None: not measured, for there is no GPU

    def lines(self) -> list[str]:
        """The speed as the command prints it."""
        seconds = self.sampling_seconds
        tokens_per_second = self.images * self.tokens / seconds
        images_per_second = self.images / (seconds + self.decoding_seconds)
        step_ms = seconds / self.job.steps * 1e3
        rates = (
            f"{tokens_per_second:.0f} tokens/s, {images_per_second:.2f} images/s with "
            f"decoding, {step_ms:.3f} ms/step."
        )
        return [rates] if self.ceilings is None else [rates, self._share(self.ceilings)]

    def _share(self, ceilings: Ceilings) -> str:
        terabytes, teraflops = (
            ceilings.read_bytes_per_second / 1e12,
            ceilings.operations_per_second / 1e12,
        )
        return (
            f"share of the memory floor: {self.job.seconds / self.sampling_seconds:.1%} (at best "
            f"{self.job.seconds:.3f} seconds, "
            f"with the {terabytes:.2f} TB/s and {teraflops:.0f} TFLOP/s measured here)."
        )


def build_engine_parser() -> OneLineParser:
    """The naive command's flags and the engine's."""
    parser = build_parser(PURPOSE, COMMAND)
    add_engine_flags(parser, max_num_seqs=f"what the pictures need, at most {_MOST_ROWS}")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags (the process's own if None), draws, saves.

    Raises:
        UserError: anything that the user can mend.
    """
    arguments = build_engine_parser().parse_args(argv)
    if arguments.list_classes is not None:
        print(list_classes(arguments))
        return
    settings = resolve_settings(arguments)
    params = sampling_params(settings.sampling)
    config = engine_config(arguments, min(len(settings.labels) * params.rows, _MOST_ROWS))
    check_fits(params, config, settings)
    if settings.compile:
        tell("--compile has no effect here: kernels and CUDA graphs take its place")
        settings = replace(settings, compile=False)  # the pictures' record must not claim it
    if settings.note is not None:
        tell(settings.note)
    found = find_weights(settings.model)
    if settings.model.device.type == "cuda":
        torch.cuda.set_device(settings.model.device)
    with saying_what_needs_less_memory(settings.model):
        models = load_models(settings.model, found)
    warning = untrained_warning(settings.model, found)
    if warning is not None:
        tell(warning)
    try:
        with saying_what_needs_less_memory(settings.model, config):
            codes, pixels, speed = draw(models, settings, params, config)
    except NonFiniteLogitsError as error:
        raise UserError(f"{error}; try --precision none, or other weights") from error
    grid = save_results(settings, found, codes, pixels, loop="paged")
    # Only now: a pipe whose reader has left, or a full disk behind stdout, must not cost the
    # pictures.
    print(f"gpt sampling takes about {speed.sampling_seconds:.2f} seconds.")
    print(f"decoder takes about {speed.decoding_seconds:.2f} seconds.")
    print(f"image is saved to {grid}")
    print("\n".join(speed.lines()))


def sampling_params(sampling: SamplingSettings) -> SamplingParams:
    """The engine's name for the same values; one request an image."""
    return SamplingParams(**asdict(sampling))


def check_fits(params: SamplingParams, config: EngineConfig, settings: Settings) -> None:
    """Finds out before any long work whether the engine can ever draw such a picture; how much
    memory there is shows later.

    Raises:
        UserError: too few rows or pages were asked for, or a backend that does not run on the
            device.
    """
    model = settings.model
    gpt = GPT_SHAPES[model.gpt_model]
    shape = BatchShape.of(config.max_num_seqs, model.tokens_per_image, config.page_size)
    pages = config.num_pages or params.rows * shape.pages_per_row
    limits = Limits(
        shape.tokens, shape.page_size, shape.max_rows, pages, shape.num_slots, model.num_classes
    )
    try:
        head_size = gpt.dim // gpt.n_head
        select_operations(
            model.device,
            model.precision,
            gpt.n_head,
            head_size,
            config.attention_backend,
            tell=lambda _: None,
        )
        Scheduler(limits).check_fits(params)
    except ValueError as error:
        raise UserError(as_flags(str(error))) from error


def draw(
    models: LoadedModels, settings: Settings, params: SamplingParams, config: EngineConfig
) -> tuple[Tensor, Tensor, Speed]:
    """Builds the engine and draws every picture: codes int32 [images, tokens] and pixels [images,
    3, height, width].

    Raises:
        UserError: the engine does not fit on the device, or a picture does not fit into the engine.
    """
    model, device = settings.model, settings.model.device
    ceilings = measure_ceilings(device, model.precision) if device.type == "cuda" else None
    engine = start_engine(models, config)
    started = now(device)
    try:
        with threads_that_pay(models.gpt.config, device):
            codes = engine.generate(settings.labels, params, progress=on_terminal(), decode=False)
    except ValueError as error:
        raise UserError(as_flags(str(error))) from error
    drawn = now(device)
    assert engine.decoder is not None
    # A few at a time, which a GPU's memory holds however many were asked for.
    pixels = torch.cat(
        [
            engine.decoder.decode(part.to(device)).cpu()
            for part in codes.split(_IMAGES_DECODED_AT_ONCE)
        ]
    )
    decoded = now(device)
    # the steps do not depend on it
    floor = Floor(models.gpt.config, model.precision.itemsize, ceilings or Ceilings(1.0, 1.0))
    job = job_floor(floor, engine.scheduler.limits, [params] * len(settings.labels))
    speed = Speed(
        len(settings.labels),
        model.tokens_per_image,
        drawn - started,
        decoded - drawn,
        job,
        ceilings,
    )
    return codes, pixels, speed


def start_engine(models: LoadedModels, config: EngineConfig) -> Engine:
    """An engine that is ready to draw; the capture of CUDA graphs shows as a bar on a terminal.

    Raises:
        UserError: it does not fit on the device.
    """
    hidden = not on_terminal() or not config.runner.uses_graphs(
        models.gpt.tok_embeddings.weight.device
    )
    columns, lines = shutil.get_terminal_size()  # as in `Engine.generate`
    with tqdm(
        desc="preparing", unit=" graphs", disable=hidden, leave=False, ncols=columns, nrows=lines
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            return Engine(models.gpt, models.vq, config, on_progress=progress)
        except ValueError as error:
            raise UserError(as_flags(str(error))) from error


if __name__ == "__main__":
    run_command(main)

"""The engine's way from flags to files, and how fast it went."""

import argparse
from dataclasses import dataclass, replace

import torch

from autoregressive.cli.command import flag_of
from autoregressive.cli.results import save_results
from autoregressive.cli.settings import Settings, resolve_settings
from autoregressive.devices import now
from autoregressive.errors import SettingName, UserError, tell
from autoregressive.models.generate import NonFiniteLogitsError
from autoregressive.serve.engine.batch import BatchShape
from autoregressive.serve.engine.config import EngineConfig
from autoregressive.serve.engine.memory import saying_what_needs_less_memory
from autoregressive.serve.engine.model_runner import check_backend
from autoregressive.serve.engine.scheduler import Limits, Scheduler
from autoregressive.serve.engine_flags import MOST_ROWS, engine_config
from autoregressive.serve.floor import Ceilings, Floor, JobFloor, job_floor, measure_ceilings
from autoregressive.serve.pipeline import Pipeline
from autoregressive.weights.finding import FoundWeights, find_weights, missing_weights


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


def run(arguments: argparse.Namespace) -> None:
    """Draws and saves what was asked for, and prints how fast it went.

    Raises:
        UserError: anything that the user can mend.
    """
    settings = resolve_settings(arguments)
    rows = min(len(settings.labels) * settings.sampling.rows, MOST_ROWS)
    config = engine_config(arguments, rows)
    check_fits(settings, config)
    if settings.compile:
        tell("--compile has no effect here: kernels and CUDA graphs take its place")
        settings = replace(settings, compile=False)  # the pictures' record must not claim it
    if settings.note is not None:
        tell(settings.note)
    found = find_weights(settings.model)
    try:
        draw_and_save(settings, found, config)
    except NonFiniteLogitsError as error:
        told = f"{error}; try "
        raise UserError(told, SettingName("precision"), " none, or other weights") from error


def draw_and_save(settings: Settings, found: FoundWeights, config: EngineConfig) -> None:
    """Draws the pictures as requests of one engine, saves them, and prints how fast it went.

    Raises:
        UserError: the models or the engine do not fit on the device, or a file cannot be written.
    """
    model, device, params = settings.model, settings.model.device, settings.sampling
    missing = missing_weights(model, found)
    if missing is not None:
        tell(missing.warning(flag_of))
    ceilings = None
    if device.type == "cuda":  # before the engine fills the memory
        torch.cuda.set_device(device)
        with saying_what_needs_less_memory(model, config):
            ceilings = measure_ceilings(device, model.precision)
    pipe = Pipeline(settings.choice, found, config)
    started = now(device)
    codes = pipe.draw(settings.labels, params)
    drawn = now(device)
    pixels = pipe.decode(codes)
    decoded = now(device)
    # The steps do not depend on the ceilings.
    floor = Floor(pipe.models.gpt.config, model.precision.itemsize, ceilings or Ceilings(1.0, 1.0))
    job = job_floor(floor, pipe.engine.scheduler.limits, [params] * len(settings.labels))
    seconds = (drawn - started, decoded - drawn)
    speed = Speed(len(settings.labels), model.tokens_per_image, *seconds, job, ceilings)
    grid = save_results(settings, found, codes, pixels, loop="paged")
    # Only now: a pipe whose reader has left, or a full disk behind stdout, must not cost the
    # pictures.
    print(f"gpt sampling takes about {speed.sampling_seconds:.2f} seconds.")
    print(f"decoder takes about {speed.decoding_seconds:.2f} seconds.")
    print(f"image is saved to {grid}")
    print("\n".join(speed.lines()))


def check_fits(settings: Settings, config: EngineConfig) -> None:
    """Finds out before any long work whether the engine can ever draw such a picture; how much
    memory there is shows later.

    Raises:
        UserError: too few rows or pages were asked for, or a backend that does not run on the
            device.
    """
    model, params = settings.model, settings.sampling
    check_backend(config, model.device)
    shape = BatchShape.of(config.max_num_seqs, model.tokens_per_image, config.page_size)
    pages = config.num_pages or params.rows * shape.pages_per_row
    limits = Limits(
        shape.tokens, shape.page_size, shape.max_rows, pages, shape.num_slots, model.num_classes
    )
    Scheduler(limits).check_fits(params)

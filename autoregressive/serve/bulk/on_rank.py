"""The bulk command's way from flags to files, on one rank."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from autoregressive.cli.command import tell_error
from autoregressive.cli.flags import model_options
from autoregressive.devices import set_llamagen_numerics
from autoregressive.errors import UserError, tell
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.bulk.job import BulkJob, evaluation_size
from autoregressive.serve.bulk.job_run import run_job
from autoregressive.serve.bulk.labels import labels_name, make_labels
from autoregressive.serve.bulk.options import CPU_IMAGES, NAIVE_BATCH
from autoregressive.serve.bulk.ranks import OtherRankFailedError, Ranks
from autoregressive.serve.bulk.sources import EngineSource, NaiveSource, Source
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.memory import saying_what_needs_less_memory
from autoregressive.serve.engine_flags import MOST_ROWS, engine_config
from autoregressive.serve.pipeline import Pipeline, check_fits
from autoregressive.weights.finding import find_weights, missing_weights, resolve_model
from autoregressive.weights.loading import load_models


def run(arguments: argparse.Namespace, sampling: SamplingParams, ranks: Ranks, began: float) -> int:
    """Runs the job on this rank. Returns the exit status.

    Args:
        arguments: checked flags of the bulk command.
        began: when the process began, as `time.perf_counter`.

    What the user can mend is told here.
    """
    try:
        job, config = ranks.first_then_others(lambda: resolve(arguments, sampling, ranks))
        with saying_what_needs_less_memory(job.model, config):
            report = run_job(
                job,
                Path(arguments.sample_dir),
                ranks,
                _source_maker(job, config),
                save_png=arguments.save_png,
                began=began,
            )
    except OtherRankFailedError:
        ranks.wait_for_end()
        return 2
    except UserError as error:
        tell_error(error)  # before the others end, and the launcher ends this rank
        return 2
    except KeyboardInterrupt:
        if ranks.first:
            tell("interrupted: run the same command again to go on with what is kept")
        return 130
    if ranks.first:
        print("\n".join(report.lines(ranks.count)))
    return 0


def resolve(
    arguments: argparse.Namespace, sampling: SamplingParams, ranks: Ranks
) -> tuple[BulkJob, EngineConfig]:
    """Fills in what was not typed, and finds or downloads the weights.

    Raises:
        UserError: as `resolve_model`, `find_weights` and `check_fits`; there are no trained
            weights, or the labels do not fit the job.
    """
    device = ranks.device(arguments.device, arguments.tensor_parallel_size or 1)
    model = resolve_model(replace(model_options(arguments), device=device), sampling.seed)
    labels = make_labels(
        arguments.labels, arguments.num_fid_samples, model.num_classes, sampling.seed
    )
    batch = arguments.per_proc_batch_size
    share = -(-len(labels) // ranks.count)
    most = CPU_IMAGES * sampling.rows if model.device.type == "cpu" else MOST_ROWS
    rows = batch * sampling.rows if batch else min(most, share * sampling.rows)
    config = engine_config(arguments, rows)
    check_fits(model, config, sampling)
    if model.note is not None and ranks.first:
        tell(model.note)
    found = find_weights(model)
    missing = missing_weights(model, found)
    if missing is not None and not model.random_weights:
        raise missing
    job = BulkJob(
        model,
        found,
        sampling,
        evaluation_size(model, arguments.image_size_eval),
        labels,
        labels_name(arguments.labels),
        naive_batch=(batch or NAIVE_BATCH) if arguments.naive else None,
        compiled=arguments.naive and arguments.compile,
        deterministic=config.deterministic,
        attention_backend=config.attention_backend,
        quantization=found.quantized_as(config.quantization),
        kv_cache_dtype=config.kv_cache_dtype,
        tensor_parallel_size=config.tensor_parallel_size,
    )
    return job, config


def _source_maker(job: BulkJob, config: EngineConfig) -> Callable[[], Source]:
    """What loads the models and makes what draws with them."""

    def engine_source() -> Source:
        return EngineSource(job, Pipeline(job.model, job.found, config).engine)

    def naive_source() -> Source:
        set_llamagen_numerics(job.model.device)
        with saying_what_needs_less_memory(job.model):
            models = load_models(job.model, job.found)
        gpt = models.gpt
        if job.compiled:
            gpt = cast(Transformer, torch.compile(gpt, mode="reduce-overhead", fullgraph=True))
        return NaiveSource(job, gpt, models.vq)

    return engine_source if job.naive_batch is None else naive_source

"""Classes in, pictures out, in two calls: the front door of the engine.

pipe = Pipeline.from_pretrained("GPT-demo")
result = pipe("fox", n=4, seed=7)
result.images[0].save("fox.png")

The command `serve/sample_c2i.py` draws by `Pipeline.draw` and `Pipeline.decode`, too.
"""

import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoregressive.devices import limited_cpu_threads
from autoregressive.errors import SettingError, UserError, did_you_mean, on_terminal
from autoregressive.models.axes import GridAxes
from autoregressive.models.config import GPT_SHAPES
from autoregressive.models.sampling_params import SamplingParams, random_seed
from autoregressive.output.images import as_image, picture_grid
from autoregressive.output.records import axes_record, generation_record, image_record
from autoregressive.progress import progress_bar
from autoregressive.serve.bulk.job import BulkJob, evaluation_size
from autoregressive.serve.bulk.job_run import BulkReport, run_job
from autoregressive.serve.bulk.labels import Labels, labels_name, make_labels
from autoregressive.serve.bulk.options import BULK_BOUNDS, NUM_FID_SAMPLES, RANDOM
from autoregressive.serve.bulk.ranks import Ranks
from autoregressive.serve.bulk.sources import EngineSource
from autoregressive.serve.engine.batch import BatchShape
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.memory import saying_what_needs_less_memory
from autoregressive.serve.engine.model_runner import check_device
from autoregressive.serve.engine.scheduler import Limits, Scheduler
from autoregressive.serve.results import GeneratedImage, GridResult, Result
from autoregressive.serve.worker.rank_processes import ModelRanks, start_ranks
from autoregressive.weights.finding import (
    FoundWeights,
    ModelSettings,
    check_ranks,
    find_weights,
    missing_weights,
    resolve_model,
)
from autoregressive.weights.loading import LoadedModels, load_models
from autoregressive.weights.options import ModelOptions

_IMAGES_DECODED_AT_ONCE = 64  # 113 MB of pixels at 384 px, and enough to keep a GPU busy


class Pipeline:
    """A pretrained model with an engine around it. Calls from several threads wait for each other.

    Args:
        model: which one, where.
        found: its weights.
        config: how the engine is built.

    Attributes:
        classes: the names of the classes, by id.
        defaults: the sampling parameters of a call that says nothing else.

    Raises:
        UserError: a checkpoint is damaged, or the engine does not fit on the device.
    """

    def __init__(self, model: ModelSettings, found: FoundWeights, config: EngineConfig) -> None:
        self.model, self.found, self.config = model, found, config
        self.classes, self.defaults = model.classes, model.defaults.sampling
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)
        check_device(config, model.device, found.quantized_as(config.quantization))
        with start_ranks(model, found.gpt, config) as self._ranks:
            with saying_what_needs_less_memory(model):
                self.models = load_models(model, found, config.quantization, self._ranks.rank)
            with saying_what_needs_less_memory(self.model, self.config):
                self.engine = start_engine(self.models, self._ranks)
        self._turn = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "GPT-demo",
        *,
        engine: EngineConfig | None = None,
        **options: Any,
    ) -> "Pipeline":
        """Loads a model by its name, or from a checkpoint.

        Args:
            model: "GPT-demo", "GPT-B" ... "GPT-3B", or the path of a .pt, a .safetensors, or a
                folder of sharded weights.
            engine: how the engine is built, such as `EngineConfig(lookahead="off")`.
            options: more about the model, by the names of `ModelOptions`: `download=True` fetches
                published weights, `gpt_model` says which model a checkpoint belongs to, and
                `vq_ckpt`, `image_size`, `precision`, `device` and others mean what the command's
                flags mean.

        Raises:
            ValueError: there is no such model, file or option, or it has no trained weights and
                `random_weights` was not asked for. The message says what to do.
        """
        known = sorted(option.name for option in fields(ModelOptions))
        of_engine = [setting.name for setting in fields(EngineConfig)]
        for name in options:
            if name in of_engine:
                raise UserError(
                    f"{name} is a setting of the engine: give engine=EngineConfig({name}=...)"
                )
            if name not in known:
                raise UserError(f"there is no option {name}{did_you_mean(name, known)}")
        if not isinstance(model, str | os.PathLike):
            raise SettingError("model", model, "must be a name or a path")
        if not isinstance(engine, EngineConfig | None):
            raise SettingError("engine", engine, "must be an EngineConfig")
        named = _model_option(os.fspath(model))
        if twice := named.keys() & options.keys():
            raise UserError(
                f"the model is named twice, by model and by {twice.pop()}: leave one out"
            )
        options |= named
        for name in ("gpt_ckpt", "vq_ckpt", "pretrained_dir"):
            if options.get(name) is not None:
                options[name] = Path(options[name])
        settings = resolve_model(ModelOptions(**options))
        if settings.note is not None:
            warnings.warn(settings.note, stacklevel=2)
        found = find_weights(settings)
        missing = missing_weights(settings, found)
        if missing is not None and not settings.random_weights:
            raise missing
        return cls(settings, found, engine or EngineConfig())

    def close(self) -> None:
        """Ends the processes of the other ranks, if several share the model, when the call of
        another thread is done. Nothing can be drawn afterwards. The end of this process does it,
        too.
        """
        with self._turn:
            self._ranks.stop()

    def __call__(
        self,
        classes: int | str | Iterable[int | str],
        *,
        n: int = 1,
        seed: int | None = None,
        cfg_scale: float | None = None,
        cfg_interval: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        progress: bool | None = None,
    ) -> Result:
        """Draws images of one class or of several.

        Args:
            classes: names or ids.
            n: images of each class.
            seed: of the first image; each further one has the next seed. None: a random one.
            cfg_scale, cfg_interval, temperature, top_k, top_p: as of `SamplingParams`; None: the
                model's own default.
            progress: whether a bar is shown; None: where stderr is a terminal.

        Raises:
            ValueError: there is no such class, or a value is out of range.
            NonFiniteLogitsError: the model gave NaN or infinite logits.
        """
        wanted = _class_list(classes)
        SamplingParams(n=n)  # checks it
        labels = [label for one in wanted for label in [self.classes.resolve(one)] * n]
        first = random_seed() if seed is None else seed
        params = self.defaults.updated(
            seed=first,
            cfg_scale=cfg_scale,
            cfg_interval=cfg_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        each = [params.updated(seed=first + index) for index in range(len(labels))]
        codes = self.draw(labels, each, progress=progress)
        images = self._images(self.decode(codes), labels, each)
        return Result(images, codes, labels, [one.seed for one in each])

    def grid(
        self,
        axes: Mapping[str, Iterable[int | float | str]],
        class_label: int | str | None = None,
        *,
        seed: int | None = None,
        cfg_scale: float | None = None,
        cfg_interval: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        progress: bool | None = None,
    ) -> GridResult:
        """Draws one class with each value of an axis, or with each pair of values of two.

        Args:
            axes: setting -> its values; the first goes from left to right, the second from top to
                bottom. A setting is "class", "seed", "cfg_scale" (or "guidance"), or another one
                below.
            class_label: name or id; None: the first of the model's own choice.
            seed: of every image; None: a random one, the same for all.
            cfg_scale, cfg_interval, temperature, top_k, top_p: of every image, as of
                `SamplingParams`; None: the model's own default.
            progress: whether a bar is shown; None: where stderr is a terminal.

        Raises:
            ValueError: an axis or a value cannot be used, a setting of an axis is given here, too,
                or there are more than `MOST_PICTURES`.
            NonFiniteLogitsError: the model gave NaN or infinite logits.
        """
        if not isinstance(axes, Mapping):
            raise UserError('axes: must be a dict, such as {"guidance": [1, 2, 4]}')
        checked = GridAxes.of(axes.items(), self.classes)
        given: dict[str, Any] = {
            "seed": seed,
            "cfg_scale": cfg_scale,
            "cfg_interval": cfg_interval,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        checked.check_said_once({"class_label": class_label, **given})
        label = self.model.defaults.class_labels[0]
        if class_label is not None:
            wanted = _class_list(class_label)
            if len(wanted) > 1:
                raise UserError('class_label: must be one; the axis "class" takes several')
            label = self.classes.resolve(wanted[0])
        params = self.defaults.updated(seed=random_seed()).updated(**given)
        cells = checked.cells(label, params)
        labels, each = [one for one, _ in cells], [one for _, one in cells]
        codes = self.draw(labels, each, progress=progress)
        record = axes_record(
            self._record(),
            params,
            checked,
            label=label,
            class_name=self.classes[label],
        )
        images = self._images(self.decode(codes, alone=True), labels, each)
        seeds = [one.seed for one in each]
        return GridResult(images, codes, labels, seeds, checked, record)

    def _images(
        self, pixels: Tensor, labels: Sequence[int], each: Sequence[SamplingParams]
    ) -> list[GeneratedImage]:
        """Pixels [images, 3, height, width] of these classes and parameters as images."""
        common = self._record()
        return [
            GeneratedImage(
                as_image(picture_grid(one[None])),
                image_record(common, params, label=label, class_name=self.classes[label]),
            )
            for label, params, one in zip(labels, each, pixels, strict=True)
        ]

    def _record(self) -> dict[str, object]:
        """How every picture is made; see `generation_record`."""
        return generation_record(
            self.model,
            self.found,
            "paged",
            quantization=self.config.quantization,
            kv_cache_dtype=self.config.kv_cache_dtype,
            tensor_parallel_size=self.config.tensor_parallel_size,
        )

    def draw(
        self,
        labels: Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        progress: bool | None = None,
    ) -> Tensor:
        """Draws the codes of images: int32 [images, tokens] on the CPU; see `Engine.generate`."""
        shown = on_terminal() if progress is None else progress
        few_threads = limited_cpu_threads(self.models.gpt.config, self.model.device)
        with self._turn, few_threads, saying_what_needs_less_memory(self.model, self.config):
            return self.engine.generate(labels, params, progress=shown, decode=False)

    def decode(self, codes: Tensor, *, alone: bool = False) -> Tensor:
        """Codes [images, tokens] -> pixels [images, 3, height, width], about -1..1, on the CPU.

        They are decoded a few at a time, which a GPU's memory holds however many there are. On a
        GPU the decoder is a captured graph on a stream of its own.

        Args:
            alone: decode one at a time, so that the last bits of an image's pixels do not depend
                on how many others there are.
        """
        decoder = self.engine.decoder
        assert decoder is not None
        with self._turn, saying_what_needs_less_memory(self.model, self.config):
            parts = codes.split(1 if alone else _IMAGES_DECODED_AT_ONCE)
            return torch.cat([decoder.decode(part.to(self.model.device)).cpu() for part in parts])

    def bulk(
        self,
        sample_dir: str | os.PathLike[str] = "samples",
        images: int = NUM_FID_SAMPLES,
        *,
        labels: Labels = RANDOM,
        seed: int = 0,
        image_size_eval: int | None = None,
        cfg_scale: float = 1.5,
        cfg_interval: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        save_png: bool = False,
        progress: bool | None = None,
    ) -> BulkReport:
        """Draws many images into a file for an evaluation such as FID, and goes on where an earlier
        call was interrupted; as the command `autoregressive/sample/sample_c2i_ddp.py` does on one
        GPU.

        Args:
            sample_dir: the npz file and the job's folder go there; made if need be.
            labels: "random", "balanced", a file with the class of each image, or these ids.
            seed: with `deterministic` image k depends on it and on k alone.
            image_size_eval: pixels that images are resized to; None: 256, or the model's size
                where that is less.
            cfg_scale, cfg_interval, temperature, top_k, top_p: as of `SamplingParams`; the defaults
                are those of LlamaGen's bulk command.
            save_png: also save each image in the job's folder.
            progress: whether bars are shown; None: where stderr is a terminal.

        Raises:
            UserError: a value is out of range, the folder is of another job, or a file cannot be
                written. What was kept stays.
        """
        params = SamplingParams(cfg_scale, cfg_interval, temperature, top_k, top_p, seed)
        self.engine.scheduler.check_fits(params)
        BULK_BOUNDS["num_fid_samples"].check("images", images)
        job = BulkJob(
            self.model,
            self.found,
            params,
            evaluation_size(self.model, image_size_eval),
            make_labels(labels, images, self.model.num_classes, seed),
            labels_name(labels),
            deterministic=self.config.deterministic,
            attention_backend=self.config.attention_backend,
            quantization=self.config.quantization,
            kv_cache_dtype=self.config.kv_cache_dtype,
            tensor_parallel_size=self.config.tensor_parallel_size,
        )
        with self._turn, saying_what_needs_less_memory(self.model, self.config):
            return run_job(
                job,
                Path(sample_dir),
                Ranks(),
                lambda: EngineSource(job, self.engine),
                save_png=save_png,
                progress=progress,
            )


def _class_list(classes: int | str | Iterable[int | str]) -> list[int | str]:
    """The classes of a call.

    Raises:
        UserError: there are none, or one is neither a name nor an id.
    """
    wanted: list[Any] = [classes]
    if isinstance(classes, Iterable) and not isinstance(classes, str | bytes):
        wanted = list(classes)
    if not wanted:
        raise UserError("there are no classes to draw: give one or more")
    for one in wanted:
        if not isinstance(one, Integral | str) or isinstance(one, bool):
            raise UserError(f"class {one!r}: must be a name or a whole number")
    return wanted


def _model_option(model: str) -> dict[str, str]:
    """The option that a name or a path means."""
    if model in GPT_SHAPES:
        return {"gpt_model": model}
    if os.path.exists(model) or os.sep in model or Path(model).suffix:
        return {"gpt_ckpt": model}
    names = f": use {', '.join(GPT_SHAPES)}, or a file or folder"
    told = did_you_mean(model, list(GPT_SHAPES)) or names
    raise SettingError("model", model, f"there is no such model or file{told}")


def start_engine(models: LoadedModels, ranks: ModelRanks) -> Engine:
    """An engine that is ready to draw; the capture of CUDA graphs shows as a bar on a terminal.

    Raises:
        UserError: it does not fit on the device.
    """
    device = models.gpt.tok_embeddings.weight.device
    shown = on_terminal() and ranks.config.uses_graphs(device)
    with progress_bar("preparing", " graphs", shown=shown, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return Engine(models.gpt, models.vq, ranks.config, ranks.make_runner, progress)


def check_fits(model: ModelSettings, config: EngineConfig, params: SamplingParams) -> None:
    """Finds out before any long work whether an engine can ever draw such pictures. How much memory
    there is shows later.

    Raises:
        UserError: too few rows or pages were asked for, a backend that does not run on the device,
            or ranks that cannot share the model.
    """
    check_device(config, model.device)
    check_ranks(model, config.tensor_parallel_size)
    shape = BatchShape.of(config.max_num_seqs, model.tokens_per_image, config.page_size)
    pages = config.num_pages or params.rows * shape.pages_per_row
    limits = Limits(
        shape.tokens, shape.page_size, shape.max_rows, pages, shape.num_slots, model.num_classes
    )
    Scheduler(limits).check_fits(params)

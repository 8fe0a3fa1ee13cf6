"""Classes in, pictures out, in two calls: the front door of the engine.

pipe = Pipeline.from_pretrained("GPT-demo")
result = pipe("fox", n=4, seed=7)
result.images[0].save("fox.png")
"""

import io
import os
import secrets
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autoregressive.devices import limited_cpu_threads
from autoregressive.errors import SettingError, UserError, did_you_mean, on_terminal
from autoregressive.models.classes import ClassNames
from autoregressive.models.config import GPT_SHAPES
from autoregressive.models.sampling import SamplingParams
from autoregressive.output.images import PICTURE_FORMATS, QUALITY, picture_grid, record_options
from autoregressive.output.records import generation_record, image_record, readable
from autoregressive.progress import progress_bar
from autoregressive.serve.engine.config import EngineConfig
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.memory import saying_what_needs_less_memory
from autoregressive.serve.engine.model_runner import check_backend
from autoregressive.weights.choice import ModelChoice, resolve_model
from autoregressive.weights.finding import FoundWeights, find_weights, missing_weights
from autoregressive.weights.loading import LoadedModels, load_models
from autoregressive.weights.options import ModelOptions

_IMAGES_DECODED_AT_ONCE = 64  # 113 MB of pixels at 384 px, and enough to keep a GPU busy
_SEEDS = 2**31  # so many are drawn from where none is given


class GeneratedImage(Image.Image):
    """A picture with the parameters that it was made with, which go into its files too."""

    @classmethod
    def of(cls, image: Image.Image, record: dict[str, object]) -> "GeneratedImage":
        """A picture with its record."""
        made = cls()
        made.__dict__.update(image.__dict__)
        made.info = {"record": record}
        return made

    @property
    def record(self) -> dict[str, object]:
        """How it was made, ready for JSON."""
        return self.info["record"]

    def copy(self) -> "GeneratedImage":
        """A picture of its own with the same record."""
        return GeneratedImage.of(super().copy(), self.record)

    __copy__ = copy

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Saves as `PIL.Image.Image.save` does; a PNG, JPEG or WebP file has the record inside."""
        suffix = Path(fp).suffix.lower() if isinstance(fp, str | os.PathLike) else ""
        known = PICTURE_FORMATS.get(suffix)
        name = format or (known.name if known is not None else None)
        if name is not None and name.upper() in {one.name for one in PICTURE_FORMATS.values()}:
            options = record_options(name.upper(), readable(self.record), self.record)
            if name.upper() != "PNG":
                options["quality"] = QUALITY
            params = options | params
        super().save(fp, format, **params)


@dataclass(frozen=True)
class Result:
    """The images of one call, those of one class side by side. A notebook shows them as a grid."""

    images: list[GeneratedImage]
    codes: Tensor  # int32 [images, tokens] on the CPU
    labels: list[int]  # the class of each image
    seeds: list[int]  # of each image: with it alone, the image is drawn again

    @cached_property
    def grid(self) -> Image.Image:
        """All images on one picture, four a row, with the names of their classes."""
        pixels = torch.stack([torch.from_numpy(np.array(one)) for one in self.images])
        names = [str(one.record["class_name"]) for one in self.images]
        grid = picture_grid(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, names)
        return Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.grid.save(content, format="PNG")
        return content.getvalue()


class Pipeline:
    """A pretrained model with an engine around it. Calls from several threads wait for each other.

    Args:
        choice: which model, where.
        found: its weights.
        config: how the engine is built.

    Attributes:
        classes: the names of the classes, by id.
        defaults: the sampling parameters of a call that says nothing else.

    Raises:
        UserError: a checkpoint is damaged, or the engine does not fit on the device.
    """

    classes: ClassNames
    defaults: SamplingParams
    engine: Engine

    def __init__(self, choice: ModelChoice, found: FoundWeights, config: EngineConfig) -> None:
        self.choice, self.found = choice, found
        self.classes, self.defaults = choice.classes, choice.defaults.sampling
        self.device = choice.model.device
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        check_backend(config, self.device)
        self._sparing_memory = partial(saying_what_needs_less_memory, choice.model, config)
        with saying_what_needs_less_memory(choice.model):
            self.models = load_models(choice.model, found)
        with self._sparing_memory():
            self.engine = start_engine(self.models, config)
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
            engine: how the engine is built.
            options: more about the model, by the names of `ModelOptions`: `download=True` fetches
                published weights, `gpt_model` says which model a checkpoint belongs to, and
                `vq_ckpt`, `image_size`, `precision`, `device` and others mean what the command's
                flags mean.

        Raises:
            ValueError: there is no such model, file or option, or it has no trained weights and
                `random_weights` was not asked for. The message says what to do.
        """
        known = sorted(vars(ModelOptions()))
        for name in options:
            if name not in known:
                raise UserError(f"there is no option {name}{did_you_mean(name, known)}")
        for name in ("gpt_ckpt", "vq_ckpt", "pretrained_dir"):
            if options.get(name) is not None:
                options[name] = Path(options[name])
        named = _model_option(os.fspath(model))
        if twice := named.keys() & options.keys():
            raise UserError(
                f"the model is named twice, by model and by {twice.pop()}: leave one out"
            )
        choice = resolve_model(ModelOptions(**named, **options))
        if choice.note is not None:
            warnings.warn(choice.note, stacklevel=2)
        found = find_weights(choice.model)
        missing = missing_weights(choice.model, found)
        if missing is not None and not choice.model.random_weights:
            raise missing.error()
        return cls(choice, found, engine or EngineConfig())

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
        first = secrets.randbelow(_SEEDS) if seed is None else seed
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
        return self._result(labels, each, codes, self.decode(codes))

    def draw(
        self,
        labels: Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        progress: bool | None = None,
    ) -> Tensor:
        """Draws the codes of images: int32 [images, tokens] on the CPU; see `Engine.generate`."""
        shown = on_terminal() if progress is None else progress
        few_threads = limited_cpu_threads(self.models.gpt.config, self.device)
        with self._turn, few_threads, self._sparing_memory():
            return self.engine.generate(labels, params, progress=shown, decode=False)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [images, tokens] -> pixels [images, 3, height, width], about -1..1, on the CPU.

        They are decoded a few at a time, which a GPU's memory holds however many there are.
        """
        decoder = self.engine.decoder
        assert decoder is not None
        with self._turn, self._sparing_memory():
            parts = codes.split(_IMAGES_DECODED_AT_ONCE)
            return torch.cat([decoder.decode(part.to(self.device)).cpu() for part in parts])

    def _result(
        self, labels: list[int], params: list[SamplingParams], codes: Tensor, pixels: Tensor
    ) -> Result:
        common = generation_record(self.choice.model, self.found, "paged")
        images = []
        for label, one, of_image in zip(labels, params, pixels, strict=True):
            record = image_record(common, one, label=label, class_name=self.classes[label])
            picture = picture_grid(of_image[None]).permute(1, 2, 0).contiguous().numpy()
            images.append(GeneratedImage.of(Image.fromarray(picture), record))
        return Result(images, codes, labels, [one.seed for one in params])


def _class_list(classes: object) -> list[int | str]:
    """The classes of a call.

    Raises:
        UserError: there are none, or one is neither a name nor an id.
    """
    wanted = list(classes) if isinstance(classes, Iterable) else [classes]
    if isinstance(classes, str):
        wanted = [classes]
    if not wanted:
        raise UserError("there are no classes to draw: give one or more")
    for one in wanted:
        if not isinstance(one, Integral | str):
            raise UserError(f"class {one!r}: must be a name or a whole number")
    return [one if isinstance(one, str) else int(str(one)) for one in wanted]


def _model_option(model: str) -> dict[str, Any]:
    """The option that a name or a path means."""
    if model in GPT_SHAPES:
        return {"gpt_model": model}
    if os.path.exists(model) or os.sep in model or Path(model).suffix:
        return {"gpt_ckpt": Path(model)}
    names = list(GPT_SHAPES)
    told = did_you_mean(model, names) or f": use {', '.join(names)}, or a file or folder"
    raise SettingError("model", model, f"there is no such model or file{told}")


def start_engine(models: LoadedModels, config: EngineConfig) -> Engine:
    """An engine that is ready to draw; the capture of CUDA graphs shows as a bar on a terminal.

    Raises:
        UserError: it does not fit on the device.
    """
    captures = config.uses_graphs(models.gpt.tok_embeddings.weight.device)
    shown = on_terminal() and captures
    with progress_bar("preparing", " graphs", shown=shown, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return Engine(models.gpt, models.vq, config, on_progress=progress)

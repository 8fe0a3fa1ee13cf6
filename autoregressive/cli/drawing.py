"""What both drawing commands share: what they were asked to do, with every value resolved before
any long work; and the files that they save.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from autoregressive.cli.command import flag_of
from autoregressive.cli.flags import grid_axes, model_options, sampling_of
from autoregressive.errors import SettingError, SettingName, UserError, tell
from autoregressive.files import check_file, check_own_folder
from autoregressive.models.axes import GridAxes
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.output.images import (
    PICTURE_FORMATS,
    check_grid_fits,
    check_record_fits,
    individual_file,
    picture_grid,
    save_codes,
    save_picture,
)
from autoregressive.output.records import (
    Loop,
    axes_record,
    generation_record,
    image_record,
    readable,
    sampling_record,
)
from autoregressive.output.tables import axes_picture, check_axes_fit
from autoregressive.weights.finding import (
    FoundWeights,
    ModelSettings,
    find_weights,
    missing_weights,
    resolve_model,
)
from autoregressive.weights.options import resolve_labels


@dataclass(frozen=True)
class Settings:
    """Everything that a command was asked to do."""

    model: ModelSettings
    sampling: SamplingParams
    labels: tuple[int, ...]  # one a picture
    axes: GridAxes | None  # which settings vary; None: none does, and one seed numbers the pictures
    compile: bool
    # the grid; None: the default name, which says whether the weights are trained
    output: Path | None
    captions: bool
    individual: Path | None  # a folder for single pictures, made if need be
    codes: Path | None

    @property
    def names(self) -> list[str]:
        """The class of each picture."""
        return [self.model.classes[label] for label in self.labels]

    @property
    def each(self) -> list[SamplingParams]:
        """The parameters of each picture."""
        if self.axes is None:
            return [self.sampling] * len(self.labels)
        return [params for _, params in self.axes.cells(self.labels[0], self.sampling)]

    def grid(self, *, trained: bool) -> Path:
        """The file that the grid goes to."""
        return self.output or Path("sample_c2i.png" if trained else "sample_c2i_untrained.png")


def resolve_settings(arguments: argparse.Namespace) -> Settings:
    """Fills in what was not typed and checks everything that can be checked without loading
    weights.

    Args:
        arguments: what a parser of `build_parser` parsed.

    Raises:
        UserError: a value is out of range, a class is unknown, flags contradict each other, a
            checkpoint is missing, there is no such device, or a file cannot be written. The message
            names the flag and what it allows.
    """
    options = model_options(arguments)
    model = resolve_model(options, sampling_of(arguments, SamplingParams()).seed)
    sampling = sampling_of(arguments, model.defaults.sampling)
    labels = resolve_labels(options, arguments.class_labels)  # "207" or a name -> 207
    axes = grid_axes(arguments)
    if axes is not None:
        labels = tuple(label for label, _ in axes.cells(labels[0], sampling))
    settings = Settings(
        model=model,
        sampling=sampling,
        labels=labels,
        axes=axes,
        compile=arguments.compile,
        output=arguments.output,
        captions=arguments.captions,
        individual=arguments.save_individual,
        codes=arguments.save_codes,
    )
    for trained in (True, False):  # which of the default names it will be is not known yet
        check_file(SettingName("output"), settings.grid(trained=trained), *PICTURE_FORMATS)
    grid = settings.grid(trained=True)
    if axes is not None:  # a record of so few values fits
        check_axes_fit(SettingName("output"), grid, model.image_size, axes)
    else:
        check_grid_fits(
            SettingName("output"), grid, len(labels), model.image_size, captions=settings.captions
        )
        check_record_fits(SettingName("output"), grid, labels, settings.names)
    if settings.codes is not None:
        check_file(SettingName("save_codes"), settings.codes, ".npy")
    if settings.individual is not None:
        check_own_folder(SettingName("save_individual"), settings.individual)
    return settings


def find_weights_and_warn(settings: Settings) -> FoundWeights:
    """Finds the weights; says what is unusual about the work that now begins.

    Raises:
        UserError: a download failed.
    """
    if settings.model.note is not None:
        tell(settings.model.note)
    found = find_weights(settings.model)
    missing = missing_weights(settings.model, found)
    if missing is not None:
        tell("WARNING: UNTRAINED WEIGHTS. The picture will be noise; only the speed is real.")
        tell(f"  drawn from seed {settings.model.seed}: {missing.spelled(flag_of)}")
    return found


def save_results(
    settings: Settings,
    found: FoundWeights,
    codes: Tensor,
    pixels: Tensor,
    seconds: Sequence[float],
    *,
    loop: Loop,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    tensor_parallel_size: int = 1,
) -> None:
    """Writes every file that was asked for, the grid last. Then prints where it is, and the times.

    Args:
        codes: integers [images, tokens]
        pixels: [images, 3, height, width] in -1..1
        seconds: of the sampling, and of the decoding.
        loop: which one drew the codes.
        quantization, kv_cache_dtype, tensor_parallel_size: as of `generation_record`.

    Raises:
        UserError: the pixels are not finite, or a file cannot be written; files written before
            stay.
    """
    if not pixels.isfinite().all():
        raise UserError(
            "the tokenizer's decoder gave NaN or infinite pixels: its weights are damaged",
            SettingName("vq_ckpt", " (see {})"),
        )
    names, params, axes = settings.names, settings.sampling, settings.axes
    common = generation_record(
        settings.model,
        found,
        loop,
        compiled=settings.compile and loop == "naive",  # the engine has no use for it
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        tensor_parallel_size=tensor_parallel_size,
    )
    grid = settings.grid(trained=found.trained)
    if settings.codes is not None:
        save_codes(settings.codes, codes)
    if settings.individual is not None:
        try:
            settings.individual.mkdir(exist_ok=True)
        except OSError as error:
            raise SettingError(
                "save_individual",
                settings.individual,
                f"cannot make this folder: {error.strerror}",
            ) from error
        drawn = zip(settings.labels, names, settings.each, strict=True)
        for image, (label, name, own) in enumerate(drawn):
            # Each picture of a grid with axes is the first and only one of its parameters.
            place = {"images": len(names), "image": image} if axes is None else {}
            one = image_record(common, own, label=label, class_name=name, **place)
            file = individual_file(
                settings.individual, image, label, name, trained=found.trained, suffix=grid.suffix
            )
            save_picture(file, picture_grid(pixels[image : image + 1]), readable(one), one)
    if axes is None:
        record = common | sampling_record(params)
        record |= {"labels": list(settings.labels), "class_names": names}
        whole = picture_grid(pixels, names if settings.captions else None)
    else:
        record = axes_record(common, params, axes, label=settings.labels[0], class_name=names[0])
        whole = axes_picture(pixels, axes)
    save_picture(grid, whole, readable(record), record)
    # Only now: a pipe whose reader has left, or a full disk behind stdout, must not cost the
    # pictures.
    sampling, decoding = seconds
    print(f"gpt sampling takes about {sampling:.2f} seconds.")
    print(f"decoder takes about {decoding:.2f} seconds.")
    print(f"image is saved to {grid}")
    if axes is not None:
        print(f"it has {axes.described(names[0])}")

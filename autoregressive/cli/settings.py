"""What a command was asked to do: every value resolved, in range and fitting the others, before any
long work.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoregressive.cli.flags import model_options, sampling_of
from autoregressive.errors import SettingName
from autoregressive.files import check_file, check_own_folder
from autoregressive.models.classes import ClassNames
from autoregressive.models.sampling import SamplingParams
from autoregressive.output.images import PICTURE_FORMATS, check_grid_fits, check_record_fits
from autoregressive.weights.choice import ModelChoice, resolve_model
from autoregressive.weights.finding import ModelSettings
from autoregressive.weights.options import resolve_labels


@dataclass(frozen=True)
class OutputSettings:
    """Which files to write."""

    typed_grid: Path | None  # None: the default name, which says whether the weights are trained
    captions: bool
    individual: Path | None  # a folder, made if need be
    codes: Path | None

    def grid(self, *, trained: bool) -> Path:
        """The file that the grid goes to."""
        return self.typed_grid or Path("sample_c2i.png" if trained else "sample_c2i_untrained.png")


@dataclass(frozen=True)
class Settings:
    """Everything that a command was asked to do."""

    choice: ModelChoice
    sampling: SamplingParams
    output: OutputSettings
    labels: tuple[int, ...]  # one a picture
    compile: bool

    @property
    def model(self) -> ModelSettings:
        """What to build, from which weights, and where."""
        return self.choice.model

    @property
    def classes(self) -> ClassNames:
        """The names of the model's classes."""
        return self.choice.classes

    @property
    def note(self) -> str | None:
        """For the user, once the work begins: what is unusual though unasked."""
        return self.choice.note


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
    sampling = sampling_of(arguments, SamplingParams())  # a seed out of range is told first
    choice = resolve_model(options, sampling.seed)
    labels = _resolve_labels(arguments, choice)
    return Settings(
        choice=choice,
        sampling=sampling_of(arguments, choice.defaults.sampling),
        output=_resolve_output(arguments, labels, choice.classes, choice.model.image_size),
        labels=labels,
        compile=arguments.compile,
    )


def _resolve_output(
    arguments: argparse.Namespace, labels: Sequence[int], classes: ClassNames, side: int
) -> OutputSettings:
    output = OutputSettings(
        typed_grid=arguments.output,
        captions=arguments.captions,
        individual=arguments.save_individual,
        codes=arguments.save_codes,
    )
    for trained in (True, False):  # which of the default names it will be is not known yet
        check_file(SettingName("output"), output.grid(trained=trained), *PICTURE_FORMATS)
    grid = output.grid(trained=True)
    check_grid_fits(SettingName("output"), grid, len(labels), side, captions=output.captions)
    check_record_fits(SettingName("output"), grid, labels, [classes[label] for label in labels])
    if output.codes is not None:
        check_file(SettingName("save_codes"), output.codes, ".npy")
    if output.individual is not None:
        check_own_folder(SettingName("save_individual"), output.individual)
    return output


def _resolve_labels(arguments: argparse.Namespace, choice: ModelChoice) -> tuple[int, ...]:
    defaults, count = choice.defaults, choice.model.num_classes
    if arguments.class_labels is not None:
        return resolve_labels(model_options(arguments), arguments.class_labels)
    if count == defaults.num_classes:
        return defaults.class_labels
    return tuple(range(min(count, len(defaults.class_labels))))

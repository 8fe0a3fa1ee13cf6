"""The axes of a grid of pictures: the settings that vary, and the values that they take.

A mistake is told before anything slow is imported, so nothing here imports torch.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

from autoregressive.errors import SettingError, SettingName, UserError, did_you_mean, either
from autoregressive.models.classes import ClassNames
from autoregressive.models.sampling_params import BOUNDS, SamplingParams

MOST_PICTURES = 256  # of a grid; more are no comparison, and llamagen-bulk draws them
CLASS = "class_label"
_SETTINGS = (CLASS, *(name for name in BOUNDS if name != "n"))
_WORDS = {CLASS: "class", "cfg_scale": "guidance"}
_OTHER_NAMES = {"class_labels": CLASS, **{word: setting for setting, word in _WORDS.items()}}


@dataclass(frozen=True)
class Axis:
    """One side of a grid: a setting and its values."""

    setting: str  # a field of `SamplingParams`, or CLASS
    values: tuple[int | float, ...]  # classes are ids
    names: tuple[str, ...]  # the same for people: "4", "0.5", or a class's name

    @classmethod
    def of(cls, name: str, values: object, classes: ClassNames) -> "Axis":
        """Checks the values of an axis.

        Args:
            name: the setting, as Python, a flag or a caption spells it.
            values: several, or one that is no iterable. Classes are ids or names.
            classes: those of the model.

        Raises:
            UserError: there is no such axis, it has no values or one of them twice, a value is out
                of range, or a class is unknown.
        """
        setting = _setting(name)
        if setting is None:
            known = list(map(_word, _SETTINGS))
            told = did_you_mean(name, known) or f": use {either(known)}"
            raise SettingError("grid", name, f"there is no such axis{told}")
        several = isinstance(values, Iterable) and not isinstance(values, str | bytes)
        # One more than a grid can have is enough to tell that there are too many.
        given: tuple[Any, ...] = (
            tuple(islice(values, MOST_PICTURES + 1)) if several else (values,)  # type: ignore[call-overload]
        )
        axis_name = f"grid {_word(setting)}"
        if not given:
            raise UserError(SettingName(axis_name), ": there are no values: give one or more")
        if setting == CLASS:
            checked: tuple[int | float, ...] = tuple(map(classes.resolve, given))
            names = tuple(classes[int(label)] for label in checked)
        else:
            bounds = BOUNDS[setting]
            for value in given:
                bounds.check(axis_name, value)
            checked = tuple(map(int if bounds.kind is Integral else float, given))
            names = tuple(str(value).removesuffix(".0") for value in checked)
        for index, value in enumerate(checked):
            if value in checked[:index]:
                raise SettingError(axis_name, names[index], "it is there twice: leave one out")
        return cls(setting, checked, names)

    @property
    def word(self) -> str:
        """What people call the setting."""
        return _word(self.setting)

    @property
    def captions(self) -> tuple[str, ...]:
        """What stands beside the pictures of each value. The name of a class speaks for itself."""
        if self.setting == CLASS:
            return self.names
        return tuple(f"{self.word} {name}" for name in self.names)


@dataclass(frozen=True)
class GridAxes:
    """The axes of a grid of pictures. The pictures are numbered row by row.

    Raises:
        UserError: both axes are of one setting, or the grid has too many pictures.
    """

    columns: Axis  # its values go from left to right
    rows: Axis | None = None  # its values go from top to bottom

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows.setting == self.columns.setting:
            raise SettingError("grid", self.columns.word, "this axis is there twice: leave one out")
        _check_count(self.pictures)

    @classmethod
    def of(cls, axes: Iterable[tuple[str, object]], classes: ClassNames) -> "GridAxes":
        """One axis or two, as pairs of name and values; raises `UserError` as `Axis.of`, too."""
        checked = [Axis.of(name, values, classes) for name, values in axes]
        if not 1 <= len(checked) <= 2:
            raise UserError(
                SettingName("grid"), f": it has one axis or two, and these are {len(checked)}"
            )
        return cls(*checked)

    @classmethod
    def parse(cls, texts: Sequence[str], classes: ClassNames) -> "GridAxes":
        """The axes that somebody typed: "guidance=1,2,4,8", "seed=1..4".

        Raises:
            UserError: as `of`; or a text is no axis.
        """
        return cls.of(map(_parsed, texts), classes)

    @property
    def pictures(self) -> int:
        """How many the grid has."""
        return math.prod(len(axis.values) for axis in self.both)

    @property
    def both(self) -> tuple[Axis, ...]:
        """The columns' axis, and the rows' if there is one."""
        return (self.columns,) if self.rows is None else (self.columns, self.rows)

    def check_said_once(self, settings: Mapping[str, object]) -> None:
        """Raises `UserError` if a setting of an axis has a value beside the grid, too.

        Args:
            settings: name -> value, None where nothing was said. Others than axes may be among
                them.
        """
        for name, value in settings.items():
            for axis in self.both:
                if value is not None and _setting(name) == axis.setting:
                    raise UserError(
                        SettingName(f"grid {axis.word}"),
                        ": ",
                        SettingName(name),
                        " is given, too: leave one of the two out",
                    )

    def cells(self, label: int, params: SamplingParams) -> list[tuple[int, SamplingParams]]:
        """The class and the parameters of each picture, row by row.

        Args:
            label, params: those of all pictures, but for the settings that vary.
        """
        cells = []
        for down in self.rows.values if self.rows else (None,):
            for across in self.columns.values:
                varied: dict[str, Any] = {self.columns.setting: across}
                if self.rows is not None:
                    varied[self.rows.setting] = down
                cells.append((varied.pop(CLASS, label), params.updated(**varied)))
        return cells

    def described(self, class_name: str) -> str:
        """What the grid shows, in one line.

        Args:
            class_name: of all pictures; unused where the class varies.
        """
        of_class = "" if CLASS in (axis.setting for axis in self.both) else f" of {class_name}"
        told = [f"{axis.word} {', '.join(axis.names)}" for axis in self.both]
        if self.rows is not None:
            told = [f"{told[0]} from left to right", f"{told[1]} from top to bottom"]
        return f"{self.pictures} pictures{of_class}: {'; '.join(told)}"


def _setting(name: str) -> str | None:
    """The setting of that name; None: it cannot be an axis."""
    name = name.replace("-", "_")
    setting = _OTHER_NAMES.get(name, name)
    return setting if setting in _SETTINGS else None


def _word(setting: str) -> str:
    return _WORDS.get(setting, setting.replace("_", "-"))


def _check_count(pictures: int) -> None:
    if pictures > MOST_PICTURES:
        raise UserError(
            SettingName("grid"),
            f": it has at most {MOST_PICTURES} pictures, and these are {pictures}: give fewer "
            "values",
        )


def _parsed(text: str) -> tuple[str, list[object]]:
    """Name and values of an axis that was typed."""
    name, _, typed = text.partition("=")
    parts = typed.split(",")
    if not name or not all(part.strip() for part in parts):
        raise SettingError(
            "grid",
            text,
            "write an axis as NAME=VALUES without spaces, such as guidance=1,2,4 or seed=1..4",
        )
    return name, [value for part in parts for value in _values(name, part)]


def _values(name: str, part: str) -> Sequence[object]:
    """The values of a range, or the one value."""
    if ".." in part:
        ends = re.fullmatch(r"(-?\d{1,19})\.\.(-?\d{1,19})", part)
        if ends is None or int(ends[1]) > int(ends[2]):
            raise SettingError(
                f"grid {name}",
                part,
                "a range has two whole numbers, the lesser one first, such as 1..4",
            )
        values = range(int(ends[1]), int(ends[2]) + 1)
        _check_count(values.stop - values.start)  # its length may be more than len() takes
        return values
    if _setting(name) == CLASS:
        return [part]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return [number(part)]
    return [part]  # `Bounds.check` says what it must be

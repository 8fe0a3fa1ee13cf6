"""The axes of a grid: what is typed becomes values in range, and each picture gets its pair."""

import itertools
from dataclasses import replace

import pytest
from refusals import refused

from autoregressive.errors import UserError
from autoregressive.models.axes import CLASS, MOST_PICTURES, Axis, GridAxes
from autoregressive.models.classes import DEMO, ClassNames
from autoregressive.models.sampling_params import BOUNDS, SamplingParams


@pytest.mark.parametrize(
    ("text", "setting", "values"),
    [
        ("guidance=1,2.5", "cfg_scale", (1.0, 2.5)),
        ("cfg-scale=1..3", "cfg_scale", (1.0, 2.0, 3.0)),
        ("cfg_scale=0", "cfg_scale", (0.0,)),
        ("seed=1..4", "seed", (1, 2, 3, 4)),
        ("seed=7,1..2,9", "seed", (7, 1, 2, 9)),
        ("seed=9223372036854775807", "seed", (2**63 - 1,)),
        ("top-k=0,100", "top_k", (0, 100)),
        ("top_p=0.5, 1", "top_p", (0.5, 1.0)),
        ("cfg-interval=-1..1", "cfg_interval", (-1, 0, 1)),
        ("temperature=0,1e2", "temperature", (0.0, 100.0)),
        ("class=fox,0,Soccer Ball", CLASS, (7, 0, 62)),
        ("class-labels=0..2", CLASS, (0, 1, 2)),
    ],
)
def test_an_axis_has_the_values_that_were_typed(
    text: str, setting: str, values: tuple[float, ...]
) -> None:
    """Fails if a name, a list, a range or a class is read as something else, or a whole number
    becomes a fraction.
    """
    [axis] = GridAxes.parse([text], DEMO).both
    assert (axis.setting, axis.values) == (setting, values)
    assert list(map(type, axis.values)) == list(map(type, values))


def test_every_parameter_of_a_draw_can_be_an_axis() -> None:
    """Fails if a parameter is added and cannot be compared."""
    for name in BOUNDS.keys() - {"n"}:
        assert Axis.of(name, [1], DEMO).setting == name


def test_captions_say_the_value_as_it_is() -> None:
    """Fails if two values look the same, a whole number ends in .0, or a class stands as an id."""
    axes = GridAxes.parse(["guidance=2,0.1234567,1e-7", "class=7"], DEMO)
    assert axes.columns.captions == ("guidance 2", "guidance 0.1234567", "guidance 1e-07")
    assert axes.rows is not None
    assert axes.rows.captions == ("fox",)
    assert GridAxes.parse(["top_k=9"], DEMO).columns.captions == ("top-k 9",)


def test_pictures_go_row_by_row_and_keep_what_does_not_vary() -> None:
    """Fails if rows and columns are exchanged, or a parameter beside the axes is lost."""
    axes = GridAxes.parse(["guidance=1,2", "seed=5..6"], DEMO)
    params = SamplingParams(top_k=9, seed=3)
    expected = [
        (4, replace(params, cfg_scale=scale, seed=seed)) for seed in (5, 6) for scale in (1.0, 2.0)
    ]
    assert axes.cells(4, params) == expected
    assert axes.pictures == 4
    axes = GridAxes.parse(["seed=5,6", "class=owl,fox"], DEMO)
    assert [label for label, _ in axes.cells(4, params)] == [17, 17, 7, 7]
    assert axes.cells(4, params)[1] == (17, replace(params, seed=6))


def test_what_a_grid_shows_is_said_in_one_line() -> None:
    """Fails if the line names a class that is not that of all pictures, or the wrong directions."""
    two = GridAxes.parse(["guidance=1,2", "seed=5..6"], DEMO)
    assert two.described("owl") == (
        "4 pictures of owl: guidance 1, 2 from left to right; seed 5, 6 from top to bottom"
    )
    assert GridAxes.parse(["class=owl,fox"], DEMO).described("dog") == (
        "2 pictures: class owl, fox"
    )


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ("guidnce=1", "--grid guidnce: there is no such axis: did you mean guidance\\?"),
        ("n=1,2", "--grid n: there is no such axis: use class, guidance, .* or seed"),
        ("seed", "--grid seed: write an axis as NAME=VALUES without spaces, such as"),
        ("seed=", "--grid seed=: write an axis as"),
        ("=1", "--grid =1: write an axis as"),
        ("guidance=1,,2", "--grid guidance=1,,2: write an axis as"),
        ("guidance=1, 2", "--grid guidance=1,: write an axis as"),
        ("class=golden retriever", "class 'golden' is unknown"),
        ("seed=4..1", "--grid seed 4..1: a range has two whole numbers, the lesser one first"),
        ("guidance=0.5..2", "--grid guidance 0.5..2: a range has two whole numbers"),
        ("class=owl..fox", "--grid class owl..fox: a range has two whole numbers"),
        ("seed=1..", "--grid seed 1..: a range has two whole numbers"),
        (f"seed=1..{'9' * 5000}", "a range has two whole numbers"),
        ("seed=x", "--grid seed x: must be a whole number"),
        ("seed=1.5", "--grid seed 1.5: must be a whole number"),
        (f"seed={'9' * 5000}", "--grid seed .*: must be a whole number"),
        (f"seed={2**63}", "--grid seed 9223372036854775808: must be 0 to"),
        ("seed=-1..2", "--grid seed -1: must be 0 to"),
        ("guidance=x", "--grid guidance x: must be a number"),
        ("guidance=1,1001", "--grid guidance 1001: must be 0 to 1000"),
        ("temperature=nan", "--grid temperature nan: must be 0"),
        ("top_p=0", "--grid top-p 0: must be above 0"),
        ("class=owl,foxx", "class 'foxx' is unknown; the closest are fox"),
        ("class=63..64", "class 64: ids go from 0 to 63"),
        ("guidance=2,2.0", "--grid guidance 2: it is there twice: leave one out"),
        ("class=fox,7", "--grid class fox: it is there twice"),
        ("seed=1 seed=2", "--grid seed: this axis is there twice"),
        ("guidance=1 cfg-scale=2", "--grid guidance: this axis is there twice"),
        ("seed=1 top-k=1 top-p=1", "--grid: it has one axis or two, and these are 3"),
        ("seed=1..257", "--grid: it has at most 256 pictures, and these are 257: give fewer"),
        ("seed=1..17 guidance=1..16", "at most 256 pictures, and these are 272"),
        (f"seed=0..{2**63 - 1}", f"at most 256 pictures, and these are {2**63}"),
    ],
)
def test_a_mistake_is_told(texts: str, told: str) -> None:
    """Fails if an axis that cannot be meant is drawn, or a huge range fills the memory."""
    with refused(match=told):
        GridAxes.parse(texts.split(" "), DEMO)


def test_the_largest_grid_is_allowed() -> None:
    """Fails if the limit is off by one."""
    assert GridAxes.parse(["seed=1..16", "guidance=1..16"], DEMO).pictures == MOST_PICTURES


def test_classes_of_one_name_are_two_values() -> None:
    """Fails if two classes that share a name are taken for one value."""
    twins = ClassNames(("crane", "fox", "crane"))
    assert Axis.of("class", [0, 2], twins).values == (0, 2)


def test_python_gives_any_iterable_or_one_value() -> None:
    """Fails if a range, an array's numbers or a lone value are refused, a name is taken for its
    letters, or a call without end hangs.
    """
    assert Axis.of("seed", range(1, 3), DEMO).values == (1, 2)
    assert Axis.of("guidance", (number / 2 for number in (1, 2)), DEMO).values == (0.5, 1.0)
    assert Axis.of("class", "fox", DEMO).values == (7,)
    assert Axis.of("seed", 3, DEMO).values == (3,)
    with refused(match="at most 256 pictures"):
        GridAxes.of([("seed", itertools.count())], DEMO)
    for wrong, told in (
        ([], "give one or more"),
        ([None], "whole number"),
        (["1"], "whole number"),
    ):
        with pytest.raises(UserError, match=told):
            Axis.of("seed", wrong, DEMO)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"cfg_scale": 1.0}, "--grid guidance: --cfg-scale is given, too: leave one of the two"),
        ({"class_labels": ["fox"]}, "--grid class: --class-labels is given, too"),
        ({"class_label": 7}, "--grid class: --class-label is given, too"),
    ],
)
def test_a_setting_is_said_once(said: dict[str, object], told: str) -> None:
    """Fails if a flag beside its own axis is ignored in silence."""
    axes = GridAxes.parse(["guidance=1,2", "class=fox,owl"], DEMO)
    axes.check_said_once({"seed": 1, "cfg_scale": None, "grid": "x"})
    with refused(match=told):
        axes.check_said_once(said)

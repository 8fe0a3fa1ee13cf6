"""The check of lookahead as it is typed: what it counts, and that a wrong picture is told."""

import json
from pathlib import Path

import check_lookahead
import pytest
import torch
from torch import Tensor

from autoregressive.errors import UserError
from autoregressive.serve.engine.request import Request

WORDS = ["--pictures", "3", "--lookahead", "4,auto", "--device", "cpu"]


@pytest.fixture(autouse=True)
def random_small_model(small_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found in an empty folder, so weights are random."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("autoregressive.weights.options.pretrained_folders", lambda: (tmp_path,))


def test_every_setting_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a setting is left out, or pictures that are equal count as different."""
    threads = torch.get_num_threads()
    check_lookahead.main([*WORDS, "--output", "x.json"])
    head, off, four, auto, figures = capsys.readouterr().out.splitlines()
    assert "GPT-demo, precision none, trained: False" in head
    assert off.startswith("lookahead off: 3 of 3 pictures equal, 1.000 tokens kept a pass, ")
    assert four.startswith("lookahead 4: 3 of 3 pictures equal, ")
    assert auto.startswith("lookahead auto: 3 of 3 pictures equal, ")
    assert json.loads(figures) == json.loads((tmp_path / "x.json").read_text())
    assert [result["equal"] for result in json.loads(figures)["results"]] == [3, 3, 3]
    assert torch.get_num_threads() == threads


def test_quantised_weights_and_pages_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the flags do not reach the engines, or the figures do not say what was compared."""
    check_lookahead.main([*WORDS, "--quantization", "int8", "--kv-cache-dtype", "int8"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["quantization"], figures["kv_cache_dtype"]) == ("int8", "int8")
    assert [result["equal"] for result in figures["results"]] == [3, 3, 3]


def test_a_picture_that_differs_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a wrong token passes, or the status is that of success."""
    draw_mixed = check_lookahead.draw_mixed

    def wrong(*arguments: object) -> list[Request]:
        requests = draw_mixed(*arguments)  # type: ignore[arg-type]
        if arguments[2] == 1:  # the first setting
            codes = requests[0].codes
            assert isinstance(codes, Tensor)
            codes[0, -1] ^= 1
        return requests

    monkeypatch.setattr(check_lookahead, "draw_mixed", wrong)
    with pytest.raises(SystemExit, match="1"):
        check_lookahead.main(WORDS)
    out = capsys.readouterr().out
    assert "lookahead 4: 2 of 3 pictures equal" in out
    assert "lookahead auto: 3 of 3 pictures equal" in out


def test_no_more_positions_than_have_a_fixed_order() -> None:
    """Fails if pictures are reported that need not be equal."""
    for typed in (["--lookahead", "17"], ["--lookahead", "4", "--max-num-seqs", "17"]):
        with pytest.raises(UserError, match="more than 64 positions a pass; add --deterministic"):
            check_lookahead.parse_arguments([*typed, "--device", "cpu"])
        check_lookahead.parse_arguments([*typed, "--device", "cpu", "--deterministic"])


@pytest.mark.parametrize("typed", ["on", "0", "65", "4,,8", "-1"])
def test_a_setting_that_is_none_is_refused(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the mistake costs the pictures of the settings before it."""
    with pytest.raises(SystemExit, match="2"):
        check_lookahead.main(["--device", "cpu", f"--lookahead={typed}"])
    assert "must be auto, off or a whole number, 1 (off) to 64" in capsys.readouterr().err

"""The page about FID says what the code and the measurements say."""

import re
import shlex

from documents import ROOT, examples, section

from autoregressive.benchmarks.published_checks import PUBLISHED_FIDS

FID, PERFORMANCE = ROOT / "docs" / "fid.md", ROOT / "docs" / "performance.md"
PAPER_FIDS = {each.model: each for each in PUBLISHED_FIDS if each.image_size == 384}


def bulk_commands() -> list[dict[str, str]]:
    """The flags of the page's bulk commands."""
    commands = []
    for block in examples(FID.read_text(), "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if words[:2] == ["python", "autoregressive/sample/sample_c2i_ddp.py"]:
                commands.append(dict(zip(words[2::2], words[3::2], strict=True)))
    return commands


def cells(heading: str) -> dict[str, list[str]]:
    """The first table below a heading, by its first column."""
    table = section(FID, heading).split("\n|", 1)[1].split("\n\n")[0]
    rows = [line.strip("| ").split("|") for line in table.splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}


def test_each_published_figure_has_its_command() -> None:
    """Fails if a command has another guidance than its figure, or than verify_published.py has."""
    table = {
        model: (float(row[0]), float(row[1]))
        for model, row in cells("## The published figures").items()
    }
    assert table == {model: (each.cfg_scale, each.fid) for model, each in PAPER_FIDS.items()}
    *guided, unguided = bulk_commands()
    assert guided == [
        {
            "--gpt-model": each.model,
            "--image-size": "384",
            "--cfg-scale": str(each.cfg_scale),
        }
        for each in PAPER_FIDS.values()
    ]
    assert unguided["--cfg-scale"] == "1"
    assert unguided["--gpt-ckpt"].endswith("c2i_XL_384_CCA_0005000.pt")


def test_the_best_guidance_of_a_model_is_the_published_one() -> None:
    """Fails if the page's table of guidance contradicts that of published figures."""
    text = section(FID, "## What changes the figure")
    head, _, *rows = re.findall(r"^\|(.*)\|$", text, flags=re.MULTILINE)
    scales = [cell.strip() for cell in head.split("|")[1:]]
    assert len(rows) == len(PAPER_FIDS)
    for row in rows:
        model, *values = (cell.strip() for cell in row.split("|"))
        fids = {
            float(scale): float(value)
            for scale, value in zip(scales, values, strict=True)
            if value and scale != "none"
        }
        best = min(fids, key=lambda scale: fids[scale])
        assert best == PAPER_FIDS[model].cfg_scale
        assert abs(fids[best] - PAPER_FIDS[model].fid) < 0.0101  # the paper cuts 2.189 to 2.18


def test_the_minutes_follow_from_the_measured_steps() -> None:
    """Fails if a step's time is not that of performance.md, or the arithmetic is wrong."""
    measured = dict(
        re.findall(
            r"^\| (GPT-\w+) \|[^|]*\|[^|]*\| ([\d.]+), \d+ % \|$",
            section(PERFORMANCE, "## The engine"),
            flags=re.MULTILINE,
        )
    )
    pixels = 50_000 / 8 * 13.6e-3 / 60
    rows = cells("## How long it takes")
    assert list(rows) == list(PAPER_FIDS)
    for model, (step_ms, *minutes) in rows.items():
        assert step_ms == measured[model]
        steps = 50_000 / 256 * 576 * float(step_ms) / 1e3 / 60
        expected = [steps, steps + pixels, steps / 2 + pixels]
        assert minutes == [f"{each:.1f}" for each in expected]

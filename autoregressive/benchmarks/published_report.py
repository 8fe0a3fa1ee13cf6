"""The report of scripts/verify_published.py: runs the checks and puts down what they find.

A check that fails does not stop the others. The report holds names of files, and neither their
folders nor anything else about the machine but its device and the versions of the software.
"""

import argparse
import gc
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec

import torch
import triton

from autoregressive.benchmarks.harness import use_device
from autoregressive.benchmarks.published_checks import (
    LOOKAHEAD_SETTINGS,
    Outcome,
    Subject,
    check_files,
    check_greedy,
    check_lookahead,
    measure_fid,
    measure_speed,
    precision_name,
    subjects,
)
from autoregressive.benchmarks.script import Table, give_figures
from autoregressive.benchmarks.speedup import code_version
from autoregressive.errors import UserError, missing_extra, one_line, tell
from autoregressive.files import write_whole
from autoregressive.output.records import device_name, sampling_record
from autoregressive.version import program_version
from autoregressive.weights.published import PUBLISHED_FILES, published_file


def has_failed(outcome: Outcome) -> bool:
    """Whether a check found something that must be equal and is not, or could not be carried
    out.
    """
    return "error" in outcome or outcome.get("equal") is False


def verify(subject: Subject, checks: Mapping[str, Callable[[], Outcome]]) -> Outcome:
    """The outcomes of all checks of a model, by their names; what they say goes to stderr."""
    settings = subject.settings
    entry: Outcome = {
        "model": settings.gpt_model,
        "image_size": settings.image_size,
        "precision": precision_name(settings.precision),
        "sampling": sampling_record(subject.params),
    }
    for name, check in checks.items():
        tell(f"{subject.name}: {name}")
        try:
            entry[name] = check()
        except Exception as error:  # whatever it is, it is reported, and the others go on
            # The message may name folders, and is not for the report.
            entry[name] = {"error": type(error).__name__}
            tell(f"{subject.name}: {name}: {type(error).__name__}: {one_line(str(error))}")
        gc.collect()  # the check's models and engines
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    entry["failed"] = [name for name in checks if has_failed(entry[name])]
    return entry


def _row(entry: Outcome) -> list[object]:
    """A model's line of the table; None where a check has no figure."""
    greedy, speed = entry["greedy"].get("float32"), entry["speed"]
    share = greedy and greedy["equal_tokens"] / greedy["tokens"]
    kept = {each["lookahead"]: each for each in entry["lookahead"].get("settings", ())}
    fid = entry.get("fid", {}).get("evaluation", {})
    return [
        entry["model"],
        entry["image_size"],
        {True: "yes", False: "NO", None: None}[entry["files"].get("equal")],
        share,
        *(kept[each]["tokens_a_pass"] if kept else None for each in LOOKAHEAD_SETTINGS),
        *(speed[each]["seconds"] if each in speed else None for each in ("off", "auto")),
        fid.get("fid"),
        ", ".join(entry["failed"]) or "nothing",
    ]


_COLUMNS = {
    "model": "<8",
    "px": ">4",
    "files": ">6",
    "greedy": ">7.1%",
    **{f"W={setting}": ">6.2f" for setting in LOOKAHEAD_SETTINGS},
    "off, s": ">8.3f",
    "auto, s": ">8.3f",
    "FID": ">6.2f",
    "failed": "<",
}


def _hub_hashes(chosen: Sequence[Subject]) -> dict[str, str]:
    """What the hub states of the published files that are here."""
    try:
        from autoregressive.weights.hub import stated_sha256
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    names = {
        file
        for subject in chosen
        for file in (subject.settings.published_gpt, published_file(subject.settings.vq_model))
    }
    return {file.file_name: stated_sha256(file) for file in PUBLISHED_FILES if file in names}


def run(arguments: argparse.Namespace) -> None:
    """Checks every model, and writes the report after each. Exit status 1 if a check failed.

    Raises:
        UserError: weights are missing, flags contradict each other, or the hub cannot be asked.
    """
    if (arguments.fid is None) != (arguments.reference is None):
        raise UserError("--fid and --reference go together: give both, or leave both out")
    # Hours of drawing would come before the evaluation finds out.
    if arguments.fid is not None and find_spec("torch_fidelity") is None:
        raise UserError("--fid: torch_fidelity is missing: pip install 'llamagen-serve[eval]'")
    device = use_device(arguments.device)
    chosen = subjects(
        arguments.models,
        arguments.image_size,
        arguments.images,
        arguments.pretrained_dir,
        device,
    )
    stated = _hub_hashes(chosen) if arguments.ask_hub else {}
    report: Outcome = {"benchmark": "verify_published", **_about(device), "models": []}
    table = Table(_COLUMNS)
    for subject in chosen:
        entry = verify(subject, _checks(subject, stated, arguments))
        report["models"].append(entry)
        table.row(*_row(entry))
        write_whole(
            arguments.output, lambda part: part.write_text(json.dumps(report, indent=1) + "\n")
        )
    give_figures(report, arguments.output)
    if any(entry["failed"] for entry in report["models"]):
        sys.exit(1)


def _checks(
    subject: Subject, stated: Mapping[str, str], arguments: argparse.Namespace
) -> dict[str, Callable[[], Outcome]]:
    checks = {
        "files": lambda: check_files(subject, stated),
        "greedy": lambda: check_greedy(subject),
        "lookahead": lambda: check_lookahead(subject),
        "speed": lambda: measure_speed(subject, arguments.repeats),
    }
    if arguments.fid is not None:
        checks["fid"] = lambda: measure_fid(
            subject, arguments.fid, arguments.reference, arguments.sample_dir, arguments.device
        )
    return checks


def _about(device: torch.device) -> Outcome:
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "compute_capability": list(torch.cuda.get_device_capability(device)) if on_gpu else None,
        "version": program_version(),
        "code": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
    }

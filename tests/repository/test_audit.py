"""The look-up of known vulnerabilities: it says when it could not be done, and mends its own
environment.
"""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with an environment of its own that does not exist yet."""
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ENVIRONMENT", tmp_path / ".audit")
    return module


def answers(audit: ModuleType, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """Has pip-audit print this; nothing is installed."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, output, "")

    monkeypatch.setattr(audit.subprocess, "run", run)
    monkeypatch.setattr(audit.venv, "create", lambda *arguments, **options: None)


UNEXPECTED: list[Any] = [
    "no JSON",
    [],
    {},
    None,
    7,
    {"dependencies": None},
    {"dependencies": {}},
    {"dependencies": ["torch"]},
]
UNDESCRIBED: list[Any] = [{}, "PYSEC-1", None]
UNEXPECTED += [
    {"dependencies": [{"name": "a", "version": "1", "vulns": [found]}]} for found in UNDESCRIBED
]


@pytest.mark.parametrize("output", UNEXPECTED, ids=str)
def test_an_answer_of_another_form_is_said(
    audit: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: Any,
) -> None:
    """Fails if pip-audit's output ends in a traceback, or passes for a look-up."""
    answers(audit, monkeypatch, output if isinstance(output, str) else json.dumps(output))
    assert audit.main() == 0
    assert "could not run, so nothing was looked up" in capsys.readouterr().out


def test_a_vulnerable_package_is_named(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a known vulnerability does not fail the command."""
    found = {"id": "PYSEC-1", "fix_versions": ["2.0"]}
    packages = [
        {"name": "a", "version": "1.0", "vulns": [found]},
        {"name": "b", "version": "1.0", "vulns": []},
    ]
    answers(audit, monkeypatch, json.dumps({"dependencies": packages}))
    assert audit.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        "audit: a 1.0: PYSEC-1 (fixed in: 2.0)",
        "audit: 2 packages looked up, 0 not, 1 vulnerable",
    ]


@pytest.mark.parametrize("state", ["absent", "without pip", "not started", "working"])
def test_an_environment_whose_pip_does_not_work_is_made_anew(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Fails if an environment that was left half made is kept for ever, or one that works is made
    again.
    """
    python = audit.ENVIRONMENT / "bin" / "python"
    if state != "absent":
        python.parent.mkdir(parents=True)
        python.write_text("#!/bin/sh\n" + ("exit 0\n" if state == "working" else "exit 1\n"))
        python.chmod(0o644 if state == "not started" else 0o755)
    made: list[tuple[Path, dict[str, bool]]] = []
    monkeypatch.setattr(
        audit.venv, "create", lambda place, **options: made.append((place, options))
    )
    audit.make_environment(python)
    wanted = [] if state == "working" else [(audit.ENVIRONMENT, {"with_pip": True, "clear": True})]
    assert made == wanted

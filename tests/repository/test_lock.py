"""The lock file: what `make` installs is what the project asks for, and every file of it is known
by its hash.
"""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
_PIN = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[a-z]+\])?==([^\s;]+)", re.MULTILINE)


def _pins(text: str) -> dict[str, str]:
    """Versions by normalised name."""
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in _PIN.findall(text)}


def _locked() -> str:
    return (ROOT / "requirements.lock").read_text()


def test_lock_has_every_requirement() -> None:
    """Fails if requirements.txt was changed without `make lock`."""
    wanted = _pins((ROOT / "requirements.txt").read_text())
    assert len(wanted) > 20
    assert wanted.items() <= _pins(_locked()).items()


def test_lock_has_every_dependency_of_the_package() -> None:
    """Fails if the installed package would ask for another version than `make` installs, or for one
    more package.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    locked_extras = ("serve", "download", "progress", "eval", "otlp")
    wanted = [*project["dependencies"], *(each for name in locked_extras for each in extras[name])]
    locked = _pins(_locked())
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            assert requirement.specifier.contains(locked[name]), requirement


def test_every_locked_package_has_hashes() -> None:
    """Fails if an entry has no hash: pip would refuse the whole file."""
    entries = re.split(r"\n(?=\S)", _locked().strip())
    assert len(entries) == len(_pins(_locked()))
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []

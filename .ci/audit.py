"""Looks up known vulnerabilities of the packages in requirements.lock with pip-audit.

pip-audit is installed into an environment of its own, so that the project's stays as locked. The
exit status is 1 if a locked package has a known vulnerability. It is 0 if none has, and also if the
database of vulnerabilities cannot be reached, which the last line then says.
"""

import contextlib
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

PIP_AUDIT = "pip-audit==2.10.1"
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".audit"
SECONDS = 300


def main() -> int:
    """Runs pip-audit and sums up what it found in a few lines."""
    try:
        lines, status = summary(run_pip_audit())
    except (
        OSError,
        subprocess.SubprocessError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        # The last three come from an answer of another form than pip-audit's.
        lines = [f"pip-audit could not run, so nothing was looked up ({type(error).__name__})"]
        status = 0
    for line in lines:
        print(f"audit: {line}")
    return status


def summary(audited: list[dict[str, Any]]) -> tuple[list[str], int]:
    """What pip-audit's findings say, line by line, and the exit status."""
    vulnerable = [package for package in audited if package.get("vulns")]
    unknown = [package for package in audited if "skip_reason" in package]
    lines = [
        f"{package['name']} {package['version']}: {found['id']} "
        f"(fixed in: {', '.join(found['fix_versions']) or 'none'})"
        for package in vulnerable
        for found in package["vulns"]
    ]
    if len(unknown) == len(audited):
        lines.append("the database of vulnerabilities cannot be reached, so nothing was looked up")
    else:
        lines.append(
            f"{len(audited) - len(unknown)} packages looked up, {len(unknown)} not, "
            f"{len(vulnerable)} vulnerable"
        )
    return lines, 1 if vulnerable else 0


def run_pip_audit() -> list[dict[str, Any]]:
    """pip-audit's findings, one record for each package of the lock file.

    Raises:
        OSError, SubprocessError: pip-audit cannot be installed or started, or takes too long.
        ValueError, KeyError, TypeError: its output is not what it should be.
    """
    python = ENVIRONMENT / "bin" / "python"
    make_environment(python)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, PIP_AUDIT], check=True, timeout=SECONDS)
    flags = ["--require-hashes", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [str(python), "-m", "pip_audit", "-r", str(ROOT / "requirements.lock"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    audited: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    if not isinstance(audited, list):
        raise TypeError("pip-audit's dependencies are no list")
    return audited


def make_environment(python: Path) -> None:
    """Makes pip-audit's environment, unless it is there and its pip works.

    An interrupted start, or a system without ensurepip, leaves an environment without pip.
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            [str(python), "-m", "pip", "--version"],
            check=True,
            capture_output=True,
            timeout=SECONDS,
        )
        return
    venv.create(ENVIRONMENT, with_pip=True, clear=True)


if __name__ == "__main__":
    sys.exit(main())

"""Looks up known vulnerabilities of the packages in requirements.lock with pip-audit.

pip-audit is installed into an environment of its own, so that the project's stays as locked. The exit
status is 1 if a locked package has a known vulnerability. It is 0 if none has, and also if the database
of vulnerabilities cannot be reached, which the last line then says.
"""

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
    """Runs pip-audit and sums up what it found in one line."""
    try:
        audited = run_pip_audit()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        print(f"audit: pip-audit could not run, so nothing was looked up ({type(error).__name__})")
        return 0
    vulnerable = [package for package in audited if package.get("vulns")]
    unknown = [package for package in audited if "skip_reason" in package]
    for package in vulnerable:
        for found in package["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "none"
            print(f"audit: {package['name']} {package['version']}: {found['id']} (fixed in: {fixed})")
    if len(unknown) == len(audited):
        print("audit: the database of vulnerabilities cannot be reached, so nothing was looked up")
    else:
        known = len(audited) - len(unknown)
        print(f"audit: {known} packages looked up, {len(unknown)} not, {len(vulnerable)} vulnerable")
    return 1 if vulnerable else 0


def run_pip_audit() -> list[dict[str, Any]]:
    """pip-audit's findings, one record for each package of the lock file.

    Raises:
        OSError, SubprocessError: pip-audit cannot be installed or started, or takes too long.
        ValueError: its output is not JSON.
    """
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PIP_AUDIT]
    subprocess.run(install, check=True, timeout=SECONDS)
    flags = ["--require-hashes", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [str(python), "-m", "pip_audit", "-r", str(ROOT / "requirements.lock"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    audited: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    return audited


if __name__ == "__main__":
    sys.exit(main())

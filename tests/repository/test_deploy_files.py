"""The files of deploy/: each is checked by the program that reads it, or by its linter, where that
is installed; and they agree with the program.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_imports import ROOT

from autoregressive.cli.flags import model_options
from autoregressive.serve.web.metrics import Metrics
from autoregressive.serve.web.server_flags import build_server_parser, read_arguments
from autoregressive.weights.finding import find_weights, resolve_model

DEPLOY = ROOT / "deploy"
CHECKS = {
    "Dockerfile": ["hadolint", "Dockerfile"],
    "compose": [
        "check-jsonschema",
        *("--builtin-schema", "vendor.compose-spec", "compose.yaml", "compose.gpu.yaml"),
    ],
    "Kubernetes": ["kubernetes-validate", "--strict", "kubernetes/llamagen.yaml"],
    "Prometheus": ["promtool", "check", "config", "--syntax-only", "prometheus/prometheus.yml"],
    "rules": ["promtool", "check", "rules", "prometheus/alerts.yml"],
    "rules' tests": ["promtool", "test", "rules", "prometheus/alerts.test.yml"],
    "Caddy": ["caddy", "validate", "--adapter", "caddyfile", "--config", "caddy/Caddyfile"],
}


@pytest.mark.parametrize("name", CHECKS)
def test_each_file_passes_its_own_check(name: str) -> None:
    """Fails if a file is malformed, or an alert fires where it should not."""
    program, *arguments = CHECKS[name]
    beside = Path(sys.executable).parent / program
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        pytest.skip(f"needs {program}")
    done = subprocess.run([found, *arguments], cwd=DEPLOY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_unit_is_one(tmp_path: Path) -> None:
    """Fails if systemd does not know a setting. The command is not installed here, so another one
    takes its place.
    """
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    unit = (DEPLOY / "systemd/llamagen.service").read_text()
    unit, count = re.subn(r"ExecStart=\S+", "ExecStart=/bin/true", unit)
    assert count == 1
    (tmp_path / "llamagen.service").write_text(unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "llamagen.service")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def documents(path: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text()))


def test_the_flags_of_the_files_exist() -> None:
    """Fails if a deployment does not start because a flag was renamed."""
    compose = documents("compose.yaml")[0]["services"]["llamagen"]
    pod = documents("kubernetes/llamagen.yaml")[1]["spec"]["template"]["spec"]
    unit = (DEPLOY / "systemd/llamagen.service").read_text()
    started = re.search(r"^ExecStart=\S+ (.*)$", unit, re.MULTILINE)
    assert started is not None
    for arguments in (compose["command"], pod["containers"][0]["args"], started[1].split()):
        assert len(arguments) >= 2
        read_arguments(arguments, {})
    known = {f"LLAMAGEN_{action.dest.upper()}" for action in build_server_parser()._actions}
    files = [file for file in DEPLOY.rglob("*") if file.is_file()]
    named = {name for file in files for name in re.findall(r"LLAMAGEN_[A-Z_]+", file.read_text())}
    assert named
    assert named <= known


def test_the_containers_find_the_weights_of_their_model() -> None:
    """Fails if the service of the compose file ends at once, because the folder that is mounted
    unless another one is named has no weights of the model that is served unless another one is
    named.
    """
    compose = documents("compose.yaml")[0]["services"]["llamagen"]
    mounted = re.match(r"\$\{WEIGHTS:-(.+)\}:(/weights):ro$", compose["volumes"][0])
    model = re.match(r"\$\{GPT_MODEL:-(.+)\}$", compose["environment"]["LLAMAGEN_GPT_MODEL"])
    assert mounted is not None
    assert model is not None
    command = [
        str(DEPLOY / mounted[1]) if part == mounted[2] else part for part in compose["command"]
    ]
    options = model_options(read_arguments(command, {"LLAMAGEN_GPT_MODEL": model[1]}))
    assert find_weights(resolve_model(replace(options, device="cpu"))).trained


def test_the_metrics_of_the_dashboard_and_the_alerts_exist() -> None:
    """Fails if a panel stays empty, or an alert never fires, because a metric was renamed."""
    metrics = Metrics(lambda: 0.0, lambda: 0.0, lambda: 0.0)
    metrics.requests.labels(outcome="success")
    known = set(re.findall(r"^(llamagen:\w+)\{", metrics.text().decode(), re.MULTILINE))
    for path in ("grafana/dashboards/llamagen.json", "prometheus/alerts.yml"):
        named = set(re.findall(r"llamagen:\w+", (DEPLOY / path).read_text()))
        assert len(named) >= 3
        assert named <= known
    dashboard = json.loads((DEPLOY / "grafana/dashboards/llamagen.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) >= 8


def test_the_guide_is_fifteen_commands_with_files_that_exist() -> None:
    """Fails if a new operator needs more commands than that, one is no shell, or one names a file
    that was moved.
    """
    guide = (ROOT / "docs/deploy.md").read_text()
    block = guide.split("```sh\n")[1].split("```")[0]
    commands = block.replace("\\\n", "").splitlines()
    assert 10 <= len(commands) <= 15
    for command in commands:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
    named = set(re.findall(r"\bdeploy/[\w./-]+", guide))
    assert len(named) >= 8
    assert [path for path in named if not (ROOT / path.rstrip(".")).exists()] == []
    settings = (DEPLOY / "systemd/llamagen.env").read_text()
    for place in ("=KEY\n", "SIGNING\n", "//SITE/"):
        assert settings.count(place) == 1
    assert f"{len(commands)} commands" in guide


def test_supervisors_give_the_service_its_time() -> None:
    """Fails if a supervisor kills requests that the service lets finish."""
    needed = 2 * 60 + 10  # `--shutdown-timeout` for requests and for readers, and a little more
    compose = documents("compose.yaml")[0]["services"]["llamagen"]
    pod = documents("kubernetes/llamagen.yaml")[1]["spec"]["template"]["spec"]
    assert compose["stop_grace_period"] == f"{needed}s"
    assert pod["terminationGracePeriodSeconds"] == needed
    assert f"TimeoutStopSec={needed}\n" in (DEPLOY / "systemd/llamagen.service").read_text()

"""An engine that dies while it loads: the service ends with status 2, so that a supervisor does not
start it for ever.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_service import running_service

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGKILL])
def test_an_engine_that_dies_while_it_loads_is_status_2(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Fails if the status is 1, which asks a supervisor to try again, or if the line does not say
    how the engine died.
    """
    (tmp_path / "die_while_loading").write_text(str(int(number)))
    with running_service(tmp_path, ready=False) as service:
        assert service.process.wait(30) == 2
        last = service.log.splitlines()[-1]
        assert "an engine's process died while it loaded the model" in last
        assert number.name in last
        assert "Traceback" not in service.log


def test_an_engine_that_dies_later_is_status_1(tmp_path: Path) -> None:
    """Fails if a death that a new start mends looks like one that it does not."""
    with running_service(tmp_path) as service:
        service.faults.set("die")
        service.draw()
        assert service.process.wait(30) == 1


def test_a_hostile_checkpoint_is_one_line_of_the_service(tmp_path: Path) -> None:
    """Fails if the whole way, from the file through the engine's process to the exit status, loses
    the error.
    """
    from test_hostile_checkpoints import deep_key, torch_zip

    path = torch_zip(tmp_path / "weights.pt", deep_key(3_000_000))
    command = [
        sys.executable,
        "autoregressive/serve/api_server.py",
        "--gpt-model",
        "GPT-demo",
        "--gpt-ckpt",
        str(path),
    ]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("LLAMAGEN_")
    }
    done = subprocess.run(
        [*command, "--device", "cpu", "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
    )
    assert done.returncode == 2, done.stderr
    assert str(path) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr

"""Signals: from the first line on, whatever the main thread does, and as process 1. And what a
client or a parent leaves behind.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_service import is_alive, running_service
from test_imports import ROOT
from test_service_promises import send, status_of

from autoregressive.serve.lifecycle import listen
from autoregressive.serve.web.server_settings import ServerSettings

pytestmark = pytest.mark.timing
STARTS = {
    "the file": [str(ROOT / "autoregressive/serve/api_server.py")],
    "the installed command": [
        "-c",
        "from autoregressive.serve.api_server import command; command()",
    ],
}


@pytest.fixture(scope="module", autouse=True)
def hear_hangups() -> Iterator[None]:
    """The suite may run under `nohup`, which what it starts would inherit."""
    found = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, found)


@pytest.fixture
def slow_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which `import torch` says so and never ends."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    )
    return os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


def run(arguments: list[str], environment: dict[str, str], *before: str) -> "subprocess.Popen[str]":
    """A process that has said something, after `before` has started it."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*before, sys.executable, *arguments], env=environment, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    return process


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGTERM, 0, "ended by SIGTERM"),
        (signal.SIGHUP, 0, "ended by SIGHUP"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_while_libraries_are_imported_a_signal_ends_it(
    slow_torch: dict[str, str], start: str, number: signal.Signals, status: int, said: str
) -> None:
    """Fails if the system's default takes it, or a traceback is printed."""
    process = run(STARTS[start], slow_torch)
    begun = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert time.monotonic() - begun < 2
    assert process.returncode == status
    assert said in errors
    assert "Traceback" not in errors


def test_process_1_hears_sigterm_while_it_starts(slow_torch: dict[str, str]) -> None:
    """Fails if a container cannot be stopped in its first seconds: process 1 gets no signal that it
    does not wait for.
    """
    unshare = shutil.which("unshare")
    if (
        unshare is None
        or subprocess.run(
            [unshare, "--pid", "--fork", "true"], capture_output=True, check=False
        ).returncode
        != 0
    ):
        pytest.skip("needs unshare and the right to use it")
    process = run(STARTS["the file"], slow_torch, unshare, "--pid", "--fork")
    (child,) = map(
        int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    )
    os.kill(child, signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 0


def test_a_hangup_that_is_ignored_stays_ignored(slow_torch: dict[str, str]) -> None:
    """Fails if `nohup` has no effect."""
    process = run(STARTS["the file"], slow_torch, "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 0


BLOCKS = {
    "a full pipe": "source, sink = os.pipe(); os.write(1, b'importing\\n'); os.write(sink, "
    "bytes(2**20))",
    "a loop": "os.write(1, b'importing\\n')\nwhile True: pass",
    "a lock": "os.write(1, b'importing\\n'); threading.Lock().acquire(); lock = threading.Lock(); "
    "lock.acquire(); lock.acquire()",
}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_second_signal_ends_it_whatever_the_main_thread_does(block: str) -> None:
    """Fails if a main thread that never comes back keeps the process from ending within two
    seconds.
    """
    script = (
        "import os, threading\nfrom autoregressive.serve.signals import SignalWatch\nwatch = "
        "SignalWatch()\n"
    )
    script += f"watch.hand_over(lambda: None)\n{BLOCKS[block]}"
    process = run(["-c", script], dict(os.environ))
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)  # sooner, it would count as the first
    assert process.poll() is None
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1
    assert time.monotonic() - begun <= 2.3
    process.communicate()


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGHUP,),
        (signal.SIGTERM,),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGHUP),
    ],
)
@pytest.mark.parametrize("fronts", ["1", "2"])
def test_a_hangup_or_ctrl_c_lets_work_finish_and_says_so_at_once(
    tmp_path: Path, numbers: tuple[signal.Signals, ...], fronts: str
) -> None:
    """Fails if clients are cut, or the terminal stays silent for as long as the drawing takes.

    Also if one event sends two signals.
    """
    with running_service(tmp_path, "--max-num-seqs", "4", "--api-server-count", fronts) as service:
        service.faults.set("step_seconds", "0.03")
        client = send(service)
        service.wait_for(lambda: service.gauges()["num_requests_running"] == 1, 10)
        for number in numbers:
            service.process.send_signal(number)
            time.sleep(0.05)  # or the system would make one of two alike
        said = tmp_path / "stdout"
        service.wait_for(
            lambda: (
                "finishing 1 request, for 60 s at most; Ctrl-C again stops at once"
                in said.read_text()
            ),
            1,
        )
        assert status_of(client) == 200
        assert service.process.wait(15) == 0


def test_connections_are_probed() -> None:
    """Fails if a client that vanishes without a word holds its connection, and its drawing, for two
    hours.
    """
    settings = cast(
        ServerSettings, SimpleNamespace(host="127.0.0.1", port=0, fronts=1, socket_path=None)
    )
    with listen(settings) as (listener,), socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            idle, interval, count, unconfirmed = (
                accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names
            )
            assert idle + interval * count <= 30
            assert unconfirmed <= 30_000


PARENT = """
import os, sys, time
import slow_to_import
from autoregressive.serve.worker.process import start_child
os.environ["SLOW"] = "1"
child, connection = start_child(slow_to_import.run, "engine")
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_that_still_imports_ends_with_its_parent(tmp_path: Path) -> None:
    """Fails if a GPU, or an address, stays taken for as long as an orphan's imports take."""
    slow = (
        "import os, time\nif 'SLOW' in os.environ:\n    open(os.environ['IMPORTING'], "
        "'w').close()\n    time.sleep(60)\n"
    )
    (tmp_path / "slow_to_import.py").write_text(f"{slow}def run(connection):\n    pass\n")
    importing = tmp_path / "importing"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "IMPORTING": str(importing)}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    deadline = time.monotonic() + 30
    while not importing.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert is_alive(child)
    process.kill()
    process.wait()
    begun = time.monotonic()
    while is_alive(child):
        assert time.monotonic() - begun < 1
        time.sleep(0.01)


CLIENT = """
import socket, sys, time
host, port, key = sys.argv[1:]
connection = socket.create_connection((host, int(port)))
body = b'{"prompt": "cat", "n": 10}'
head = f"POST /v1/images/generations HTTP/1.1\\r\\nHost: {host}\\r\\n"
head += f"Authorization: Bearer {key}\\r\\n"
head += f"Content-Type: application/json\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
connection.sendall(head.encode() + body)
time.sleep(120)
"""


@pytest.mark.soak
def test_a_client_that_vanishes_without_a_word_ends_its_drawing(tmp_path: Path) -> None:
    """Fails if a pulled cable costs three minutes of drawing: nobody closes the connection, and
    nothing is to be sent on it.
    """
    ip, space, key = shutil.which("ip"), f"vanish{os.getpid()}", "a-key-for-tests-of-a-network"
    if (
        ip is None
        or subprocess.run([ip, "netns", "add", space], capture_output=True, check=False).returncode
        != 0
    ):
        pytest.skip("needs iproute2 and the right to make a network namespace")
    inside = [ip, "netns", "exec", space]
    try:
        for command in (
            [
                ip,
                "link",
                "add",
                "vanish0",
                "type",
                "veth",
                "peer",
                "name",
                "vanish1",
                "netns",
                space,
            ],
            [ip, "address", "add", "10.231.77.1/30", "dev", "vanish0"],
            [ip, "link", "set", "vanish0", "up"],
            [*inside, ip, "address", "add", "10.231.77.2/30", "dev", "vanish1"],
            [*inside, ip, "link", "set", "vanish1", "up"],
        ):
            subprocess.run(command, check=True)
        with running_service(
            tmp_path, "--host", "0.0.0.0", "--api-key", key, "--max-num-seqs", "2", ready=False
        ) as service:
            port = service.url.rsplit(":", 1)[1]
            service.client.headers["Authorization"] = f"Bearer {key}"
            service.wait_until_ready()
            service.faults.set("step_seconds", "0.3")
            client = subprocess.Popen(
                [*inside, sys.executable, "-c", CLIENT, "10.231.77.1", port, key]
            )
            service.wait_for(lambda: service.gauges()["num_requests_running"] == 1, 20)
            subprocess.run([*inside, ip, "link", "set", "vanish1", "down"], check=True)
            seconds = service.wait_for(service.is_empty, 45)
            print(f"noticed after {seconds:.1f} s")
            client.kill()
            client.wait()
    finally:
        subprocess.run([ip, "netns", "delete", space], check=False)
        subprocess.run([ip, "link", "delete", "vanish0"], check=False, capture_output=True)

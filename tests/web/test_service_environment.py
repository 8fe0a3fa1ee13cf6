"""Variables that others set: the service takes its own flags from the environment and survives the
rest.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from autoregressive.errors import UserError
from autoregressive.serve.web.connections import Connections
from autoregressive.serve.web.server import Server
from autoregressive.serve.web.server_flags import (
    build_server_parser,
    is_service_link,
    read_arguments,
)

ROOT = Path(__file__).resolve().parents[2]

# What Kubernetes sets in every pod for Services called llamagen, llamagen-host and
# llamagen-api-key.
KUBERNETES = {
    "LLAMAGEN_SERVICE_HOST": "10.0.0.5",
    "LLAMAGEN_SERVICE_PORT": "8000",
    "LLAMAGEN_SERVICE_PORT_HTTP": "8000",
    "LLAMAGEN_PORT": "tcp://10.0.0.5:8000",
    "LLAMAGEN_PORT_8000_TCP": "tcp://10.0.0.5:8000",
    "LLAMAGEN_PORT_8000_TCP_PROTO": "tcp",
    "LLAMAGEN_PORT_8000_TCP_PORT": "8000",
    "LLAMAGEN_PORT_8000_TCP_ADDR": "10.0.0.5",
    "LLAMAGEN_PORT_53_UDP": "udp://10.0.0.5:53",
    "LLAMAGEN_HOST_SERVICE_HOST": "10.0.0.6",
    "LLAMAGEN_HOST_SERVICE_PORT": "80",
    "LLAMAGEN_HOST_PORT": "tcp://[fd00::6]:80",
    "LLAMAGEN_API_KEY_SERVICE_HOST": "10.0.0.7",
    "LLAMAGEN_API_KEY_PORT_443_TCP_ADDR": "10.0.0.7",
}
# What Docker sets in a container that is linked to one called llamagen.
DOCKER = {
    "LLAMAGEN_NAME": "/page/llamagen",
    "LLAMAGEN_PORT": "tcp://172.17.0.5:8000",
    "LLAMAGEN_PORT_8000_TCP_PROTO": "tcp",
    "LLAMAGEN_ENV_PYTHON_VERSION": "3.12",
}


@pytest.mark.parametrize("environment", [KUBERNETES, DOCKER])
def test_variables_of_a_neighbour_are_ignored(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a Service or a linked container called llamagen ends the service, configures it, or
    is warned of.
    """
    assert vars(read_arguments([], environment)) == vars(read_arguments([], {}))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "8000"),
        ("PORT", "http://x"),
        ("HOST", "10.0.0.5"),
        ("SERVED_MODEL_NAME", "/x"),
        ("SERVICE_PORT", "x"),
    ],
)
def test_what_only_resembles_them_is_not_ignored(name: str, value: str) -> None:
    """Fails if a flag of the service, or a mistake in one, is taken for a neighbour's variable."""
    assert not is_service_link(name, value)


def test_flags_are_told_from_a_neighbours_variables() -> None:
    """Fails if a value of a flag could pass for a neighbour's variable: --port alone has the name
    of one, and takes a number.
    """
    names = [action.dest.upper() for action in build_server_parser()._actions]
    assert [name for name in names if is_service_link(name, "tcp://1")] == ["PORT"]
    assert [
        name for name in names if is_service_link(name, "1") or is_service_link(name, "/x")
    ] == []


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("LLAMAGEN_PROT", "did you mean LLAMAGEN_PORT?"),
        ("LLAMAGEN_MAX_NUM_SEQ", "did you mean LLAMAGEN_MAX_NUM_SEQS?"),
        ("LLAMAGEN_HELP", "--help shows the flags"),
        ("LLAMAGEN_", "--help shows the flags"),
    ],
)
def test_an_unknown_variable_is_a_warning_that_names_the_nearest_flag(
    variable: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a name that another program may have set ends the service, or a misspelt one passes
    silently.
    """
    assert read_arguments([], {variable: "1", "LLAMAGEN_PORT": "8001"}).port == 8001
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert warning.startswith(f"warning: environment: {variable} is ignored")
    assert hint in warning


def test_a_known_flag_with_a_bad_value_stays_an_error() -> None:
    """Fails if a mistake in the service's own variable is passed over with its neighbours'."""
    with pytest.raises(UserError, match=r"invalid int value: 'http://10.0.0.5:8000'"):
        read_arguments([], {"LLAMAGEN_PORT": "http://10.0.0.5:8000"})


def test_the_command_starts_in_a_pod(tmp_path: Path) -> None:
    """Fails if the command itself ends with status 2 beside a Service called llamagen; it gets as
    far as the missing weights.
    """
    command = [
        sys.executable,
        "autoregressive/serve/api_server.py",
        "--pretrained-dir",
        str(tmp_path),
        "--port",
        "0",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **KUBERNETES},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no trained weights" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("value", ["8", "auto"])
def test_a_platforms_number_of_workers_is_ignored(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if WEB_CONCURRENCY, which hosting platforms set and uvicorn reads, ends the service or
    changes it.
    """
    monkeypatch.setenv("WEB_CONCURRENCY", value)

    async def app(scope: object, receive: object, send: object) -> None:
        raise NotImplementedError

    assert Server(app, 1.0, Connections(8, 2**20)).config.workers == 1

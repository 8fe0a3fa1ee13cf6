"""The service's flags: which layer counts, what is refused, and that every refusal is a line that
says where to look.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from autoregressive.cli.command import flag_of, run_command
from autoregressive.errors import UserError
from autoregressive.serve import api_server, lifecycle
from autoregressive.serve.web.server_flags import ENVIRONMENT, build_server_parser, read_arguments
from autoregressive.serve.web.server_settings import ServerSettings, resolve_server_settings

ROOT = Path(__file__).resolve().parents[2]
MODEL = ["--gpt-model", "GPT-demo", "--device", "cpu", "--random-weights"]
KEY = "k9-Zr/very+secret="
NOBODY: Mapping[str, str] = {}


def actions() -> list[argparse.Action]:
    """Every flag that has a value."""
    valueless = ("help", "version")
    return [action for action in build_server_parser()._actions if action.dest not in valueless]


def settings(*argv: str, environment: Mapping[str, str] = NOBODY) -> ServerSettings:
    """What the service would be."""
    return resolve_server_settings(read_arguments([*MODEL, *argv], environment))


def refusal(*argv: str, environment: Mapping[str, str] = NOBODY) -> str:
    """The line that ends the command."""
    with pytest.raises(UserError) as refused:
        settings(*argv, environment=environment)
    return refused.value.spelled(flag_of)


def file(folder: Path, text: str) -> list[str]:
    """A configuration file, as the command line names it."""
    path = folder / "service.yaml"
    path.write_text(text)
    return ["--config", str(path)]


# Which layer counts


def values_of(action: argparse.Action) -> list[str]:
    """Three values that a flag takes."""
    if action.choices is not None:
        choices = [str(one) for one in action.choices]
        return [choices[index % len(choices)] for index in range(3)]
    if action.type is int:
        return ["3", "2", "1"]
    if action.type is float:
        return ["0.75", "0.5", "0.25"]
    return ["first", "second", "third"]


@pytest.mark.parametrize(
    "action", [action for action in actions() if action.nargs != 0], ids=lambda action: action.dest
)
@pytest.mark.parametrize("written", ["dashes", "underscores"])
def test_the_command_line_counts_then_the_environment_then_the_file(
    action: argparse.Action, written: str, tmp_path: Path
) -> None:
    """Fails for any flag whose value is taken from the wrong layer, not converted, or read under
    one of its spellings only.
    """
    if action.dest == "config":
        return  # names a layer
    typed, exported, filed = values_of(action)
    flag = action.option_strings[0]
    name = flag.lstrip("-") if written == "dashes" else action.dest
    config = file(tmp_path, f"{name}: {filed}\n")
    environment = {f"{ENVIRONMENT}{action.dest.upper()}": exported}

    def read(argv: list[str], environment: Mapping[str, str]) -> Any:
        return getattr(read_arguments(argv, environment), action.dest)

    convert: Any = action.type or str
    if action.nargs == "+":
        convert = lambda value: [value]  # noqa: E731 -- a conversion like the others
    assert read([], {}) is None
    assert read(config, {}) == convert(filed)
    assert read(config, environment) == convert(exported)
    assert read([*config, f"{flag}={typed}"], environment) == convert(typed)
    assert read([], environment | {f"{ENVIRONMENT}CONFIG": config[1]}) == convert(exported)


@pytest.mark.parametrize(
    "action", [action for action in actions() if action.nargs == 0], ids=lambda action: action.dest
)
def test_a_switch_can_be_on_and_off_in_every_layer(action: argparse.Action, tmp_path: Path) -> None:
    """Fails if the environment cannot turn off what the file turns on."""
    name = f"{ENVIRONMENT}{action.dest.upper()}"
    on, off = ("true", "yes", "on", "1", "True"), ("false", "no", "off", "0", "FALSE")

    def read(config: list[str], environment: Mapping[str, str], *typed: str) -> Any:
        return getattr(read_arguments([*config, *typed], environment), action.dest)

    assert read([], {}) is False
    for true, false in zip(on, off, strict=True):
        filed = file(tmp_path, f"{action.dest}: {true}")
        assert read(filed, {}) is True
        assert read(filed, {name: false}) is False
        assert read(filed, {name: false}, action.option_strings[0]) is True
        assert read(file(tmp_path, f"{action.dest}: {false}"), {}) is False
        assert read(file(tmp_path, f"{action.dest}: {false}"), {name: true}) is True


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("api-key: 0123", "api_key", "0123"),
        ("api-key: 1e5", "api_key", "1e5"),
        ("api-key: yes", "api_key", "yes"),
        ("served-model-name: 1.10", "served_model_name", ["1.10"]),
        ("served-model-name: 2024-01-01", "served_model_name", ["2024-01-01"]),
        ("port: 08080", "port", 8080),
        ("port: 010000", "port", 10000),
        ("host: ::1", "host", "::1"),
        ("precision: none", "precision", "none"),
        ("api-key: '#1 \"x\"'", "api_key", '#1 "x"'),
        ("api-key: --port=1", "api_key", "--port=1"),
    ],
)
def test_the_file_is_read_as_it_is_written(
    tmp_path: Path, text: str, name: str, value: object
) -> None:
    """Fails if YAML makes something else of a key or a name (octal numbers, True, a date), or a
    value becomes another flag.
    """
    assert getattr(read_arguments(file(tmp_path, text), {}), name) == value


def test_other_programs_variables_are_left_alone() -> None:
    assert read_arguments([], {"PORT": "1", "LLAMA_PORT": "2", "XLLAMAGEN_PORT": "3"}).port is None


# What is no configuration


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1", "prot: there is no flag --prot"),
        ("help: true", "there is no flag --help"),
        ("not-disable-docs: true", "there is no flag --not-disable-docs"),
        ("1: 2", "there is no flag --1"),
        ("port: many", "--port: invalid int value: 'many'"),
        ("port: 1.5", "--port: invalid int value: '1.5'"),
        ("port: true", "--port: invalid int value"),
        ("queue-timeout: soon", "--queue-timeout: invalid float value"),
        ("log-level: loud", "--log-level: there is no loud"),
        ("disable-docs: maybe", "disable-docs: must be true or false"),
        ("disable-docs: [true]", "disable-docs: must be true or false"),
        ("port: [1, 2]", "port: must be one value"),
        ("port: {a: 1}", "port: must be one value"),
        ("port:", "port: has no value"),
        ("host: ''", "host: has no value"),
        ("store-dir: ~", "store-dir: has no value"),
        ("store-dir: null", "store-dir: has no value"),
        ("max_queue_size: 1\nmax-queue-size: 2", "max-queue-size is there twice"),
        ("config: other.yaml", "config belongs on the command line"),
        ("- port: 1", "must be flags and their values"),
        ("port", "must be flags and their values"),
        ("port: [1", "is not YAML, line 1"),
        ("host: x\n\tport: 1", "is not YAML, line 2"),
        ("!!python/object/apply:os.system [id]", "must be flags and their values"),
        ("port: !!python/object/apply:os.getpid []", "port: must be one value"),
        ("[" * 5000, "is not YAML"),
        ("a: \x01", "is not YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path: Path, text: str, said: str) -> None:
    config = file(tmp_path, text)
    message = refusal(*config)
    assert said in message
    assert config[1] in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"host: \xff")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin"):
        assert refusal("--config", str(path)).startswith(f"--config {path}: cannot be read (")
        assert str(path) in refusal(environment={f"{ENVIRONMENT}CONFIG": str(path)})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PORT", "many", "argument --port: invalid int value: 'many'"),
        ("PORT", "", "LLAMAGEN_PORT: has no value"),
        ("API_KEY", "", "LLAMAGEN_API_KEY: has no value"),
        ("DISABLE_DOCS", "maybe", "LLAMAGEN_DISABLE_DOCS: must be true or false"),
        ("GPT_MODEL", "--port=1", "argument --gpt-model: there is no"),
    ],
)
def test_a_wrong_variable_is_one_line_that_says_environment(
    name: str, value: str, said: str
) -> None:
    message = refusal(environment={f"{ENVIRONMENT}{name}": value})
    assert message.startswith("environment: ")
    assert said in message
    assert "\n" not in message


def test_a_flag_is_not_guessed_from_its_beginning() -> None:
    """Fails if a misspelt flag is taken for another; and if a flag of the other commands is passed
    over.
    """
    for typed in ("--api", "--class-labels=1", "--seed=1"):
        assert "there is no flag" in refusal(typed)
    assert "unexpected argument: extra" in refusal("extra")


# What is out of range


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--port=-1", "--port -1: must be 0 to 65535"),
        ("--port=65536", "--port 65536: must be 0 to 65535"),
        ("--max-queue-size=-1", "--max-queue-size -1: must be 0 to 1000000"),
        ("--max-queue-size=1000001", "--max-queue-size 1000001"),
        ("--data-parallel-size=0", "--data-parallel-size 0: must be 1 to"),
        ("--store-images=0", "--store-images 0: must be 1 to"),
        ("--store-dir=/no/such/folder", "--store-dir"),
        ("--queue-timeout=-1", "--queue-timeout -1: must be 0 to"),
        ("--queue-timeout=nan", "--queue-timeout nan: must be"),
        ("--queue-timeout=inf", "--queue-timeout inf: must be 0 to 1000000000"),
        ("--request-timeout=-0.1", "--request-timeout -0.1: must be 0 to"),
        ("--step-timeout=0.9", "--step-timeout 0.9: must be 1 to"),
        ("--step-timeout=nan", "--step-timeout nan: must be 1 to"),
        ("--shutdown-timeout=-1", "--shutdown-timeout -1: must be 0 to"),
        ("--max-num-seqs=0", "--max-num-seqs 0: must be a whole number, 1 to"),
        ("--page-size=0", "--page-size 0"),
        ("--lookahead=0", "--lookahead 0: must be auto, off or a whole number, 1 (off) to 64"),
        ("--lookahead=65", "--lookahead 65"),
        ("--lookahead=3.5", "--lookahead 3.5"),
        ("--lookahead=x", "--lookahead x"),
        ("--num-pages=0", "--num-pages 0"),
        ("--gpu-memory-utilization=0", "--gpu-memory-utilization 0"),
        ("--gpu-memory-utilization=nan", "--gpu-memory-utilization nan"),
        ("--gpt-type=t2i", "--gpt-type t2i"),
        ("--num-classes=0", "--num-classes 0"),
        (
            "--public-url=example.org",
            "--public-url example.org: must begin with http:// or https://",
        ),
        ("--public-url=http://a b", "--public-url http://a b"),
        ("--public-url=http://a\nb", "--public-url"),
        ("--public-url=http://a/?b=1", "--public-url http://a/?b=1: must have no ? and no #"),
        ("--public-url=http://a/#b", "must have no ? and no #"),
        ("--served-model-name=", "--served-model-name"),
        ("--served-model-name=a\x1b[31m", "--served-model-name"),
        ("--served-model-name=\udcff", "--served-model-name"),
        (f"--served-model-name={'a' * 201}", "at most 200 characters"),
        ("--api-key=", "--api-key: must be printable ASCII"),
        ("--api-key= ", "--api-key: must be printable ASCII"),
        ("--api-key=abc ", "--api-key: must be printable ASCII"),
        ("--api-key=abc\n", "--api-key: must be printable ASCII"),
        ("--api-key=schlüssel", "--api-key: must be printable ASCII"),
        ("--api-key=a,,b", "--api-key: must be printable ASCII"),
        ("--api-key=a,", "--api-key: must be printable ASCII"),
        ("--api-key=,", "--api-key: must be printable ASCII"),
        ("--public-url=http://", "--public-url http://: names no host"),
        ("--public-url=https:///images", "names no host"),
        ("--public-url=http://[::1", "names no host"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(typed: str, said: str) -> None:
    """Fails if a value is taken that the service cannot keep: a name or a key that no header or
    JSON can carry, an endless wait.
    """
    assert said in refusal(typed)


@pytest.mark.parametrize(
    "typed",
    [
        "--port=0",
        "--port=65535",
        "--max-queue-size=0",
        "--max-queue-size=1000000",
        "--api-server-count=1",
        "--step-timeout=1",
        "--shutdown-timeout=0",
        "--public-url=https://example.org/images/",
        f"--served-model-name={'a' * 200}",
        "--served-model-name=modèle",
        "--api-key=a b",
    ],
)
def test_what_is_just_in_range_is_taken(typed: str) -> None:
    settings(typed)


def test_zero_seconds_are_no_limit() -> None:
    timeouts = settings("--queue-timeout", "0", "--request-timeout", "0").timeouts
    assert (timeouts.queue, timeouts.run) == (None, None)


def test_the_flags_reach_the_settings(tmp_path: Path) -> None:
    """Fails if a flag is parsed and then forgotten."""
    typed = [
        "--host",
        "::1",
        "--port",
        "81",
        "--api-key",
        KEY,
        "--max-queue-size",
        "7",
        "--served-model-name",
        "m",
    ]
    typed += [
        "--store-dir",
        str(tmp_path),
        "--store-images",
        "5",
        "--public-url",
        "http://x",
        "--disable-docs",
    ]
    typed += [
        "--log-level",
        "error",
        "--queue-timeout",
        "1",
        "--request-timeout",
        "2",
        "--step-timeout",
        "3",
    ]
    typed += ["--shutdown-timeout", "4", "--max-num-seqs", "6"]
    found = settings(*typed)
    assert (found.host, found.port, found.api_keys, found.max_queue_size, found.names) == (
        "::1",
        81,
        (KEY,),
        7,
        ("m",),
    )
    assert (found.store, found.stored_images, found.public_url, found.docs) == (
        tmp_path,
        5,
        "http://x",
        False,
    )
    timeouts = found.timeouts
    assert (timeouts.queue, timeouts.run, timeouts.step, timeouts.shutdown) == (1, 2, 3, 4)
    assert (found.log_level, found.engine.max_num_seqs, found.engines) == ("error", 6, 1)


@pytest.mark.parametrize(("said", "meant"), [("auto", "auto"), ("off", "off"), ("4", 4)])
def test_lookahead_is_a_word_or_a_number_in_every_layer(
    tmp_path: Path, said: str, meant: str | int
) -> None:
    """Fails if YAML's `off` becomes false, or a number stays text."""
    layers = (
        settings("--lookahead", said),
        settings(environment={f"{ENVIRONMENT}LOOKAHEAD": said}),
        settings(*file(tmp_path, f"lookahead: {said}")),
    )
    assert [layer.engine.lookahead for layer in layers] == [meant] * 3


# Whom it listens to


@pytest.mark.parametrize("host", ["localhost", "::1", "127.0.0.1", "127.0.0.2"])
def test_this_machines_own_addresses_need_no_key(host: str) -> None:
    assert settings("--host", host).host == host


SHORT = "0123456789abcde"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
@pytest.mark.parametrize("keys", [SHORT, "x", f"{KEY},{SHORT}", f"{SHORT}, {KEY}"])
def test_others_cannot_reach_a_service_with_a_short_key(host: str, keys: str) -> None:
    """Fails if one of the keys can be guessed, or if the line shows a key or does not say how to
    make one.
    """
    message = refusal("--host", host, environment={f"{ENVIRONMENT}API_KEY": keys})
    assert "a key must have at least 16 characters" in message
    assert SHORT not in message
    (command,) = re.findall(r'python -c "(.*?)"', message)
    made = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    ).stdout.strip()
    longer = {f"{ENVIRONMENT}API_KEY": f"{made},{SHORT}x"}
    assert settings("--host", host, environment=longer).api_keys == (made, f"{SHORT}x")


def test_on_this_machine_a_short_key_will_do() -> None:
    """Fails if somebody who tries the service out must invent a long key."""
    assert settings("--api-key", "x").api_keys == ("x",)


def test_several_keys_are_separated_by_commas(tmp_path: Path) -> None:
    """Fails if a layer knows one key only, or a space behind a comma becomes a part of a key."""
    keys = ("first-of-the-keys", "second-of-the-keys")
    assert settings("--api-key", ",".join(keys)).api_keys == keys
    assert settings(environment={f"{ENVIRONMENT}API_KEY": ", ".join(keys)}).api_keys == keys
    assert settings(*file(tmp_path, f"api-key: {keys[0]}, {keys[1]}")).api_keys == keys
    assert settings("--api-key", f"{keys[0]},{keys[0]}").api_keys == keys[:1]


def test_the_public_host_is_the_urls() -> None:
    """Fails if the port, the path or capitals become a part of the name that clients send
    as Host.
    """
    assert (
        settings("--public-url", "https://Pictures.Example:8443/of").public_host
        == "pictures.example"
    )
    assert settings("--public-url", "http://[2001:db8::1]:80").public_host == "2001:db8::1"
    assert settings().public_host is None


OTHERS = [
    "0.0.0.0",
    "::",
    "192.0.2.1",
    "example.org",
    "0",
    "127.1",
    "",
    "::ffff:0.0.0.0",
    "localhost.evil",
]


@pytest.mark.parametrize("host", OTHERS)
def test_other_addresses_need_a_key(host: str) -> None:
    """Fails if anybody on the network may use the service because nobody thought of a key."""
    assert "set a key (LLAMAGEN_API_KEY)" in refusal("--host", host)
    if host:
        assert settings("--host", host, environment={f"{ENVIRONMENT}API_KEY": KEY}).api_keys == (
            KEY,
        )


def test_the_default_is_this_machine_only() -> None:
    assert settings().host == "127.0.0.1"


@pytest.mark.parametrize("host", ["", "a..b", "x" * 70, "a\nb", "a\0b"])
def test_what_no_system_can_look_up_is_refused(host: str) -> None:
    """Fails if the look-up ends in a traceback."""
    assert "is neither an address nor a name" in refusal(f"--host={host}", "--api-key", KEY)


@pytest.mark.parametrize("host", ["[::1]", "1.2.3.4.5", "192.0.2.1", ":x"])
def test_where_nobody_can_listen_is_one_line(host: str) -> None:
    with (
        refused(match="cannot listen on"),
        lifecycle.listen(settings("--host", host, "--api-key", KEY)),
    ):
        pass


def test_as_many_processes_answer_as_there_are_engines_unless_told() -> None:
    """Fails if one process is to answer for several engines, or the flag is ignored or
    not checked.
    """
    assert settings().fronts == 1
    assert settings("--api-server-count", "3").fronts == 3
    assert "--api-server-count 0: must be 1 to 64" in refusal("--api-server-count", "0")
    assert "--store-images 2: must be at least --api-server-count, 3" in refusal(
        "--api-server-count", "3", "--store-images", "2"
    )
    with lifecycle.listen(settings("--api-server-count", "3", "--port", "0")) as listeners:
        assert len({listener.getsockname() for listener in listeners}) == 1
        assert len({listener.fileno() for listener in listeners}) == 3


# Before any model is loaded


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if weights are looked for."""

    def looked(*_: object, **__: object) -> None:
        pytest.fail("weights were looked for")

    monkeypatch.setattr(lifecycle, "find_weights", looked)
    for name in [name for name in os.environ if name.startswith(ENVIRONMENT)]:
        monkeypatch.delenv(name)


def ending(capsys: pytest.CaptureFixture[str], *typed: str) -> str:
    """The line that the command ends with, by status 2."""
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: api_server.main([*MODEL, *typed]))
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    return shown


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_port_in_use_is_one_line_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        shown = ending(capsys, "--port", str(port))
    assert f"cannot listen on 127.0.0.1 port {port}: address already in use" in shown
    assert "choose another --port or --host" in shown


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_mistake_is_found_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--host 0.0.0.0: others can reach this address, so set a key" in ending(
        capsys, "--host", "0.0.0.0"
    )
    assert "--step-timeout 0" in ending(capsys, "--step-timeout", "0")


def test_untrained_weights_are_not_served_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a service draws noise because a file was not where it was thought to be."""
    typed = [
        "--gpt-model",
        "GPT-B",
        "--device",
        "cpu",
        "--pretrained-dir",
        str(tmp_path),
        "--port",
        "0",
    ]
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: api_server.main(typed))
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "no trained weights for GPT-B for 384 px" in shown
    for way in ("get them with --download", "--random-weights for noise"):
        assert way in shown


# What is shown


def test_help_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        api_server.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for action in actions():
        assert re.search(rf"^  {re.escape(action.option_strings[0])}\b", shown, re.MULTILINE), (
            action.dest
        )
        assert action.help
        assert shown.count(f"\n  {action.option_strings[0]} ") == 1
    assert "--not-" not in shown


def test_the_key_is_in_no_message_about_the_configuration(tmp_path: Path) -> None:
    """Fails if a slip elsewhere, or in its own line, shows the key to whoever reads the
    terminal.
    """
    environment = {f"{ENVIRONMENT}API_KEY": KEY}
    messages = [
        refusal("--port", "x", environment=environment),
        refusal(environment=environment | {f"{ENVIRONMENT}PORT": "x"}),
    ]
    messages += [refusal(environment={f"{ENVIRONMENT}API_KEY": f"{KEY}\n"})]
    slips = (
        f"api-key: @{KEY}",
        f"api-key: '{KEY}",
        f"api-key: [{KEY}",
        f"api-key: [{KEY}]",
        f"api-key: {{{KEY}: 1}}",
    )
    messages += [refusal(*file(tmp_path, slip)) for slip in slips]
    assert not [message for message in messages if KEY in message]


def test_the_command_ends_with_status_2_and_one_line() -> None:
    """As typed, in a process of its own: no traceback, no half-started service, no key."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT)
    }
    environment |= {
        f"{ENVIRONMENT}API_KEY": KEY,
        f"{ENVIRONMENT}PORT": "99999",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "autoregressive/serve/api_server.py", *MODEL, "--host", "0.0.0.0"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "api_server.py: error: --port 99999: must be 0 to 65535\n"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_stored_images_have_an_address(host: str, tmp_path: Path) -> None:
    """Fails if clients are given URLs that lead nowhere."""
    flags = ["--store-dir", str(tmp_path), "--host", host, "--api-key", KEY]
    with refused(match="give --public-url"):
        resolve_server_settings(read_arguments(flags, {}))
    resolve_server_settings(read_arguments([*flags, "--public-url", "https://example.org"], {}))

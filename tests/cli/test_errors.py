"""How commands end."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from source_tree import ROOT, source_files

from autoregressive.cli.command import OneLineParser, run_command, slow_imports
from autoregressive.errors import UserError

COMMANDS = [
    path
    for path in source_files()
    if "run_command(" in (text := path.read_text()) and 'if __name__ == "__main__"' in text
]


def ending(
    capsys: pytest.CaptureFixture[str], error: BaseException | None
) -> tuple[int | str | None, str]:
    """Exit status and stderr of a command whose main function raises that."""

    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    return stopped.value.code, capsys.readouterr().err


def test_a_message_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Names in a hostile file could otherwise move the cursor or recolour the terminal."""
    status, printed = ending(capsys, UserError("name \x1b[31mred\x07\n  is\r\nunexpected"))
    assert status == 2
    assert printed.count("\n") == 1
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "red? is unexpected" in printed


def test_a_mistake_in_the_flags_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if what was typed breaks the line, or reaches the terminal as an escape sequence."""
    with pytest.raises(SystemExit) as ended:
        OneLineParser(prog="draw").parse_args(["two\nlines", "\x1b[31mred"])
    assert ended.value.code == 2
    told = "draw: error: unexpected argument: two lines ?[31mred (--help shows the options)\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
    ],
)
def test_the_status_says_how_it_ended(
    capsys: pytest.CaptureFixture[str], error: BaseException | None, status: int
) -> None:
    """Scripts tell a mistake, an interruption and a reader that left from success."""
    ended, printed = ending(capsys, error)
    assert ended == status
    assert "Traceback" not in printed


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """Only what the user can mend is one line: hiding a bug would make it impossible to report."""
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: print(1 // 0))


def test_a_value_that_looks_like_a_flag_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the user of a key that begins with - is told that it is missing."""
    parser = OneLineParser(prog="serve")
    parser.add_argument("--api-key")
    with pytest.raises(SystemExit):
        parser.parse_args(["--api-key", "-abcdefghijklmnopq"])
    assert "a value that begins with - is written behind an equals sign" in capsys.readouterr().err


def hear_interrupts() -> None:
    """What a shell starts in the background, this suite perhaps, ignores them, and so does what
    that starts.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_an_interrupt_while_libraries_are_imported_is_one_line(tmp_path: Path, path: Path) -> None:
    """Fails if Ctrl-C in a command's first seconds prints a traceback; imports that never end stand
    in for slow ones.
    """
    for name in ("torch", "httpx2"):
        (tmp_path / f"{name}.py").write_text(
            "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
        )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    typed = {
        "download_models": ["GPT-B"],
        "convert_checkpoint": ["in.pt", str(tmp_path / "out.safetensors")],
        "run_batch": ["in.jsonl", "out.jsonl"],
        "ray_data_bulk": [str(tmp_path / "images")],
    }
    command = [sys.executable, str(path), *typed.get(path.stem, [])]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, preexec_fn=hear_interrupts, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (130, f"\n{path.name}: interrupted\n")


def test_no_library_is_loaded_while_the_plain_loop_makes_its_model() -> None:
    """Fails if `import triton`, during which Ctrl-C is lost, comes after the imports that
    it ends.
    """
    code = (
        "import sys; from autoregressive.sample import naive; assert 'triton._C.libtriton' "
        "in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_there_are_commands_to_interrupt() -> None:
    """Fails if the test above runs for none."""
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("module", ["__main__", "autoregressive.sample.sample_c2i"])
def test_whoever_imports_a_command_keeps_its_interrupts(module: str) -> None:
    """Fails if importing a command's module changes what Ctrl-C does in the importer's process,
    then or later.
    """
    found = signal.getsignal(signal.SIGINT)
    hear_interrupts()
    try:
        with slow_imports(module):
            assert (signal.getsignal(signal.SIGINT) is signal.default_int_handler) == (
                module != "__main__"
            )
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)

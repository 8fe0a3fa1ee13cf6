"""How commands end."""

import errno

import pytest

from autoregressive.common.errors import UserError, run_command


def ending(capsys: pytest.CaptureFixture[str], error: BaseException | None) -> tuple[int | str | None, str]:
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


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, 0), (OSError(errno.ENOSPC, "No space left on device"), 2), (KeyboardInterrupt(), 130), (BrokenPipeError(), 141)],
)
def test_the_status_says_how_it_ended(capsys: pytest.CaptureFixture[str], error: BaseException | None, status: int) -> None:
    """Scripts tell a mistake, an interruption and a reader that left from success."""
    ended, printed = ending(capsys, error)
    assert ended == status
    assert "Traceback" not in printed


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """Only what the user can mend is one line: hiding a bug would make it impossible to report."""
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: print(1 // 0))

"""Progress bars on a terminal's stderr, drawn by tqdm where it is installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from autoregressive.errors import on_terminal, tell


class Bar:
    """A bar that grows, as tqdm's; this one is not drawn."""

    total: float | None = None
    n: float = 0  # done so far

    def update(self, n: float = 1) -> None:
        """Adds what was done since the last call."""
        self.n += n


@contextmanager
def progress_bar(
    description: str,
    unit: str,
    total: int | None = None,
    *,
    shown: bool | None = None,
    leave: bool = True,
    **tqdm_options: object,
) -> Iterator[Bar]:
    """A bar for as long as the block runs.

    Args:
        unit: what is counted, with a blank in front.
        shown: whether it is drawn at all; None: where stderr is a terminal.
        leave: whether it stays when it is full.
        tqdm_options: more of `tqdm.tqdm`'s arguments.
    """
    shown = on_terminal() if shown is None else shown
    try:
        if shown:
            from tqdm import tqdm
    except ImportError:
        tell("a progress bar needs tqdm: pip install 'llamagen-serve[progress]'")
        shown = False
    if not shown:
        yield Bar()
        return
    # 80 x 24 where a terminal states no size: tqdm alone would draw nothing.
    columns, lines = shutil.get_terminal_size()
    with tqdm(
        desc=description,
        unit=unit,
        total=total,
        leave=leave,
        ncols=columns,
        nrows=lines,
        **tqdm_options,
    ) as bar:
        yield bar

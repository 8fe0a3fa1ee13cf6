"""Where the source is."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("autoregressive", "kernels", "scripts", "tokenizer")


def source_files() -> Iterator[Path]:
    """Every Python file of ours but the tests."""
    for top in OURS:
        yield from sorted((ROOT / top).rglob("*.py"))

"""The documents of the repository, for tests that read them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README, CLI = ROOT / "README.md", ROOT / "docs" / "cli.md"
PYTHON, SERVICE = ROOT / "docs" / "python.md", ROOT / "docs" / "service.md"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "pretrained_models" / "README.md"]
)


def section(document: Path, heading: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    level = heading.split()[0]
    after = document.read_text().split(f"\n{heading}\n")[1]
    return re.split(rf"^#{{1,{len(level)}}} ", after, flags=re.MULTILINE)[0]


def examples(text: str, language: str) -> list[str]:
    """The examples of a language in a document, or in a section of it."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)

"""The documents are true: their commands parse, and their flags, figures and files exist."""

import argparse
import ast
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from documents import CLI, DOCUMENTS, README, ROOT, SERVICE, examples, section

from autoregressive.cli.flags import build_parser
from autoregressive.models.gpt import GPT_models
from autoregressive.serve.bulk.command import build_bulk_parser
from autoregressive.serve.run_batch import build_batch_parser
from autoregressive.serve.sample_c2i import build_engine_parser
from autoregressive.serve.web.schema import ImageRequest
from tokenizer.tokenizer_image.vq_model import VQ_models

COLUMNS = 100
README_LINES = 120
BULK_COMMAND = "autoregressive/sample/sample_c2i_ddp.py"
SERVICE_COMMAND = "autoregressive/serve/api_server.py"
# Console script -> the file with its flags.
CONSOLE_SCRIPTS = {
    "llamagen-sample": "autoregressive/serve/sample_c2i.py",
    "llamagen-serve": SERVICE_COMMAND,
    "llamagen-batch": "autoregressive/serve/run_batch.py",
    "llamagen-download": "scripts/download_models.py",
    "llamagen-bulk": BULK_COMMAND,
}
PARSERS = {
    "autoregressive/sample/sample_c2i.py": lambda: build_parser("purpose", "command.py"),
    "autoregressive/serve/sample_c2i.py": build_engine_parser,
    BULK_COMMAND: build_bulk_parser,
    "autoregressive/serve/run_batch.py": build_batch_parser,
}


def shell_commands() -> Iterator[tuple[Path, list[str]]]:
    """Every command of the documents' shell examples, as words."""
    for document in DOCUMENTS:
        for block in examples(document.read_text(), "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield document, words


HelpOf = Callable[[str | Path], str]


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> HelpOf:
    """What a script prints for --help."""

    def read(script: str | Path) -> str:
        # The folders of the scripts are on the path, and the service is in a package.
        name = "autoregressive.serve.api_server" if script == SERVICE_COMMAND else Path(script).stem
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [str(script), "--help"])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    return read


def test_every_command_of_the_documents_parses(help_of: HelpOf) -> None:
    """Fails if an example has a flag or a target that does not exist, or names a file that is
    gone.
    """
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    parsed = 0
    for document, words in shell_commands():
        words = [CONSOLE_SCRIPTS.get(word, word) for word in words]
        if words[0].endswith("python"):
            words = words[1:]
        program, typed = words[0], words[1:]
        if program in PARSERS:
            PARSERS[program]().parse_args(typed)
        elif program.startswith("scripts/") or program == SERVICE_COMMAND:
            used = {word for word in typed if word.startswith("--")}
            assert used <= help_flags(help_of(program)), (document, words)
        elif program == "make":
            assert set(typed) <= set(targets), (document, words)
        elif program == "curl" and "-d" in typed:
            ImageRequest.model_validate_json(typed[typed.index("-d") + 1])
        else:
            continue
        parsed += 1
    assert parsed >= 15


def help_flags(shown: str) -> set[str]:
    """The flags that a help text lists."""
    return set(re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", shown, flags=re.MULTILINE)) - {"--help"}


def parser_flags(parser: argparse.ArgumentParser) -> set[str]:
    """The long flags of a parser but --help."""
    return {
        text
        for action in parser._actions
        for text in action.option_strings
        if text.startswith("--")
    } - {"--help"}


def listed_flags(text: str) -> set[str]:
    """The flags that list items begin with: "- `--flag VALUE`, `--other` ..."."""
    heads = re.findall(r"^- ((?:`--[^`]+`,?\s+)*`--[^`]+`)", text, flags=re.MULTILINE)
    return {flag for head in heads for flag in re.findall(r"--[a-z-]+", head)}


def test_every_flag_of_the_commands_is_listed(help_of: HelpOf) -> None:
    """Fails if a flag that was added, renamed or removed leaves the documents behind."""
    both = parser_flags(build_parser("purpose", "command.py"))
    engine = parser_flags(build_engine_parser())
    service = help_flags(help_of(SERVICE_COMMAND))
    assert listed_flags(section(CLI, "## Flags of both commands")) == both
    assert listed_flags(section(CLI, "## Flags of the engine's command")) == engine - both | {
        "--precision",
        "--compile",
    }
    assert listed_flags(section(CLI, "### Flags of the batch command")) == (
        parser_flags(build_batch_parser()) - both - engine
    )
    # The service's own: the model's and the engine's flags are in cli.md.
    assert listed_flags(section(SERVICE, "## Flags")) == service - both - engine | {
        "--max-num-seqs"
    }


@pytest.mark.parametrize(
    ("heading", "pattern"),
    [
        ("### scripts/download_models.py", "download_models.py"),
        ("### scripts/convert_checkpoint.py", "convert_checkpoint.py"),
        ("### scripts/speedup_table.py", "speedup_table.py"),
        ("### scripts/check_lookahead.py", "check_lookahead.py"),
        ("### scripts/verify_published.py", "verify_published.py"),
        ("### scripts/evaluate.py", "evaluate.py"),
        ("### scripts/quality_gate.py", "quality_gate.py"),
        ("### scripts/benchmarks", "benchmarks/*.py"),
        ("### scripts/demo_training", "demo_training/*.py"),
    ],
)
def test_every_flag_of_the_scripts_is_listed(heading: str, pattern: str, help_of: HelpOf) -> None:
    """Fails if a script has a flag, or is a file, that its section does not name."""
    text = section(CLI, heading)
    scripts = sorted((ROOT / "scripts").glob(pattern))
    assert scripts
    assert all(script.name in heading + text for script in scripts)
    flags = set().union(*(help_flags(help_of(script)) for script in scripts))
    assert listed_flags(text) == flags


def test_every_console_script_and_the_version_are_documented() -> None:
    """Fails if a console script or a version is added and no document tells of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]
    for name in project["scripts"]:
        assert f"`{name}`" in CLI.read_text(), name
    assert f"\n## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readmes_memory_figures_are_computed() -> None:
    """Fails if a figure of memory in the README is not that of the model's shape."""
    rows = re.findall(
        r"^\| (GPT-\w+) \| \S+ \| (\S+) GiB \| (\S+) MiB \| (\S+) GiB \|",
        section(README, "## Models, memory and GPUs"),
        flags=re.MULTILINE,
    )
    assert len(rows) == 5
    with torch.device("meta"):
        tokenizer = VQ_models["VQ-16"]()
    tokenizer_bytes = 4 * sum(weight.numel() for weight in tokenizer.parameters())
    for name, weights, cache, memory in rows:
        with torch.device("meta"):
            gpt = GPT_models[name](vocab_size=16384, block_size=24**2, num_classes=1000)
        weight_bytes = 2 * sum(weight.numel() for weight in gpt.parameters())
        # Two rows, keys and values, two bytes each.
        cache_bytes = 2 * 2 * 2 * gpt.config.n_layer * gpt.config.dim * gpt.config.block_size
        needed = (weight_bytes + tokenizer_bytes + 2 * 2**30 + 8 * cache_bytes) / 0.9
        assert float(weights) == round(weight_bytes / 2**30, 2), name
        assert float(cache) == round(cache_bytes / 2**20, 1), name
        assert float(memory) == round(needed / 2**30, 1), name


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_file_and_heading_that_the_documents_name_exists() -> None:
    """Fails if a link, or the file of a command, leads nowhere."""
    for document in DOCUMENTS:
        text = document.read_text()
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for link, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", prose):
            target = document.parent / link if link else document
            assert target.exists(), (document, link)
            assert not anchor or anchor in anchors(target), (document, link, anchor)
        for script in re.findall(r"python ((?:scripts|autoregressive)/[\w/]+\.py)", text):
            assert (ROOT / script).exists(), (document, script)


def test_the_documents_keep_to_their_width() -> None:
    """Fails if a line of prose is longer than lines of code may be, or the README outgrows what one
    reads at once.
    """
    for document in DOCUMENTS:
        for number, line in enumerate(document.read_text().splitlines(), 1):
            is_prose = not line.startswith(("|", "    ")) or document == README
            assert len(line) <= COLUMNS or not is_prose, (document, number)
    assert len(README.read_text().splitlines()) <= README_LINES


def said_texts() -> str:
    """Every text constant of the product, the constant parts of f-strings among them."""
    files = [
        path
        for room in ("autoregressive", "kernels", "scripts")
        for path in sorted((ROOT / room).rglob("*.py"))
    ]
    return "\n".join(
        node.value
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_every_message_of_the_troubleshooting_page_is_said_by_the_program() -> None:
    """Fails if a message was reworded and the page that explains it was not."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    heads = re.findall(r"^- ((?:`[^`]+`,\s+)*`[^`]+`):", text, flags=re.MULTILINE)
    messages = [" ".join(span.split()) for head in heads for span in re.findall(r"`([^`]+)`", head)]
    assert len(messages) > 100
    said = said_texts()
    gone = [
        message
        for message in messages
        if not all(part.strip() in said for part in message.split("…"))
    ]
    assert not gone, "\n".join(gone)


def test_every_test_that_a_promise_names_exists() -> None:
    """Fails if a test of a promise is gone or was renamed."""
    promises = section(SERVICE, "## What it promises")
    named = {
        name
        for tests in re.findall(r"Tests:((?:[^.]|\.(?!\n))*)\.\n", promises)
        for name in re.findall(r"`(\w+)`", tests)
    }
    assert len(named) > 20
    there = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    assert named <= there, named - there

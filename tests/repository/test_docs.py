"""The documents are true: their examples run, their commands parse, their flags and files exist."""

import argparse
import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_service import running_service
from PIL import Image

from autoregressive.cli.flags import build_parser
from autoregressive.models.gpt import GPT_models
from autoregressive.output.images import JSON_KEY
from autoregressive.serve.sample_c2i import build_engine_parser
from autoregressive.serve.web.schema import ImageRequest
from tokenizer.tokenizer_image.vq_model import VQ_models

ROOT = Path(__file__).resolve().parents[2]
README, CLI = ROOT / "README.md", ROOT / "docs" / "cli.md"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "pretrained_models" / "README.md"]
)
COLUMNS = 100
README_LINES = 120
SERVICE = "autoregressive/serve/api_server.py"
# Console script -> the file with its flags.
CONSOLE_SCRIPTS = {
    "llamagen-sample": "autoregressive/serve/sample_c2i.py",
    "llamagen-serve": SERVICE,
    "llamagen-download": "scripts/download_models.py",
}
PARSERS = {
    "autoregressive/sample/sample_c2i.py": lambda: build_parser("purpose", "command.py"),
    "autoregressive/serve/sample_c2i.py": build_engine_parser,
}


def section(document: Path, heading: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    level = heading.split()[0]
    after = document.read_text().split(f"\n{heading}\n")[1]
    return re.split(rf"^#{{1,{len(level)}}} ", after, flags=re.MULTILINE)[0]


def python_example(document: Path, heading: str) -> str:
    """The one Python example below a heading."""
    (code,) = re.findall(r"```python\n(.*?)```", section(document, heading), flags=re.DOTALL)
    return str(code)


def run_python(code: str) -> str:
    """Runs an example from the repository's root on one thread, and returns what it prints."""
    one_thread = "import torch\ntorch.set_num_threads(1)\n"
    done = subprocess.run(
        [sys.executable, "-c", one_thread + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_with_llamagens_import_paths_draws_an_image(tmp_path: Path) -> None:
    """Fails if an import path of LlamaGen is gone, or the example saves anything but two images."""
    code = python_example(ROOT / "docs" / "python.md", "## LlamaGen's import paths")
    run_python(code.replace('"dog_and_fox.png"', repr(str(tmp_path / "x.png"))))
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (262, 132)


def test_the_engines_example_runs() -> None:
    """Fails if the engine's example names something that is gone, or does not come to an end."""
    code = python_example(ROOT / "docs" / "python.md", "## The engine")
    # The weights fit any number of tokens, and 16 are sampled quickly.
    small = code.replace("block_size=256", "block_size=16")
    assert small != code
    lines = run_python(f"{small}\nprint(pixels.shape)").splitlines()
    # `generate` made requests 0 and 1.
    assert any(line.startswith("2 finished") for line in lines)
    assert any(line.startswith(("3 finished", "3 cancelled")) for line in lines)
    assert lines[-1] == "torch.Size([2, 3, 32, 32])"


@pytest.mark.skipif(shutil.which("curl") is None, reason="the example is of curl")
def test_the_services_examples_save_images(tmp_path: Path) -> None:
    """Fails if a request of OpenAI's client or of curl, as service.md has it, saves no image."""
    requests = section(ROOT / "docs" / "service.md", "## Requests")
    ((kind, of_client), (other_kind, of_curl)) = re.findall(
        r"```(python|sh)\n(.*?)```", requests, flags=re.DOTALL
    )
    assert (kind, other_kind) == ("python", "sh")
    commands = ([sys.executable, "-c", of_client], ["bash", "-c", f"set -o pipefail\n{of_curl}"])
    with running_service(tmp_path) as service:
        for command in commands:
            command[2] = command[2].replace("http://127.0.0.1:8000", service.url)
            command[2] = command[2].replace("python -c", f"{sys.executable} -c")
            done = subprocess.run(
                command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
            )
            assert done.returncode == 0, done.stderr
            with Image.open(tmp_path / "fox.png") as image:
                assert image.format == "PNG"
            (tmp_path / "fox.png").unlink()


def test_every_python_example_is_python() -> None:
    """Fails if an example that no test runs has a mistake of syntax."""
    examples = [
        code
        for document in DOCUMENTS
        for code in re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)
    ]
    assert len(examples) >= 5
    for code in examples:
        ast.parse(code)


def test_make_demo_draws_the_readmes_image_with_the_engine(tmp_path: Path) -> None:
    """Fails if the demo's command ends in an error, is not the engine's, or draws anything but what
    the README shows.
    """
    (line,) = re.findall(
        r"^\t\$\(VENV\)/bin/python (.* --output demo.png)$",
        (ROOT / "Makefile").read_text(),
        flags=re.MULTILINE,
    )
    command = [
        sys.executable,
        *shlex.split(line),
        "--output",
        str(tmp_path / "x.png"),
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (
        Image.open(tmp_path / "x.png") as drawn,
        Image.open(ROOT / "docs" / "images" / "demo.png") as shown,
    ):
        assert drawn.size == shown.size
        made, promised = (json.loads(image.text[JSON_KEY]) for image in (drawn, shown))  # type: ignore[attr-defined]
    # cpu and cuda builds of one version
    assert made.pop("torch").split("+")[0] == promised.pop("torch").split("+")[0]
    assert made == promised
    assert made["loop"] == "paged"


def shell_commands() -> Iterator[tuple[Path, list[str]]]:
    """Every command of the documents' shell examples, as words."""
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(), flags=re.DOTALL):
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
        name = "autoregressive.serve.api_server" if script == SERVICE else Path(script).stem
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
        elif program.startswith("scripts/") or program == SERVICE:
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
    service = help_flags(help_of(SERVICE))
    assert listed_flags(section(CLI, "## Flags of both commands")) == both
    assert listed_flags(section(CLI, "## Flags of the engine's command")) == engine - both | {
        "--precision",
        "--compile",
    }
    # The service's own: the model's and the engine's flags are in cli.md.
    assert listed_flags(
        section(ROOT / "docs" / "service.md", "## Flags")
    ) == service - both - engine | {"--max-num-seqs"}


@pytest.mark.parametrize(
    ("heading", "pattern"),
    [
        ("### scripts/download_models.py", "download_models.py"),
        ("### scripts/convert_checkpoint.py", "convert_checkpoint.py"),
        ("### scripts/speedup_table.py", "speedup_table.py"),
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
    promises = section(ROOT / "docs" / "service.md", "## What it promises")
    named = {
        name
        for tests in re.findall(r"Tests:((?:[^.]|\.(?!\n))*)\.\n", promises)
        for name in re.findall(r"`(\w+)`", tests)
    }
    assert len(named) > 20
    there = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    assert named <= there, named - there

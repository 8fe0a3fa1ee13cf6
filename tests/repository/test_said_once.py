"""What stands in one place only, read from the source: helpers, tables of names, names of
classes.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from bench_decode import memory_gib
from fake_runner import tiny_gpt
from test_imports import ROOT, source_files

from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.model_runner import ModelRunner

_LIKENESS = 2  # statements of a function, below which two alike are no copy


def said(source: str) -> Iterator[tuple[str, str]]:
    """What a module defines at its top level that another could repeat: its name, and
    what it says.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if len(body) >= _LIKENESS:
                yield node.name, "\n".join(map(ast.dump, body))
        elif isinstance(node, ast.Assign) and isinstance(
            node.value, ast.Tuple | ast.List | ast.Dict
        ):
            yield ast.unparse(node.targets[0]), ast.dump(node.value)


def said_twice(sources: dict[str, str]) -> list[list[str]]:
    """Definitions of several modules that say the same, grouped: file and name of each.

    Args:
        sources: file -> its text
    """
    places = defaultdict(list)
    for file, source in sources.items():
        for name, content in said(source):
            places[content].append(f"{file}: {name}")
    return [found for found in places.values() if len(found) > 1]


def public_classes(sources: dict[str, str]) -> dict[str, list[str]]:
    """The files that define a class of that name."""
    files = defaultdict(list)
    for file, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files[node.name].append(file)
    return files


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Every file of ours but the tests, with its text."""
    found = {str(path.relative_to(ROOT)): path.read_text() for path in source_files()}
    assert len(found) > 50
    return found


def test_no_helper_and_no_table_stands_in_two_modules(sources: dict[str, str]) -> None:
    """Fails if a function or a tuple of names is copied: one of the two would be changed alone."""
    assert not said_twice(sources)


def test_a_copy_is_found() -> None:
    """Fails if the rule above holds because the reader overlooks copies."""
    function = "def {}(device):\n    {}if device:\n        wait()\n    return clock()\n"
    table = "{} = ('a', 'b')\n"
    first, second = function.format("now", "'''Seconds.'''\n    "), function.format("_now", "")
    assert said_twice({"x.py": first, "y.py": second}) == [["x.py: now", "y.py: _now"]]
    assert said_twice({"x.py": table.format("NAMES"), "y.py": table.format("ALSO")}) == [
        ["x.py: NAMES", "y.py: ALSO"]
    ]
    assert not said_twice({"x.py": "NAMES = ('a', 'b')\n", "y.py": "NAMES = ('a', 'c')\n"})


def test_no_two_classes_of_the_product_share_a_name(sources: dict[str, str]) -> None:
    """Fails if two modules that scripts and tests import together mean different things by one
    name.
    """
    product = {file: source for file, source in sources.items() if not file.startswith("scripts/")}
    shared = {name: files for name, files in public_classes(product).items() if len(files) > 1}
    assert not shared
    assert "EngineConfig" in public_classes(product)


def test_the_benchmark_counts_pages_as_the_engine_makes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if the benchmark's report of memory goes by another size of page than the one that is
    allocated.
    """
    gpt = tiny_gpt(64)
    engine = Engine(gpt, None, EngineConfig(max_num_seqs=4, page_size=4, num_pages=7))
    assert isinstance(engine.runner, ModelRunner)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2**30)
    assert memory_gib(engine, gpt)["pages"] == engine.runner.kv_pages.nbytes / 2**30

"""The house's rules about imports, read from the source: one direction, no cycles, no names that
shadow others.
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from source_tree import OURS, ROOT, source_files

# What each part may import of ours; a part is the longest prefix of a module's name.
LEAVES = {"autoregressive.errors", "autoregressive.folders", "kernels", "tokenizer"}
LEAVES |= {"autoregressive.version"}
BASE = {*LEAVES, "autoregressive.models", "autoregressive.files", "autoregressive.devices"}
BASE |= {"autoregressive.progress"}
SHARED = {*BASE, "autoregressive.weights", "autoregressive.output", "autoregressive.cli"}
COMMANDS = {"autoregressive.sample", "autoregressive.serve"}
ALLOWED: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "autoregressive": {"autoregressive.serve"},  # the front door
    "autoregressive.models": {"autoregressive.errors"},
    "autoregressive.progress": {"autoregressive.errors"},
    "autoregressive.files": {"autoregressive.errors"},
    "autoregressive.devices": {"autoregressive.errors", "autoregressive.models"},
    "autoregressive.weights": BASE,
    "autoregressive.output": {*BASE, "autoregressive.weights"},
    "autoregressive.cli": SHARED,
    **{command: SHARED for command in COMMANDS},
    # its place is LlamaGen's, and all of it is in serve/bulk
    "autoregressive.sample.sample_c2i_ddp": {"autoregressive.serve"},
    "autoregressive.benchmarks": {*SHARED, *COMMANDS},
    "autoregressive.demo_training": {*BASE, "autoregressive.weights"},
    "autoregressive.evaluation": BASE,
    "scripts": {
        *SHARED,
        *COMMANDS,
        "autoregressive.benchmarks",
        "autoregressive.demo_training",
        "autoregressive.evaluation",
    },
}


def module_name(path: Path) -> str:
    """The name that others import the file by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, source: str | None = None) -> set[str]:
    """Every module that a file names in an import, deferred and TYPE_CHECKING ones included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def part_of(module: str) -> str | None:
    """Which part of the house a module belongs to; None if it is not ours."""
    fitting = [
        part for part in (*ALLOWED, "tests") if module == part or module.startswith(part + ".")
    ]
    return max(fitting, key=len, default=None)


def resolved(name: str, importer: Path, known: dict[str, Path]) -> str | None:
    """The module of ours that a name means: `train_demo` in a script means its neighbour."""
    neighbour = f"{module_name(importer.parent / 'x').rsplit('.', 1)[0]}.{name}"
    return next((module for module in (name, neighbour) if module in known), None)


def import_graph() -> dict[str, set[str]]:
    """Each module of ours and those of ours that it imports."""
    known = {module_name(path): path for path in source_files()}
    return {
        module: {
            found
            for name in imported_names(path)
            if (found := resolved(name, path, known)) and found != module
        }
        for module, path in known.items()
    }


def test_the_reader_sees_every_kind_of_import() -> None:
    """Fails if the rules below pass because imports are overlooked."""
    source = (
        "import a.b\n"
        "from c import d\n"
        "from . import e\n"
        "from ..weights import f\n"
        "def g() -> None:\n    import h\n"
        "if TYPE_CHECKING:\n    from i.j import k\n"
    )
    found = imported_names(ROOT / "autoregressive" / "sample" / "x.py", source)
    expected = {"a.b", "c.d", "autoregressive.sample.e", "autoregressive.weights.f", "h", "i.j.k"}
    assert expected <= found


def test_the_graph_is_not_empty() -> None:
    """Fails if files or imports of ours are no longer found, so that every rule holds for
    nothing.
    """
    graph = import_graph()
    assert "autoregressive.models.generate" in graph
    assert "autoregressive.weights.loading" in graph["autoregressive.sample.naive"]
    assert "scripts.demo_training.train_demo" in graph["scripts.demo_training.evaluate_demo"]


def test_imports_run_one_way() -> None:
    """Fails if a leaf learns of another, weights of a command, one command of the other, or
    anything of scripts or tests.
    """
    wrong = []
    for path in source_files():
        module = module_name(path)
        part = part_of(module)
        for name in imported_names(path):
            target = part_of(name)
            inside = target is None or target == part
            if not inside and (part is None or target not in ALLOWED[part]):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_no_import_cycles() -> None:
    """Fails if modules import each other in a ring, also a deferred or TYPE_CHECKING one."""
    graph = import_graph()
    assert sum(len(targets) for targets in graph.values()) > 20, "the imports were not read"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_nothing_beside_a_command_shadows_another_module() -> None:
    """Fails if a file beside a command is named like a module of Python or of a dependency: its
    folder is first on the path.
    """
    taken = (
        set(sys.stdlib_module_names)
        | set(packages_distributions())
        | {"torch", "numpy", "PIL", "tqdm"}
    )
    taken |= set(OURS)
    beside = [
        ROOT / "autoregressive" / "sample",
        ROOT / "autoregressive" / "serve",
        ROOT / "scripts",
    ]
    names = {
        path.stem if path.is_file() else path.name: path
        for folder in beside
        for path in folder.glob("*")
    }
    names.pop("__pycache__", None)
    assert "sample_c2i" in names
    assert not {
        name: path for name, path in names.items() if name in taken and path.suffix != ".md"
    }

"""The kernels' host functions are typed: mypy cannot be asked to see to it where @triton.jit
functions stand beside them.
"""

import ast
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).resolve().parents[2] / "kernels").rglob("*.py"))


def missing_annotations(source: str) -> list[str]:
    """Functions of a module that lack an annotation; what @triton.jit and @gluon.jit compile is
    left out.
    """
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and not _is_compiled(node) and not _is_annotated(node)
    ]


def _is_compiled(function: ast.FunctionDef) -> bool:
    compilers = ("triton.jit", "gluon.jit")
    return any(
        name in ast.unparse(decorator)
        for decorator in function.decorator_list
        for name in compilers
    )


def _is_annotated(function: ast.FunctionDef) -> bool:
    given = function.args
    arguments = [
        *given.posonlyargs,
        *given.args,
        *given.kwonlyargs,
        *filter(None, (given.vararg, given.kwarg)),
    ]
    return function.returns is not None and all(
        argument.annotation or argument.arg == "self" for argument in arguments
    )


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_host_functions_are_annotated(path: Path) -> None:
    """Fails if a function that Python runs has an argument or a result without a type: mypy would
    pass over its body.
    """
    assert missing_annotations(path.read_text()) == []


def test_what_is_missing_is_found() -> None:
    """A search that never finds anything would guard nothing."""
    source = """
@triton.jit(do_not_specialize=["rows"])
def compiled(x): ...
def no_type_of_rest(x: int, *rest) -> int: ...
def no_result(self, x: int): ...
def whole(self, x: int) -> None: ...
"""
    assert missing_annotations(source) == ["no_type_of_rest", "no_result"]

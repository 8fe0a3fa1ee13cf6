"""Runs a function in a process of its own, for what a process can do once, or may hang in."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_its_own_process(
    function: Callable[..., Result], *arguments: Any, seconds: float = 120.0, **named: Any
) -> Result:
    """What the function returns there.

    Raises:
        TimeoutError: it takes longer than so many seconds. The process is killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        future = pool.submit(function, *arguments, **named)
        try:
            return future.result(timeout=seconds)
        except TimeoutError:
            for process in pool._processes.values():
                process.kill()
            raise

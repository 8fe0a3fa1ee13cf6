"""The installed command `llamagen-serve`. It takes signals from its first line on."""

import importlib
from typing import NoReturn

from autoregressive.serve.signals import SignalWatch


def command() -> NoReturn:
    """Runs the service's command."""
    watch = SignalWatch()
    importlib.import_module("autoregressive.serve.api_server").command(watch)
    raise AssertionError("a command ends the process")

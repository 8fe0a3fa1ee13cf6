"""Signals that one event sends in pairs, and the status after a second signal."""

import signal
import time
from types import SimpleNamespace
from typing import cast

import pytest

from autoregressive.serve import signals
from autoregressive.serve.signals import SignalWatch
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.server import ShutdownPolicy

PAIRS = [
    (signal.SIGTERM, signal.SIGHUP),
    (signal.SIGHUP, signal.SIGHUP),
    (signal.SIGINT, signal.SIGINT),
]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> SignalWatch:
    """One that has taken over no signal of this process."""
    monkeypatch.setattr(SignalWatch, "_watch", lambda self: None)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *arguments: None)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(signals, "_FORCED_SECONDS", 0.0)
    return SignalWatch()


@pytest.mark.parametrize("pair", PAIRS)
def test_signals_that_come_together_are_one(
    watch: SignalWatch,
    monkeypatch: pytest.MonkeyPatch,
    pair: tuple[signal.Signals, signal.Signals],
) -> None:
    """Fails if accepted work is cut because one event sent two signals, or if a second signal that
    comes later has no effect.
    """
    now = 100.0
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
    forced: list[bool] = []
    monkeypatch.setattr(watch, "_force", lambda: forced.append(True))
    taken: list[float] = []
    watch.hand_over(lambda: taken.append(now))
    watch._receive(pair[0])
    now += 0.45
    watch._receive(pair[1])
    assert taken == [100.0]
    now += 0.1
    watch._receive(pair[1])
    assert taken == [100.0, now]
    deadline = time.monotonic() + 5
    while not forced:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert forced == [True]


@pytest.mark.parametrize("idle", [True, False])
def test_a_second_signal_ends_it_with_status_1(idle: bool) -> None:
    """Fails if answers that are still being read are cut, and the status says that all was
    delivered.
    """

    class Draining:
        draining = False
        timeouts = SimpleNamespace(shutdown=60.0)

        def drain(self) -> None:
            self.draining = True

    dispatcher = Draining()
    dispatcher.unfinished = 0 if idle else 1  # type: ignore[attr-defined]
    hurried: list[bool] = []
    policy = ShutdownPolicy(cast(Dispatcher, dispatcher), lambda message: None)
    policy.hurry = lambda: hurried.append(True)
    policy.signal()
    assert (policy.status, policy.at_once, hurried) == (0, False, [])
    policy.signal()
    assert (policy.status, policy.at_once, hurried) == (1, True, [True])

"""The signals that end the service. A thread waits for them, so they do not depend on what the main
thread does or waits for.

This module imports nothing that takes long: the service's command uses it before anything else.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from autoregressive.cli.command import say_interrupted
from autoregressive.errors import tell

# from Ctrl-C, from a supervisor, from a terminal that closes
SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
# After the second signal. The service ends by itself sooner, unless something blocks it.
_FORCED_SECONDS = 1.7
_SAME_SECONDS = 0.5  # signals that come so soon after the first count as the first
_LAST_WORDS_SECONDS = 0.2
_log = logging.getLogger("llamagen.service")


class SignalWatch:
    """Waits in a thread of its own for the signals that end the service; they are blocked in every
    other thread.

    A Python signal handler runs in the main thread between two instructions: it does not run while
    that thread waits in a system call or in a library. As process 1 of a container, a process gets
    only the signals that it blocks or handles.

    Until `hand_over`, a signal ends the process at once, for nothing has begun that needs to be
    tidied up: with status 130 after Ctrl-C, else with 0. A SIGHUP that was ignored when the process
    started (`nohup`) stays ignored.

    Signals that come within half a second of the first count as the first, because one event may
    send several: systemd sends SIGTERM and SIGHUP (`SendSIGHUP=yes`), a terminal that closes may
    send SIGHUP twice, and a wrapper may forward the Ctrl-C that the terminal has sent to the whole
    group.

    To be made in the main thread, before there are others.

    Attributes:
        status: the exit status if the process has to be ended by force.
    """

    def __init__(self) -> None:
        self.status = 1
        self._take: Callable[[], None] | None = None
        self._count = 0
        self._first_at = 0.0
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._numbers = SIGNALS - {signal.SIGHUP} if nohup else SIGNALS
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        # for threads of libraries that were started earlier, and do not block the signals
        for number in self._numbers:
            signal.signal(number, lambda received, frame: self._receive(signal.Signals(received)))
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def hand_over(self, take: Callable[[], None]) -> None:
        """From now on, `take` is called with each signal that counts, in another thread; it returns
        at once.

        If the process still runs a moment after the second signal, it ends by force. Its child
        processes end with it.
        """
        self._take = take

    def _watch(self) -> None:
        while True:
            self._receive(signal.Signals(signal.sigwait(self._numbers)))

    def _receive(self, number: signal.Signals) -> None:
        if self._take is None:
            _end_before_the_service(number)
        now = time.monotonic()
        if self._count == 0:
            self._first_at = now
        elif now - self._first_at < _SAME_SECONDS:
            return
        self._count += 1
        self._take()
        if self._count == 2:
            forcing = threading.Timer(_FORCED_SECONDS, self._force)
            forcing.daemon = True
            forcing.start()

    def _force(self) -> None:
        message = (
            "the service did not end within %g seconds of the second signal: it is ended by force"
        )
        saying = threading.Thread(
            target=_log.critical, args=(message, _FORCED_SECONDS), daemon=True
        )
        saying.start()  # not in this thread: the thread that blocks the service may hold the log
        time.sleep(_LAST_WORDS_SECONDS)
        os._exit(self.status)


def _end_before_the_service(number: signal.Signals) -> NoReturn:
    def say() -> None:
        if number == signal.SIGINT:
            say_interrupted()
        else:
            tell(f"{os.path.basename(sys.argv[0])}: ended by {number.name} before it served")

    # in a thread, because it waits while stderr is not read
    saying = threading.Thread(target=say, daemon=True)
    saying.start()
    saying.join(_LAST_WORDS_SECONDS)
    os._exit(130 if number == signal.SIGINT else 0)

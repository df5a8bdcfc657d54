"""The signals that ask a run to save and stop: who holds them back, who notes them, who ignores them. Imports no torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: In the order in which they are obeyed: submitit's own test of pre-emption sends SIGTERM, then SIGUSR2.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_NO_HANDLERS = (None, signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Hold the stop signals back in this thread until the end, and in processes that are started here for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def stop_signals_to(handle: Callable[[int], None]) -> Iterator[dict[int, Any]]:
    """Call ``handle`` with the number of each stop signal; in another thread than the main one, change nothing.

    Yields:
        Number -> handler that was there before, such as submitit's; only those that are functions of somebody.
    """
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return

    def call(number: int, frame: FrameType | None) -> None:
        handle(number)

    before = {number: signal.signal(number, call) for number in STOP_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield {number: handler for number, handler in before.items() if handler not in _NO_HANDLERS}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopRequests:
    """The stop signals that a trainer got and has not obeyed yet. A second SIGINT stops it at once."""

    def __init__(self) -> None:
        self._received: set[int] = set()

    def note(self, number: int) -> None:
        """Keep a signal for the end of the step."""
        if number == signal.SIGINT and number in self._received:
            raise KeyboardInterrupt
        self._received.add(number)

    def flags(self) -> list[int]:
        """Return 1 or 0 for each of :data:`STOP_SIGNALS`, so that several processes can agree by their maximum."""
        return [int(number in self._received) for number in STOP_SIGNALS]

    def clear(self) -> None:
        """Forget them: they are obeyed."""
        self._received.clear()


class SteadyWorker:
    """``worker_init_fn`` of a data loader: stop signals that Slurm sends to all processes of a job do not end it.

    The worker must have been started within :func:`stop_signals_held`. What its own parent sends still ends it.
    """

    def __init__(self, then: Callable[[int], Any] | None = None) -> None:
        self._then = then

    def __call__(self, worker: int) -> None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        if self._then is not None:
            self._then(worker)


def _end_with_parent() -> None:
    while True:
        came = signal.sigwaitinfo(STOP_SIGNALS)
        if came.si_signo == signal.SIGTERM and came.si_pid == os.getppid():
            os._exit(0)

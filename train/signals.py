"""Being asked to stop: Ctrl-C, SIGTERM and, on Windows, Ctrl-Break, noted and answered at a good moment."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

# Windows lets one process send another Ctrl-Break only.
SIGNALS = [signal.SIGINT, signal.SIGTERM, *filter(None, [getattr(signal, "SIGBREAK", None)])]


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGNALS instead of dying of them: a run stops between two steps, never within one.

    A second signal is not collected but ends the program, for whoever cannot wait.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to that one only
        yield received
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def collect(number: int, frame: object) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, collect)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

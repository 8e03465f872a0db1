"""Being asked to stop: Ctrl-C, SIGTERM and, on Windows, Ctrl-Break, noted and answered at a good moment."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

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


@contextlib.contextmanager
def kept_interrupt() -> Iterator[Callable[[], None]]:
    """Ctrl-C ends the program as ever, also where Python would forget it.

    A KeyboardInterrupt that falls into a destructor or a callback is printed and dropped, and the program goes on.
    Whoever does long work in parts calls what this yields between them: it raises what was dropped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGINT)
    pressed: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    if before is signal.default_int_handler:  # not where whoever started this wants Ctrl-C ignored or answers it
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
        check()
    finally:
        signal.signal(signal.SIGINT, before)

"""Ctrl-C and SIGTERM around a Ray, which installs handlers of its own and leaves them behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(SystemExit):
    """SIGTERM reached this process; exits with 143, the shell's number for it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def own_signals() -> Iterator[Callable[[], None]]:
    """SIGTERM raises Terminated inside the block (main thread only); both signals' handlers are as before after it.

    Yields the function that installs our handler again: ray.init puts one of its own in place.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    received = threading.Event()

    def terminate(_signal: int, _frame: FrameType | None) -> None:
        received.set()
        raise Terminated

    def install() -> None:
        if in_main_thread:
            signal.signal(signal.SIGTERM, terminate)

    install()
    try:
        yield install
    except SystemExit:
        if received.is_set():  # inside ray.get Ray makes a plain SystemExit(1) of it
            raise Terminated from None
        raise
    finally:
        if in_main_thread:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignores Ctrl-C and SIGTERM in the block: the clean-up takes bounded time and must not be cut short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Ctrl-C and SIGTERM around a Ray, which installs handlers of its own and leaves them behind."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | signal.Handlers
_log = logging.getLogger("coe_dist.signals")


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
def asking_first(ask: Callable[[], bool], *, seconds: float) -> Iterator[None]:
    """The first SIGTERM inside the block calls `ask` and raises nothing, so that a wait in the block goes on.

    Where `ask` returns False (there is nobody to ask), at the next SIGTERM, and when the block has not ended `seconds`
    after the first, SIGTERM does what it did before the block. Main thread only.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    asked, ended = threading.Event(), threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        if not asked.is_set() and ask():
            asked.set()
        else:
            before(number, frame)

    def watch() -> None:
        asked.wait()
        if ended.is_set():
            return
        _log.warning("SIGTERM: the workers save and end; a second SIGTERM does not wait for them")
        if not ended.wait(seconds):
            _log.warning("the workers did not end within %g s", seconds)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stop request", daemon=True).start()
    signal.signal(signal.SIGTERM, request)
    try:
        yield
    finally:
        ended.set()
        asked.set()
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C and SIGTERM in the block take effect at its end: what has begun to be recorded is recorded whole. Main
    thread only."""
    caught: list[int] = []
    try:
        with _both_handled(lambda number, _: caught.append(number)):
            yield
    finally:
        for number in caught[:1]:
            signal.raise_signal(number)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignores Ctrl-C and SIGTERM in the block: the clean-up takes bounded time and must not be cut short."""
    with _both_handled(signal.SIG_IGN):
        yield


@contextmanager
def _both_handled(handler: Handler) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to `handler` in the block, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)

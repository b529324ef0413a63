"""Finding and ending the processes we started, by a mark in their environment and never by name.

Ray's processes leave our process tree (its dashboard's children are adopted by init, its workers have process groups of
their own), so neither children nor groups find them all. The environment is inherited whatever a process does.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_VARIABLE = "COE_DIST_STARTED_BY"


def new_mark() -> str:
    """A mark nobody used before."""
    return f"{os.getpid()}-{secrets.token_hex(8)}"


def marking_variable(mark: str) -> dict[str, str]:
    """The environment variable that marks a process. Earlier marks stay: who marked us still finds what we start."""
    before = os.environ.get(_VARIABLE)
    return {_VARIABLE: mark if before is None else f"{before},{mark}"}


@contextmanager
def marking(mark: str) -> Iterator[None]:
    """Every process that this one starts inside the block, and theirs in turn, carries the mark."""
    before = os.environ.get(_VARIABLE)
    os.environ.update(marking_variable(mark))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before


def marked_processes(mark: str) -> list[psutil.Process]:
    """The living processes that carry the mark, this process excepted. Zombies have no environment and do not count."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and mark in process.environ().get(_VARIABLE, "").split(","):
                found.append(process)
        except psutil.Error:  # gone, a zombie, or another user's
            continue
    return found


def end_marked(mark: str, *, grace_seconds: float = 3.0) -> list[int]:
    """Ends every process that carries the mark: waits, then SIGTERM, then SIGKILL, `grace_seconds` each.

    Returns the ids of those that had to be signalled. psutil compares creation times, so a reused id is never hit.
    """
    signalled: list[int] = []
    for action in (None, "terminate", "kill"):
        remaining = marked_processes(mark)
        if action is not None:
            for process in remaining:
                signalled.append(process.pid)
                try:
                    getattr(process, action)()
                except psutil.Error:
                    continue
        deadline = time.monotonic() + grace_seconds
        while remaining and time.monotonic() < deadline:  # processes may start others while we look: scan afresh
            time.sleep(0.05)
            remaining = marked_processes(mark)
        if not remaining:
            break
    return sorted(set(signalled))

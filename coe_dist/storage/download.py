"""A file from a store onto this machine's disk: parts are asked for in parallel, written and hashed in order."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from coe_dist.errors import InputError
from coe_dist.storage.remote import Remote, StoreError

PART_BYTES = 16 * 2**20
_AT_ONCE = 8  # parts; a store gives one connection a fraction of what a machine takes
_ATTEMPTS = 4
_FIRST_SECONDS, _EVERY_SECONDS = 10.0, 60.0  # of progress lines
_log = logging.getLogger("coe_dist.storage")

Answer = TypeVar("Answer")


def patiently(ask: Callable[[], Answer]) -> Answer:
    """Asks a store again, after 1, 2 and 4 s, where it fails."""
    for attempt in range(_ATTEMPTS - 1):
        try:
            return ask()
        except StoreError:
            time.sleep(2**attempt)
    return ask()


def download(remote: Remote, name: str, file: Path, size: int) -> str:
    """Writes a file of `size` bytes to the disk itself and returns its sha256; a long copy tells its progress.

    Raises StoreError where the store fails or has another size, FileNotFoundError where it has no such file, and
    OSError for the disk.
    """
    digest, done, shown = hashlib.sha256(), 0, _Shown(remote.place(name), size)
    with file.open("wb") as written:
        for part in _parts(remote, name, size):
            written.write(part)
            digest.update(part)
            done += len(part)
            shown.at(done)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()


def _parts(remote: Remote, name: str, size: int) -> Iterator[bytes]:
    def part(start: int) -> bytes:
        end = min(start + PART_BYTES, size)
        content = patiently(lambda: remote.read(name, start, end))
        if len(content) != end - start:
            raise StoreError(f"{remote.place(name)}: {len(content)} instead of {end - start} bytes from {start} on")
        return content

    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(_AT_ONCE, "download") as pool:
        try:
            for start in range(0, size, PART_BYTES):
                if len(waiting) == _AT_ONCE:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(part, start))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _Shown:
    """A line now and then, for whoever waits."""

    def __init__(self, place: str, size: int) -> None:
        self._place, self._size, self._began = place, size, time.monotonic()
        self._next = self._began + _FIRST_SECONDS

    def at(self, done: int) -> None:
        now = time.monotonic()
        if now < self._next or done == self._size:
            return
        self._next = now + _EVERY_SECONDS
        rate = done / (now - self._began)
        _log.warning(
            "copying %s: %s of %s, %s/s, about %.0f minutes are left",
            *(self._place, told(done), told(self._size), told(rate), (self._size - done) / rate / 60),
        )


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises InputError where the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder}: {what} needs {needed:,} bytes, {free:,} are free on its disk; make room there")


def told(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"

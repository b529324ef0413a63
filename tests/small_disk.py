"""A disk of a few kilobytes, which a test may fill."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """`place`, made anew as a file system of `size` (as of mount: "400k"), gone with all it holds afterwards."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount the small file system that this test fills")
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(file: Path, leave: int = 0) -> None:
    """Writes `file` until nothing more fits on its disk, but for about `leave` bytes."""
    with file.open("ab", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(1024))
        except OSError:
            ballast.truncate(max(0, ballast.tell() - leave))

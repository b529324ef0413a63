"""A folder that a command makes: it appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coe_dist.errors import InputError


def check_new(out: Path) -> None:
    """Raises InputError when something of this name exists."""
    if out.exists() or out.is_symlink():
        raise InputError(f"--out: {out} is not allowed; it exists already, give a new folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside `out`, which takes this name when the block ends and is removed when it fails.

    Raises InputError when it cannot be written.
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # a crash may have left one
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise InputError(f"--out: {out} is not allowed; it cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)

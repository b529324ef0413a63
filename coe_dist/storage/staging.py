"""This machine's copies of .beton files: one for all its processes, verified, removed when room is needed.

    <folder>/lock             held by the one process that copies or removes
    <folder>/<key>.lock       held shared by every process that reads the copy; its time is that of the last use
    <folder>/<key>/           train.beton, train.json, and `source`, where they came from
    <folder>/.partial-<key>/  being copied, or left by a process that died; whoever copies next removes it

The key is the sha256 of the side-car, which holds that of the .beton: a source that was written anew has another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from coe_dist.config import StagingConfig
from coe_dist.data.sidecar import SplitInfo, sidecar_path
from coe_dist.errors import InputError
from coe_dist.storage.download import check_room, download, patiently, told
from coe_dist.storage.remote import Remote, StoreError, cache_folder

_log = logging.getLogger("coe_dist.storage")
_in_use: dict[Path, IO[bytes]] = {}  # the locks of the copies that this process reads, until it ends


@dataclass(frozen=True)
class Staged:
    """A copy on this machine. `used`: when a process last began to read it, in seconds since 1970."""

    file: Path
    source: str
    bytes: int
    used: float
    in_use: bool


def staging_folder(staging: StagingConfig) -> Path:
    return cache_folder() / "staged" if staging.folder is None else Path(staging.folder).expanduser()


def staged(remote: Remote, name: str, sidecar: bytes, info: SplitInfo, staging: StagingConfig) -> Path:
    """This machine's copy of a .beton, which stays until this process ends. The first process copies, others wait.

    Raises InputError where the disk has too little room or refuses, the store fails, or the content is not that of
    the side-car.
    """
    folder = staging_folder(staging)
    key = hashlib.sha256(sidecar).hexdigest()[:32]
    beton = folder / key / name
    lock = folder / f"{key}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock not in _in_use:
            _in_use[lock] = _open_locked(lock, fcntl.LOCK_SH)
        os.utime(lock)
        try:
            if not _whole(beton, info):
                with _open_locked(folder / "lock", fcntl.LOCK_EX):
                    if not _whole(beton, info):  # nobody was faster
                        _clear_partial(folder)
                        _make_room(folder, info.bytes, staging.keep_gigabytes * 1e9, remote.place(name))
                        _copy(remote, name, sidecar, info, beton.parent)
        except BaseException:
            _in_use.pop(lock).close()
            raise
    except StoreError as error:
        raise InputError(f"{remote.place(name)} cannot be copied; {error}") from error
    except OSError as error:
        raise InputError(f"data.staging.folder: {folder} cannot be used ({error.strerror or error})") from error
    return beton


def copies(folder: Path) -> list[Staged]:
    """What is staged there, the least recently used first."""
    found = []
    for beton in folder.glob("*/*.beton"):
        lock = _lock_of(beton.parent)
        with suppress(OSError):  # removed meanwhile
            size = sum(file.stat().st_size for file in beton.parent.iterdir())
            source = (beton.parent / "source").read_text()
            with _alone(lock) as alone:
                found.append(Staged(beton, source, size, lock.stat().st_mtime, not alone))
    return sorted(found, key=lambda copy: copy.used)


def clean(folder: Path) -> list[Staged]:
    """Removes all that nobody reads; returns it."""
    if not folder.is_dir():
        return []
    with _open_locked(folder / "lock", fcntl.LOCK_EX):
        _clear_partial(folder)
        return [copy for copy in copies(folder) if _remove(copy)]


def _whole(beton: Path, info: SplitInfo) -> bool:
    try:
        return beton.stat().st_size == info.bytes
    except FileNotFoundError:
        return False


def _copy(remote: Remote, name: str, sidecar: bytes, info: SplitInfo, entry: Path) -> None:
    partial = entry.with_name(f".partial-{entry.name}")
    partial.mkdir()
    place, beton = remote.place(name), partial / name
    _log.warning("copying %s (%s) to %s", place, told(info.bytes), entry)
    try:
        found = download(remote, name, beton, info.bytes)
        if found != info.sha256:
            raise InputError(
                f"{place}: its sha256 is {found}, {info.sha256} in its side-car; the copy was removed, put the file "
                "there again"
            )
        sidecar_path(beton).write_bytes(sidecar)
        (partial / "source").write_text(place)
        shutil.rmtree(entry, ignore_errors=True)  # one that was cut short by somebody else
        partial.rename(entry)
    except FileNotFoundError:
        raise InputError(f"{place}: no such file in the store") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def add_samples(remote: Remote, samples: Path) -> None:
    """Copies the list of samples beside a staged file; it may not exist in the store."""
    if not samples.is_file():
        with suppress(FileNotFoundError):
            content = patiently(lambda: remote.read(samples.name))
            temporary = samples.with_name(f".{samples.name}.{os.getpid()}")
            temporary.write_bytes(content)
            temporary.replace(samples)


def _make_room(folder: Path, needed: int, keep: float, what: str) -> None:
    """The least recently used copies that nobody reads go until all is within `keep` bytes and fits on the disk."""
    known = copies(folder)
    total = sum(copy.bytes for copy in known)
    for copy in known:
        if total + needed <= keep and shutil.disk_usage(folder).free >= needed:
            break
        if _remove(copy):
            total -= copy.bytes
            _log.warning("removed %s, a copy of %s, to make room", copy.file, copy.source)
    check_room(folder, needed, f"a copy of {what}")


def _remove(copy: Staged) -> bool:
    """Whether nobody read it."""
    entry = copy.file.parent
    lock = _lock_of(entry)
    with _alone(lock) as alone:
        if alone:
            trash = entry.with_name(f".partial-{entry.name}")
            entry.rename(trash)  # never half of it is there for a reader
            shutil.rmtree(trash)
            lock.unlink()
    return alone


def _clear_partial(folder: Path) -> None:
    for left in folder.glob(".partial-*"):
        shutil.rmtree(left, ignore_errors=True)


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.lock")


def _open_locked(path: Path, kind: int) -> IO[bytes]:
    """Raises BlockingIOError where `kind` does not wait and others hold the lock."""
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, kind)
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        except FileNotFoundError:  # removed while we waited for it
            pass
        except BaseException:
            file.close()
            raise
        file.close()


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Whether nobody reads the copy; while the block runs nobody begins to."""
    try:
        file = _open_locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    with file:
        yield True

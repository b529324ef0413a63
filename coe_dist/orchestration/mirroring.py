"""A run and its copy in a store (storage.url): around a training, and by hand."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coe_dist.config import RunConfig
from coe_dist.errors import InputError, Preempted, TrainingError
from coe_dist.storage.download import patiently
from coe_dist.storage.mirror import Mirror
from coe_dist.storage.pulling import BEST, LATEST, pull, remote_of
from coe_dist.storage.remote import Remote, StoreError
from coe_dist.training.run_folder import load_run_config, locked

_ASKED_TO_END_SECONDS = 60.0  # for the last files; nobody waits long for a process that was told to end
_log = logging.getLogger("coe_dist.storage")


@contextmanager
def mirrored(config: RunConfig, *, overwrite: bool) -> Iterator[Mirror | None]:
    """The mirror of a run, which the block starts when the run folder is ready; None where the configuration asks for
    none. At the end of the block, however it ends, what is left is sent. Raises InputError before the block where the
    store holds another run, or more of this one."""
    remote = remote_of(config)
    if remote is None:
        yield None
        return
    mirror = Mirror(config.run_dir, remote, anew=overwrite)
    with suppress(StoreError):  # the mirror asks again
        mirror.check()
    try:
        yield mirror
    except (KeyboardInterrupt, SystemExit, Preempted):
        mirror.finish(_ASKED_TO_END_SECONDS)
        raise
    except BaseException:
        mirror.finish()
        raise
    mirror.finish()


def restore(config: RunConfig) -> None:
    """Brings a run here that this machine does not have and its store does, so that training resumes it.

    Raises InputError where the store cannot be asked, and as `pull` does.
    """
    remote = remote_of(config)
    if remote is None or (config.run_dir / "config.yaml").is_file():
        return
    try:
        there = remote.files()
    except StoreError as error:
        raise InputError(f"storage.url: {remote.shown} cannot be asked for the run; {error}") from error
    if there:
        with locked(config):
            pull_to(remote, config.run_dir)
        _log.warning("%s comes from %s", config.run_dir, remote.shown)


def pull_to(remote: Remote, folder: Path, *, overwrite: bool = False) -> None:
    """A run's records, its newest save and its best one, as a new folder. Raises InputError where it exists (without
    `overwrite`), and as `pull` does."""
    partial = folder.with_name(f".{folder.name}.pulling")
    try:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if folder.exists() and not (overwrite and (folder / "config.yaml").is_file()):
            raise InputError(f"{folder} exists; give another place" + ("" if overwrite else ", or --overwrite"))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            pull(remote, partial, LATEST, BEST)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error})") from error


def pull_run(url: str, out: Path | None, *, overwrite: bool) -> Path:
    """`pull_to` from a URL; by default to runs/<name>. Returns the folder."""
    remote = Remote(url, "URL")
    folder = out or Path("runs") / remote.url.rpartition("/")[2]
    pull_to(remote, folder, overwrite=overwrite)
    return folder


def push_run(run_dir: Path, url: str | None) -> str:
    """Brings a run's copy in a store up to date; returns its address. url: by default by the run's storage.url.

    Raises InputError for a folder that is no run, a run that is being trained, or a store that holds another one;
    TrainingError where the store does not take it.
    """
    config = load_run_config(run_dir)
    remote = remote_of(config) if url is None else Remote(url, "URL")
    if remote is None:
        raise InputError(f"URL: missing; {run_dir} has no storage.url")
    with locked(config):
        try:
            patiently(Mirror(run_dir, remote).push)
        except StoreError as error:
            raise TrainingError(f"{remote.shown} does not take {run_dir}: {error}") from error
    return remote.shown

"""A run folder from its copy in a store: all records, and the saves that are wanted, each file by its sha256."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from coe_dist.config import RunConfig, is_url
from coe_dist.errors import InputError
from coe_dist.storage.contents import is_record, safe, saves_among
from coe_dist.storage.download import check_room, download, patiently, told
from coe_dist.storage.remote import Remote, Stored, StoreError, cache_folder
from coe_dist.tracking.store import read_json, write_bytes, write_json

LATEST, BEST = "latest", "best"
_STATE = ".pulled.json"  # versions of the records that are here
_log = logging.getLogger("coe_dist.storage")


def local_run(place: str, *wanted: str) -> Path:
    """The folder of a run that is given by its path, or by its URL: then a copy in the user's cache, brought up to
    date. wanted: the saves that are needed, see `pull`. Raises InputError as `pull` does."""
    if not is_url(place):
        return Path(place)
    remote = Remote(place, "RUN")
    name = remote.url.rpartition("/")[2]
    if not safe(name):
        raise InputError(f"RUN: {remote.shown} is not allowed; give the address of a run folder")
    folder = cache_folder() / "runs" / hashlib.sha256(remote.url.encode()).hexdigest()[:16] / name
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pull(remote, folder, *wanted)
    return folder


def pull(remote: Remote, folder: Path, *wanted: str) -> None:
    """Brings `folder` up to date with the store's copy of a run; what is here already is not asked for again.

    wanted: "latest" (falling back from a damaged save to the one before it), "best", or numbers of optimizer steps.
    Raises InputError where there is no run, the store cannot be read, a save that is asked for is not there or no
    save verifies, the disk has too little room or refuses.
    """
    try:
        there = remote.files()
        if "config.yaml" not in there:
            raise InputError(f"{remote.shown}: it is not a run folder (no config.yaml)")
        folder.mkdir(parents=True, exist_ok=True)
        strange = [name for name in there if not safe(name)]
        if strange:
            _log.warning("%s: %s and other names are not those of a run; left out", remote.shown, ascii(strange[0]))
        _pull_records(remote, folder, {name: stored for name, stored in there.items() if is_record(name)})
        _Saves(remote, folder / "checkpoints", there).pull(wanted)
    except StoreError as error:
        raise InputError(f"{remote.shown} cannot be read; {error}") from error
    except FileNotFoundError as error:  # removed there while we read
        raise InputError(f"{remote.shown} cannot be read; {error} is gone") from error
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error})") from error


def _pull_records(remote: Remote, folder: Path, records: Mapping[str, Stored]) -> None:
    known = read_json(folder / _STATE)
    changed = {n: s for n, s in records.items() if known.get(n) != s.version or not (folder / n).is_file()}
    check_room(folder, sum(stored.size for stored in changed.values()), f"the run {remote.shown}")
    for name, stored in changed.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        download(remote, name, temporary, stored.size)
        temporary.replace(path)
        known[name] = stored.version
    write_json(folder / _STATE, known)


class _Saves:
    def __init__(self, remote: Remote, folder: Path, there: Mapping[str, Stored]) -> None:
        self._remote, self._folder, self._there = remote, folder, there
        self.names = saves_among(there)

    def pull(self, wanted: tuple[str, ...]) -> None:
        for here in self._folder.glob("step-*"):
            if here.name not in self.names:  # retention has removed it
                shutil.rmtree(here)
        for which in dict.fromkeys(wanted):
            if which == LATEST:
                self._pull_latest()
            elif which == BEST:
                self._pull_best()
            elif (name := f"step-{int(which):08d}" if which.isdecimal() else "") in self.names:
                if problem := self._pull(name):
                    raise InputError(f"{self._remote.place(f'checkpoints/{name}')} is damaged ({problem})")
            else:
                steps = ", ".join(str(int(name.removeprefix("step-"))) for name in reversed(self.names))
                raise InputError(
                    f"--checkpoint: {which} is not allowed; {self._remote.shown} holds the steps {steps or '-'}"
                )

    def _pull_latest(self) -> None:
        problem = ""
        for name in self.names:
            problem = self._pull(name)
            if not problem:
                write_bytes(self._folder / LATEST, name.encode())
                return
            _log.warning(
                "%s is damaged (%s); falling back to the checkpoint before it",
                *(self._remote.place(f"checkpoints/{name}"), problem),
            )
        if self.names:
            raise InputError(f"{self._remote.shown}: it holds no valid checkpoint ({problem})")

    def _pull_best(self) -> None:
        if f"checkpoints/{BEST}" not in self._there:
            return
        content = patiently(lambda: self._remote.read(f"checkpoints/{BEST}"))
        try:
            name = str(json.loads(content)["save"])
        except (ValueError, KeyError, TypeError):
            return
        if name in self.names and not self._pull(name):
            write_bytes(self._folder / BEST, content)

    def _pull(self, name: str) -> str:
        """Brings a save here; returns what is wrong with it, or ''."""
        place, target = f"checkpoints/{name}", self._folder / name
        content = patiently(lambda: self._remote.read(f"{place}/manifest.json"))
        if (target / "manifest.json").is_file() and (target / "manifest.json").read_bytes() == content:
            return ""
        try:
            files = dict(json.loads(content)["files"])
        except (ValueError, KeyError, TypeError):
            return "manifest.json is not that of a save"
        sizes = {}
        for file, digest in files.items():
            if not safe(file) or "/" in file or not re.fullmatch(r"[0-9a-f]{64}", str(digest)):
                return f"manifest.json names {file!a}"
            if f"{place}/{file}" not in self._there:
                return f"{file} is missing"
            sizes[file] = self._there[f"{place}/{file}"].size
        partial = self._folder / f".partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            check_room(partial, sum(sizes.values()), f"the save {self._remote.place(place)}")
            _log.warning("copying %s (%s) to %s", self._remote.place(place), told(sum(sizes.values())), target)
            for file, digest in files.items():
                if download(self._remote, f"{place}/{file}", partial / file, sizes[file]) != digest:
                    return f"{file} does not match its sha256"
            (partial / "manifest.json").write_bytes(content)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return ""


def remote_of(config: RunConfig) -> Remote | None:
    """The place of a run's copy by its configuration; None where it has none."""
    url = config.storage.url
    return None if url is None else Remote(f"{url.rstrip('/')}/{config.name}", "storage.url")

"""The copy of a run folder in a store, kept up to date by a thread of the driver; training never waits for it.

1. Records (configuration, metrics, evaluations, logs, ...) are sent when they have changed.
2. A complete save is sent once, newest first: its files, then its manifest, then the pointers `latest` and `best`.
3. What retention has removed here is removed there, after a newer save is complete there.
4. Where the store fails, all is tried again later; the thread looks anew at what is there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coe_dist.errors import InputError
from coe_dist.storage.contents import records, saves, saves_among
from coe_dist.storage.remote import Remote, StoreError

EVERY_SECONDS = 15.0
_LONGEST_WAIT = 300.0  # between two attempts
_LAST_ATTEMPTS = 3  # when the run has ended
_STALLED_SECONDS = 90.0  # without a byte sent: then nobody waits any more
_AT_ONCE_BYTES = 64 * 2**20  # larger records are read while they are sent
_log = logging.getLogger("coe_dist.storage")


class Mirror:
    """Mirrors `run_dir` to `remote`, a folder of its own. anew: what is there belongs to a run that is replaced."""

    def __init__(self, run_dir: Path, remote: Remote, *, anew: bool = False) -> None:
        self.run_dir, self.remote, self._anew = run_dir, remote, anew
        self._there: set[str] | None = None  # names of all files there; None: to be looked at
        self._sent: dict[str, tuple[int, int]] = {}  # records: time and size of what was sent
        self._complete: dict[str, bytes] = {}  # saves: their manifests
        self._parts: set[tuple[str, bytes]] = set()  # files, with their manifests, of a save that is not complete yet
        self._pointers: dict[str, bytes] = {}
        self._newer = False  # whether this process has completed a save there
        self._ending = threading.Event()
        self._moved = self._recorded = time.monotonic()
        self._problem, self._refused, self._over = "", False, False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def check(self) -> None:
        """Raises InputError where the store holds another run, or more of this one than this machine; StoreError where
        it cannot be asked. Changes nothing."""
        self._checked()

    def start(self) -> None:
        self._thread.start()

    def finish(self, seconds: float | None = None) -> None:
        """Sends what is left, for at most `seconds` (None: as long as something moves), and says what is not there."""
        if self._thread.ident is None or self._refused:
            return
        self._moved = time.monotonic()
        deadline = float("inf") if seconds is None else self._moved + seconds
        self._ending.set()
        try:
            while self._thread.is_alive() and time.monotonic() < min(deadline, self._moved + _STALLED_SECONDS):
                self._thread.join(0.2)
        finally:
            self._over = True
            if left := self.left():
                more = f" and {len(left) - 3} more" if len(left) > 3 else ""
                _log.warning(
                    "storage.url: %s%s of %s did not reach %s (%s); `coe-dist storage push %s` sends what is missing",
                    *(", ".join(left[:3]), more, self.run_dir, self.remote.shown, self._problem or "no time was left"),
                    self.run_dir,
                )

    def left(self) -> list[str]:
        """What of the run folder is not in the store as it is now: saves, newest first, then records."""
        missing = [name for name, content in saves(self.run_dir) if self._complete.get(name) != content]
        return [f"checkpoints/{name}" for name in missing] + [
            name for name, state in records(self.run_dir).items() if self._sent.get(name) != state
        ]

    def push(self) -> None:
        """Brings the store up to date once. Raises as `check`."""
        try:
            self._update()
        except (StoreError, OSError) as error:
            self._there = None
            raise StoreError(str(error)) from error

    def _run(self) -> None:
        failures = attempts = 0
        wait = 0.0
        while True:
            if self._ending.wait(wait) and attempts:
                time.sleep(2 ** (attempts - 1))
            ending = self._ending.is_set()
            try:
                self._update()
            except InputError as error:
                self._refused = True
                _log.warning("%s; nothing is sent there", error)
                return
            except Exception as error:  # a store's, or the disk's: neither may end a training
                if self._over:
                    return
                self._there, self._problem = None, " ".join(str(error).split()) or type(error).__name__
                if not failures:
                    _log.warning(
                        "storage.url: %s does not take the run (%s); it is tried again while training goes on",
                        *(self.remote.shown, self._problem),
                    )
                failures += 1
                attempts += ending
                if attempts == _LAST_ATTEMPTS:
                    return
                wait = min(_LONGEST_WAIT, 2.0**failures)
                continue
            if failures:
                _log.warning("storage.url: %s takes the run again", self.remote.shown)
            failures, wait, self._problem = 0, EVERY_SECONDS, ""
            if ending:
                return

    def _update(self) -> None:
        if self._there is None:
            self._look()
        ready = saves(self.run_dir)  # before the records: a save's own are there when it is
        self._send_records()
        for name, content in ready:
            if self._complete.get(name) != content:
                self._send_save(name, content)
        self._point()
        if self._newer:
            self._prune()

    def _look(self) -> None:
        there = self._checked()
        if self._anew:
            for name in _manifests_first(there):
                self._remove(name)
            self._anew, there = False, set()
        self._sent = {name: state for name, state in self._sent.items() if name in there}
        self._parts = {part for part in self._parts if part[0] in there}
        self._complete, self._pointers = {}, {}
        for name in saves_among(there):
            self._complete[name] = self.remote.read(f"checkpoints/{name}/manifest.json")
        self._there = there

    def _checked(self) -> set[str]:
        """The names of all files there."""
        there, shown = self.remote.files(), self.remote.shown
        if there and "config.yaml" not in there:
            raise InputError(f"storage.url: {shown} holds files, but no run (no config.yaml); give another address")
        if self._anew:
            return set(there)
        ours = self.run_dir / "metrics.jsonl"
        if "metrics.jsonl" in there and ours.is_file():
            with ours.open("rb") as file:
                first = file.readline()
            known = min(len(first), there["metrics.jsonl"].size)  # an empty file has no range to ask for
            if known and not first.startswith(self.remote.read("metrics.jsonl", 0, known)):
                raise InputError(
                    f"storage.url: {shown} holds another run of this name; give another name or address, or --overwrite"
                )
        newest, newest_here = (max(found, default="") for found in (saves_among(there), self._here()))
        if newest > newest_here:
            raise InputError(
                f"storage.url: {shown} holds {newest}, {self.run_dir} only {newest_here or 'no save'}; "
                f"`coe-dist storage pull {shown} --out {self.run_dir} --overwrite` brings it here"
            )
        return set(there)

    def _here(self) -> list[str]:
        return [name for name, _ in saves(self.run_dir)]

    def _send_records(self) -> None:
        ours = records(self.run_dir)
        for name, state in ours.items():
            if self._sent.get(name) != state:
                self._send_record(name, state)
        for name in self._sent.keys() - ours.keys():
            self._remove(name)
            del self._sent[name]
        self._recorded = time.monotonic()

    def _send_record(self, name: str, state: tuple[int, int]) -> None:
        path = self.run_dir / name
        try:
            if state[1] > _AT_ONCE_BYTES:
                self.remote.send(path, name, self._move)
            else:
                self.remote.write(name, path.read_bytes())  # as it is at one moment
        except FileNotFoundError:  # removed just now
            return
        self._sent[name] = state
        self._note(name)

    def _send_save(self, save: str, manifest: bytes) -> None:
        try:
            files = list(json.loads(manifest)["files"])
        except (ValueError, KeyError, TypeError):  # damaged: nobody could load it
            return
        place = f"checkpoints/{save}"
        if save in self._complete:  # another save of this step, which training went back behind
            self._remove(f"{place}/manifest.json")
            del self._complete[save]
        with self._linked(save, files) as folder:
            if folder is None:
                return
            for file in files:
                if (f"{place}/{file}", manifest) not in self._parts:
                    self.remote.send(folder / file, f"{place}/{file}", self._move)
                    self._parts.add((f"{place}/{file}", manifest))
                    self._note(f"{place}/{file}")
                if time.monotonic() - self._recorded > EVERY_SECONDS:  # a large save takes minutes
                    self._send_records()
        self.remote.write(f"{place}/manifest.json", manifest)
        self._note(f"{place}/manifest.json")
        self._parts.clear()
        self._complete[save], self._newer = manifest, True

    @contextmanager
    def _linked(self, save: str, files: list[str]) -> Iterator[Path | None]:
        """A save's files under second names, so that retention may remove the first ones meanwhile; None where it has
        already."""
        source, place = self.run_dir / "checkpoints" / save, self.run_dir / ".sending"
        shutil.rmtree(place, ignore_errors=True)
        try:
            try:
                place.mkdir(parents=True)
                for file in files:
                    os.link(source / file, place / file)
            except FileNotFoundError:
                yield None
                return
            except OSError:  # a file system without hard links
                yield source
                return
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _point(self) -> None:
        """`latest` names the newest save that is complete there; `best` is ours, once its save is there."""
        wanted = {}
        if newest := max(
            (name for name, content in saves(self.run_dir) if self._complete.get(name) == content), default=""
        ):
            wanted["latest"] = newest.encode()
        try:
            best = (self.run_dir / "checkpoints" / "best").read_bytes()
            if str(json.loads(best)["save"]) in self._complete:
                wanted["best"] = best
        except (OSError, ValueError, KeyError, TypeError):
            pass
        for name, content in wanted.items():
            if self._pointers.get(name) != content:
                self.remote.write(f"checkpoints/{name}", content)
                self._pointers[name] = content
                self._note(f"checkpoints/{name}")

    def _prune(self) -> None:
        kept = self._here()
        if kept and max(kept) in self._complete:
            parts = {name: name.split("/") for name in self._there or ()}
            gone = {n for n, p in parts.items() if p[0] == "checkpoints" and len(p) == 3 and p[1] not in kept}
            for name in _manifests_first(gone):
                self._remove(name)
                self._complete.pop(parts[name][1], None)

    def _remove(self, name: str) -> None:
        self.remote.remove(name)
        self._move()
        if self._there is not None:
            self._there.discard(name)

    def _note(self, name: str) -> None:
        self._move()
        assert self._there is not None
        self._there.add(name)

    def _move(self) -> None:
        self._moved = time.monotonic()


def _manifests_first(names: set[str]) -> list[str]:
    """In the order of removal: half a save must not look like one, and what is left is known as a run to the end."""
    return sorted(names, key=lambda name: (name == "config.yaml", not name.endswith("/manifest.json"), name))

"""What of a run folder is mirrored: records, which are small and change, and complete saves, which do neither.

Saves are those of training/checkpoint.py: checkpoints/step-00001200/ with files and a manifest.json that names them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_SAVE = re.compile(r"step-\d{8}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]*")
# saves travel by rules of their own, and the rest is of this machine and this moment
_NOT_RECORDS = {"checkpoints", "owner", "ray", "stop-requested", "preempted"}


def safe(name: str) -> bool:
    """Whether a relative name is one that we write: plain parts, none of them hidden, that lead out of no folder."""
    return all(_PART.fullmatch(part) for part in name.split("/"))


def is_record(name: str) -> bool:
    return safe(name) and name.split("/")[0] not in _NOT_RECORDS


def records(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Time of change (ns) and size of each record; first that of the configuration, which makes the folder a run."""
    found = {}
    for folder, folders, files in os.walk(run_dir):
        below = Path(folder).relative_to(run_dir)
        folders[:] = [name for name in folders if is_record((below / name).as_posix())]
        for file in files:
            name, path = (below / file).as_posix(), Path(folder, file)
            if is_record(name) and path.is_file() and not path.is_symlink():
                with suppress(FileNotFoundError):  # removed just now
                    state = path.stat()
                    found[name] = (state.st_mtime_ns, state.st_size)
    return dict(sorted(found.items(), key=lambda item: (item[0] != "config.yaml", item[0])))


def saves(run_dir: Path) -> list[tuple[str, bytes]]:
    """Complete saves, the newest first, with their manifests."""
    found = []
    for save in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        try:
            if _SAVE.fullmatch(save.name):
                found.append((save.name, (save / "manifest.json").read_bytes()))
        except OSError:  # not complete, or removed just now
            continue
    return found


def saves_among(names: Iterable[str]) -> list[str]:
    """Of the names of a run folder's files: the saves that have a manifest, the newest first."""
    parts = (name.split("/") for name in names)
    return sorted(
        {p[1] for p in parts if len(p) == 3 and p[::2] == ["checkpoints", "manifest.json"] and _SAVE.fullmatch(p[1])},
        reverse=True,
    )

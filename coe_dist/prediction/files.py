"""Names, folders and patterns a user gives -> image files, each once, in a stable order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from coe_dist.data.listing import SUFFIXES, walk_images
from coe_dist.errors import InputError


class Broken(NamedTuple):
    """A file (or folder) that cannot be read, and why, in one line."""

    file: str
    reason: str


class Listing(NamedTuple):
    files: list[str]  # as the user would write them: relative stays relative
    unreadable: list[Broken]  # folders that could not be listed


def list_images(names: Sequence[str]) -> Listing:
    """The files that `names` mean, in the order of the names, every file once (at its first place).

    A file is taken whatever it is called. A folder stands for the images below it (by their endings, see
    listing.SUFFIXES): its own sorted by name, then those of its sorted subfolders; hidden ones are left out. A
    name with *, ? or [ that does not exist is a pattern (** for any depth), its matches sorted, hidden ones left out.
    Two names of one file in one folder, however the folder is reached, are one file; links to it are files of their
    own. Raises InputError for a name that is nothing of that, a pattern without a match, and when there is no image.
    """
    found: dict[tuple[str, str], str] = {}
    unreadable: dict[str, Broken] = {}
    real_folder = cache(os.path.realpath)
    for name in names:
        for match in _matches(name):
            for file in _images(match, unreadable) if os.path.isdir(match) else (match,):
                folder, base = os.path.split(os.path.normpath(file))
                found.setdefault((real_folder(folder), base), file)
    if not found and not unreadable:
        endings = ", ".join(sorted(SUFFIXES))
        raise InputError(f"IMAGES: {', '.join(names)}: no images; a folder's images end in {endings}")
    return Listing(list(found.values()), list(unreadable.values()))


def _matches(name: str) -> list[str]:
    if os.path.isdir(name) or os.path.isfile(name):
        return [name]
    if os.path.lexists(name):
        raise InputError(f"IMAGES: {name} is not allowed; it is neither a file nor a folder")
    if not glob.has_magic(name):
        raise InputError(f"IMAGES: {name}: no such file or folder")
    matches = sorted(match for match in glob.glob(name, recursive=True) if os.path.exists(match))
    if not matches:
        raise InputError(f"IMAGES: {name}: no file matches this pattern")
    return matches


def _images(folder: str, unreadable: dict[str, Broken]) -> Iterator[str]:
    def note(error: OSError) -> None:
        name = str(error.filename)
        unreadable[name] = Broken(name, f"{type(error).__name__}: {error.strerror}")

    return walk_images(folder, lambda name: name.startswith("."), note)

"""Which files of a folder are images, and of which class; nothing is opened."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from coe_dist.data.labels import read_labels
from coe_dist.errors import InputError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_NOT_A_CLASS = frozenset({"__MACOSX"})

Labelled = list[tuple[Path, int]]


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """Class name (NFC, so that a tree copied from macOS matches) -> its image files, sorted."""
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if not _ignored(entry.name) and entry.is_dir():
            found.setdefault(unicodedata.normalize("NFC", entry.name), []).extend(images_in(entry))
    return found


def list_training(folder: Path) -> tuple[tuple[str, ...], Labelled]:
    """The classes, which are the folders sorted by name, and the labelled files. InputError for a class without any."""
    files = list_classes(folder)
    if not files:
        raise InputError(f"{folder}: no class folders; it needs one folder of images per class")
    classes = tuple(sorted(files))
    for name in classes:
        if not files[name]:
            raise InputError(f"{folder / name}: no images; a class needs at least one image to train on")
    return classes, _label(files, classes)


def list_other(
    folder: Path, classes: Sequence[str], train_folder: str, labels: Path | None = None, synsets: Path | None = None
) -> tuple[Labelled, list[str]]:
    """The files of a split other than train, labelled by train's classes, and warnings about classes without any.

    labels: the images lie in no class folders, this file names their classes (see labels.py). Raises InputError naming
    the folders when they differ from train's: another set of folders would shift the labels.
    """
    if labels is not None:
        images = list(images_in(folder))
        labelled = read_labels(labels, folder, images, classes, synsets)
        counts = {label for _, label in labelled}
        return labelled, [f"{labels}: no image of {classes[i]}" for i in range(len(classes)) if i not in counts]
    files = list_classes(folder)
    if not files and any(images_in(folder)):
        raise InputError(f"{folder}: its images lie in no class folders; name their classes with labels")
    missing, extra = sorted(set(classes) - set(files)), sorted(set(files) - set(classes))
    if missing or extra:
        parts = [f"{word} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
                 for word, names in (("lacks", missing), ("has in addition", extra)) if names]  # fmt: skip
        raise InputError(f"{folder}: its class folders differ from those of {train_folder}: it {' and '.join(parts)}")
    return _label(files, classes), [f"{folder / name}: no images" for name in classes if not files[name]]


def images_in(folder: Path) -> Iterator[Path]:
    """The image files of a folder and of those in it, by their suffix; hidden ones and clutter left out."""
    return map(Path, walk_images(folder, _ignored))


def walk_images(
    folder: Path | str, ignored: Callable[[str], bool], on_error: Callable[[OSError], None] | None = None
) -> Iterator[str]:
    """The image files below a folder by their suffix, as os.walk names them: its own sorted by name, then those of its
    sorted subfolders. ignored: names of files and folders to leave out; on_error: told of folders that cannot be
    listed."""
    visited = set()  # links may form a ring
    for place, folders, files in os.walk(folder, onerror=on_error, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not ignored(name))
        for name in sorted(files):
            if not ignored(name) and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(place, name)


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in _NOT_A_CLASS  # also ._x, which macOS leaves on other file systems


def _label(files: dict[str, list[Path]], classes: Sequence[str]) -> Labelled:
    return [(path, label) for label, name in enumerate(classes) for path in files[name]]

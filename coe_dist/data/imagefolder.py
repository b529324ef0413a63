"""Trees of the form ROOT/train/CLASS/..., ROOT/val/CLASS/..., optionally ROOT/test/CLASS/... (ImageNet's form)."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coe_dist.data.order import permutation
from coe_dist.data.pixels import Inspection, inspect_file, read_pixels
from coe_dist.data.sidecar import Quarantined
from coe_dist.data.sources import Source
from coe_dist.errors import InputError
from coe_dist.seeds import derive_seed

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_NOT_A_CLASS = frozenset({"__MACOSX"})

Labelled = list[tuple[Path, int]]


class FileSplit:
    """Accepted image files of one split, read and converted one at a time."""

    def __init__(
        self,
        files: Labelled,
        inspections: Sequence[Inspection],
        quarantined: Sequence[Quarantined],
        max_resolution: int | None,
    ) -> None:
        self._paths = [path for path, _ in files]
        self.labels_N = np.array([label for _, label in files], np.int64)
        self._sizes = {(found.height, found.width) for found in inspections}
        self.quarantined = quarantined
        self._max_resolution = max_resolution

    @property
    def shape(self) -> tuple[int, int] | None:
        return next(iter(self._sizes)) if len(self._sizes) == 1 else None

    @property
    def largest(self) -> int:
        return max((height * width for height, width in self._sizes), default=0)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        path = self._paths[index]
        try:
            return read_pixels(path, self._max_resolution), int(self.labels_N[index])
        except Exception as error:
            raise OSError(f"{path}: was readable when it was checked and is not now: {error}") from error


def open_imagefolder(
    root: Path, *, max_resolution: int | None = None, limit: int | None = None, workers: int = 1
) -> Source:
    """Lists and decodes every file once; unreadable ones are quarantined.

    Classes are train's folders sorted by name; the other splits must have the same ones. With ROOT/test, `val` becomes
    the validation split; without, `val` becomes the test split and validation is cut from train: of each class a tenth,
    at least 1 and at most 50, none from a class of one image. Each split is stored in a fixed shuffled order, so that
    its first images are a fair sample (our own rules). Raises InputError naming the folder at fault.
    """
    train_folder, val_folder = _folder(root, "train"), _folder(root, "val", "validation")
    test_folder = root / "test" if (root / "test").is_dir() else None
    train_files = _list_classes(train_folder)
    if not train_files:
        raise InputError(f"{train_folder}: no class folders; it needs one folder of images per class")
    classes = tuple(sorted(train_files))
    for name in classes:
        if not train_files[name]:
            raise InputError(f"{train_folder / name}: no images; a class needs at least one image to train on")
    warnings: list[str] = []
    listed = {"train": _label(train_files, classes)}
    listed["test" if test_folder is None else "validation"] = _other(val_folder, classes, train_folder, warnings)
    if test_folder is not None:
        listed["test"] = _other(test_folder, classes, train_folder, warnings)
    else:
        listed["train"], listed["validation"] = _cut_validation(listed["train"], root)

    splits, statistics = {}, list[Inspection]()
    for split, files in listed.items():
        files = [files[i] for i in permutation(len(files), derive_seed(0, "imagefolder", split))][:limit]
        found = inspect_files([path for path, _ in files], max_resolution, workers)
        good = [(file, result) for file, result in zip(files, found, strict=True) if isinstance(result, Inspection)]
        bad = [
            Quarantined(file=str(path.relative_to(root)), reason=result)
            for (path, _), result in zip(files, found, strict=True)
            if isinstance(result, str)
        ]
        splits[split] = FileSplit([file for file, _ in good], [result for _, result in good], bad, max_resolution)
        if split == "train":
            statistics = [result for _, result in good]
            _require_every_class(splits[split].labels_N, classes, train_folder, limit)
    mean = np.mean([found.mean for found in statistics], axis=0)
    std = np.sqrt(np.maximum(np.mean([found.square for found in statistics], axis=0) - mean**2, 0.0))
    ordered = {split: splits[split] for split in ("train", "validation", "test")}
    return Source("imagefolder", classes, 3, dict(ordered), tuple(mean.tolist()), tuple(std.tolist()), tuple(warnings))


def inspect_files(paths: Sequence[Path], max_resolution: int | None, workers: int) -> list[Inspection | str]:
    """inspect_file of all paths, in order, by `workers` processes. InputError when a decoder kills its process."""
    inspect = partial(inspect_file, max_resolution=max_resolution)
    if workers <= 1 or len(paths) < 64:
        return [inspect(path) for path in paths]
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            return list(pool.map(inspect, paths, chunksize=32))
    except BrokenProcessPool as error:
        raise InputError("imagefolder: a process died while decoding; check the images with workers=1") from error


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise InputError(
        f"{root / names[0]}: no such folder; an image tree has ROOT/train/CLASS/... and ROOT/val/CLASS/..."
    )


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in _NOT_A_CLASS  # also ._x, which macOS leaves on other file systems


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """Class name (NFC, so that a tree copied from macOS matches) -> its image files, sorted."""
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if not _ignored(entry.name) and entry.is_dir():
            found.setdefault(unicodedata.normalize("NFC", entry.name), []).extend(_images(entry))
    return found


def _images(folder: Path) -> Iterator[Path]:
    visited = set()  # links may form a ring
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not _ignored(name))
        for name in sorted(files):
            if not _ignored(name) and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(place) / name


def _label(files: dict[str, list[Path]], classes: Sequence[str]) -> Labelled:
    return [(path, label) for label, name in enumerate(classes) for path in files[name]]


def _other(folder: Path, classes: Sequence[str], train_folder: Path, warnings: list[str]) -> Labelled:
    """Images of a split other than train, labelled by train's classes: another set of folders would shift labels."""
    files = _list_classes(folder)
    missing, extra = sorted(set(classes) - set(files)), sorted(set(files) - set(classes))
    if missing or extra:
        parts = [f"{word} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
                 for word, names in (("lacks", missing), ("has in addition", extra)) if names]  # fmt: skip
        raise InputError(f"{folder}: its class folders differ from those of {train_folder}: it {' and '.join(parts)}")
    warnings.extend(f"{folder / name}: no images" for name in classes if not files[name])
    return _label(files, classes)


def _cut_validation(files: Labelled, root: Path) -> tuple[Labelled, Labelled]:
    by_class: dict[int, list[Path]] = {}
    for path, label in files:
        by_class.setdefault(label, []).append(path)
    train, validation = Labelled(), Labelled()
    for label, paths in by_class.items():
        chosen = min(50, max(1, len(paths) // 10)) if len(paths) > 1 else 0
        shuffled = permutation(len(paths), derive_seed(0, "imagefolder", "validation", label))
        validation += [(paths[i], label) for i in sorted(shuffled[:chosen])]
        train += [(paths[i], label) for i in sorted(shuffled[chosen:])]
    if not validation:
        raise InputError(f"{root}: every class has a single training image; none is left for validation")
    return train, validation


def _require_every_class(
    labels_N: npt.NDArray[np.int64], classes: Sequence[str], folder: Path, limit: int | None
) -> None:
    counts = np.bincount(labels_N, minlength=len(classes))
    if limit is None and not counts.all():
        raise InputError(f"{folder / classes[int(counts.argmin())]}: no readable image; a class needs at least one")
    if not len(labels_N):
        raise InputError(f"{folder}: no readable image")

"""Folders of images: a tree of the form ROOT/train/CLASS/..., ROOT/val/CLASS/... (ImageNet's form), or one split."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coe_dist.data.listing import Labelled, list_other, list_training
from coe_dist.data.order import permutation
from coe_dist.data.pixels import Inspection, inspect_file, read_pixels
from coe_dist.data.progress import progress_bar
from coe_dist.data.sidecar import Quarantined, SplitInfo
from coe_dist.data.sources import AS_IT_IS, Opening, Source
from coe_dist.errors import InputError
from coe_dist.printable import printable
from coe_dist.seeds import derive_seed

VALIDATION = ("val", "validation")  # names of its folder


class FileSplit:
    """Accepted image files of one split, read and converted one at a time."""

    def __init__(
        self,
        root: Path,
        files: Labelled,
        inspections: Sequence[Inspection],
        quarantined: Sequence[Quarantined],
        max_resolution: int | None,
    ) -> None:
        self._root = root
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

    def file_of(self, index: int) -> str:
        return printable(self._paths[index].relative_to(self._root))


def open_imagefolder(root: Path, opening: Opening = AS_IT_IS) -> Source:
    """Lists and decodes every file once; unreadable ones are quarantined.

    Classes are train's folders sorted by name; the other splits must have the same ones, or with `opening.labels` `val`
    is one folder of images that this file labels. With ROOT/test, `val` becomes the validation split; without, `val`
    becomes the test split. What is then still missing of validation and test is cut from train: of each class a tenth,
    at least 1 and at most 50, none from a class of one image. Each split is stored in a fixed shuffled order, so that
    its first images are a fair sample (our own rules). Raises InputError naming the folder at fault.
    """
    train_folder = _folder(root, "train")
    has_validation = any((root / name).is_dir() for name in VALIDATION)
    others = {"val": _folder(root, *VALIDATION)} if opening.labels or has_validation else {}
    others |= {"test": root / "test"} if (root / "test").is_dir() else {}
    classes, training = list_training(train_folder)
    listed, warnings = {"train": training}, []
    for name, folder in others.items():
        labels = (opening.labels, opening.synsets) if name == "val" else (None, None)
        split = "validation" if "test" in others and name == "val" else "test"
        listed[split], more = list_other(folder, classes, str(train_folder), *labels)
        warnings += more
    for split in ("test", "validation"):
        if split not in listed:
            listed["train"], listed[split] = _cut(listed["train"], root, split)
    if "val" not in others:
        cut = "validation is" if "test" in others else "validation and test are"
        warnings.append(f"{root}: no folder val; {cut} cut from train, a tenth of each class")
    opened = {split: _open_split(root, split, files, opening) for split, files in listed.items()}
    _require_every_class(opened["train"][0].labels_N, classes, train_folder, opening.limit)
    mean, std = _statistics(opened["train"][1])
    splits = {split: opened[split][0] for split in ("train", "validation", "test")}
    return Source("imagefolder", classes, 3, dict(splits), mean, std, tuple(warnings), str(root.resolve()))


def open_folder(folder: Path, split: str, train: SplitInfo | None, opening: Opening = AS_IT_IS) -> Source:
    """One split from one folder. Without `train` the folder's classes and statistics are its own; with it they are
    those of that training file, and the folder must hold the same classes."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one with a folder of images per class")
    warnings: list[str] = []
    if train is None:
        if opening.labels is not None:
            raise InputError(
                f"labels: {opening.labels} is not allowed for a training file; its classes are the folders"
            )
        classes, files = list_training(folder)
    else:
        classes, train_folder = train.classes, train.root or "the training file"
        files, warnings = list_other(folder, classes, train_folder, opening.labels, opening.synsets)
    images, inspections = _open_split(folder, split, files, opening)
    if train is None:
        _require_every_class(images.labels_N, classes, folder, opening.limit)
    mean, std = _statistics(inspections) if train is None else (train.mean, train.std)
    return Source("imagefolder", classes, 3, {split: images}, mean, std, tuple(warnings), str(folder.resolve()))


def inspect_files(
    paths: Sequence[Path], max_resolution: int | None, workers: int, *, title: str = "", progress: bool = False
) -> list[Inspection | str]:
    """inspect_file of all paths, in order, by `workers` processes. InputError when a decoder kills its process."""
    inspect = partial(inspect_file, max_resolution=max_resolution)
    found: list[Inspection | str] = []
    try:
        with progress_bar(title, len(paths), progress) as on_progress:
            if workers <= 1 or len(paths) < 64:
                for path in paths:
                    found.append(inspect(path))
                    on_progress(len(found))
                return found
            with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
                for result in pool.map(inspect, paths, chunksize=32):
                    found.append(result)
                    on_progress(len(found))
            return found
    except BrokenProcessPool as error:
        raise InputError("imagefolder: a process died while decoding; check the images with workers=1") from error


def _open_split(root: Path, split: str, files: Labelled, opening: Opening) -> tuple[FileSplit, list[Inspection]]:
    files = [files[i] for i in permutation(len(files), derive_seed(0, "imagefolder", split))][: opening.limit]
    found = inspect_files(
        [path for path, _ in files],
        opening.max_resolution,
        opening.workers,
        title=f"{split}: checking",
        progress=opening.progress,
    )
    good = [(file, result) for file, result in zip(files, found, strict=True) if isinstance(result, Inspection)]
    bad = [
        Quarantined(file=printable(path.relative_to(root)), reason=result)
        for (path, _), result in zip(files, found, strict=True)
        if isinstance(result, str)
    ]
    inspections = [result for _, result in good]
    return FileSplit(root, [file for file, _ in good], inspections, bad, opening.max_resolution), inspections


def _statistics(inspections: Sequence[Inspection]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) per channel, every image weighing the same."""
    mean = np.mean([found.mean for found in inspections], axis=0)
    std = np.sqrt(np.maximum(np.mean([found.square for found in inspections], axis=0) - mean**2, 0.0))
    return tuple(mean.tolist()), tuple(std.tolist())


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise InputError(
        f"{root / names[0]}: no such folder; an image tree has ROOT/train/CLASS/... and ROOT/val/CLASS/..."
    )


def _cut(files: Labelled, root: Path, split: str) -> tuple[Labelled, Labelled]:
    """(what stays in train, what becomes `split`)."""
    by_class: dict[int, list[Path]] = {}
    for path, label in files:
        by_class.setdefault(label, []).append(path)
    train, other = Labelled(), Labelled()
    for label, paths in by_class.items():
        chosen = min(50, max(1, len(paths) // 10)) if len(paths) > 1 else 0
        shuffled = permutation(len(paths), derive_seed(0, "imagefolder", split, label))
        other += [(paths[i], label) for i in sorted(shuffled[:chosen])]
        train += [(paths[i], label) for i in sorted(shuffled[chosen:])]
    if not other:
        raise InputError(f"{root}: every class has a single training image; none is left for {split}")
    return train, other


def _require_every_class(
    labels_N: npt.NDArray[np.int64], classes: Sequence[str], folder: Path, limit: int | None
) -> None:
    counts = np.bincount(labels_N, minlength=len(classes))
    if limit is None and not counts.all():
        raise InputError(f"{folder / classes[int(counts.argmin())]}: no readable image; a class needs at least one")
    if not len(labels_N):
        raise InputError(f"{folder}: no readable image")

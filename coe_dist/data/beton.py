"""Writing a data set: the three .beton files of a whole one, or a single file from one folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coe_dist.data.samples import quarantine_path
from coe_dist.data.sidecar import SPLITS, Quarantined, SplitInfo, WriteOptions, read_sidecar
from coe_dist.data.sources import SOURCES, Source, open_source
from coe_dist.data.write_split import write_split
from coe_dist.data.writing import Writing
from coe_dist.errors import InputError
from coe_dist.resources import usable_cores

_SPLIT_OF = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


def write(
    source: str,
    out: Path,
    *,
    folder: Path | None = None,
    root: Path | None = None,
    split: str | None = None,
    train_file: Path | None = None,
    workers: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """write_file when `folder` is given, else write_dataset; on all usable cores unless `workers` says otherwise.

    Raises InputError for an argument that the chosen one does not take, and what it raises.
    """
    settings["workers"] = usable_cores() if workers is None else workers
    if folder is None:
        for field, value in (("split", split), ("train_file", train_file)):
            if value is not None:
                raise InputError(f"{field}: {value} is not allowed without a folder to write one file from")
        if Path(out).suffix == ".beton":
            raise InputError(f"out: {out} is not allowed for a whole data set; give a folder, or name one to read")
        return write_dataset(source, out, root=root, **settings)
    if source != "imagefolder":
        raise InputError(f"source: {source} is not allowed with a folder to write one file from; give imagefolder")
    if root is not None:
        raise InputError(f"root: {root} is not allowed, the folder {folder} is given too; give only one of them")
    return write_file(folder, out, split=split, train_file=train_file, **settings)


def write_dataset(source: str, out: Path, *, root: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Writes train, validation and test of `fashion-mnist` or of an `imagefolder` tree to out/SPLIT.beton; `settings`
    are Writing's.

    Returns {"splits": {split: {"file", "status": "written" | "already there", "count", "bytes", "quarantined" (number),
    "quarantine" (its list, or None), "seconds"}}, "warnings": [...], "seconds"}. Raises InputError for bad arguments,
    sources and existing files; WriterError when writing fails.
    """
    writing = Writing(**settings)
    if source not in SOURCES:
        raise InputError(f"source: {source!r} is not allowed; give {' or '.join(SOURCES)}")
    writing.check()
    betons = {split: Path(out) / f"{split}.beton" for split in SPLITS}
    return _write(source, betons, root, writing, lambda: open_source(source, root, writing.opening()), None)


def write_file(
    folder: Path, beton: Path, *, split: str | None = None, train_file: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """Writes one folder of images as one file. `split` (train, validation or test) is told by the file's name if not
    given. A file other than train takes its classes and statistics from `train_file`, by default train.beton beside it,
    and its folder must have the same classes. `settings` are Writing's. Returns and raises as write_dataset does."""
    from coe_dist.data.imagefolder import open_folder

    writing = Writing(**settings)
    writing.check()
    folder, beton = Path(folder), Path(beton)
    if beton.suffix != ".beton":
        raise InputError(f"out: {beton} is not allowed for a single folder; give a file that ends in .beton")
    kind = split or _SPLIT_OF.get(beton.stem)
    if kind not in SPLITS:
        given = f"{split!r} is not allowed" if split else f"{beton.name} does not tell it"
        raise InputError(f"split: {given}; give {', '.join(SPLITS)}")
    train = None
    if kind != "train":
        train_file = train_file or beton.with_name("train.beton")
        if not train_file.is_file():
            raise InputError(f"train_file: {train_file} is missing; write it first, a {kind} file takes its classes")
        train = read_sidecar(train_file)
    return _write(
        "imagefolder",
        {kind: beton},
        folder,
        writing,
        lambda: open_folder(folder, kind, train, writing.opening()),
        train,
    )


def _write(
    name: str,
    betons: Mapping[str, Path],
    root: Path | None,
    writing: Writing,
    open_it: Callable[[], Source],
    train: SplitInfo | None,
) -> dict[str, Any]:
    start, options = time.perf_counter(), writing.options()
    present = {}
    if not writing.overwrite:
        folder = None if root is None else str(root.resolve())
        present = {
            split: info for split, beton in betons.items() if (info := _existing(beton, name, options, folder, train))
        }
    report: dict[str, Any] = {"splits": {}, "warnings": []}
    source: Source | None = None
    _check_bad([item for info in present.values() for item in info.quarantined], writing.max_bad)
    if len(present) < len(betons):
        source = open_it()
        report["warnings"] = list(source.warnings)
        _check_source(source, writing.max_bad, betons, present)
    for split, beton in betons.items():
        split_start = time.perf_counter()
        info = present.get(split)
        if info is None:
            assert source is not None
            info = write_split(beton, source, split, options, workers=writing.workers, progress=writing.progress)
        report["splits"][split] = {
            "file": str(beton),
            "status": "already there" if split in present else "written",
            "count": info.count,
            "bytes": info.bytes,
            "quarantined": len(info.quarantined),
            "quarantine": str(quarantine_path(beton)) if info.quarantined else None,
            "seconds": time.perf_counter() - split_start,
        }
    report["seconds"] = time.perf_counter() - start
    return report


def _existing(
    beton: Path, name: str, options: WriteOptions, root: str | None, train: SplitInfo | None
) -> SplitInfo | None:
    if not beton.exists():
        return None
    try:
        info = read_sidecar(beton)
    except InputError as error:
        raise InputError(f"{error} (nothing was changed)") from error
    found_root = info.root if root is not None else None  # without a root the source is found by itself
    for field, found, wanted in (
        ("source", info.source, name),
        ("options", info.written, options),
        ("root", found_root, root if found_root is not None else None),
    ):
        if found != wanted:
            raise InputError(f"{beton}: written with {field} {found}, not {wanted}; use --overwrite or another place")
    if train is not None and (info.classes, info.mean, info.std) != (train.classes, train.mean, train.std):
        raise InputError(f"{beton}: its classes and statistics are not those of the training file; use --overwrite")
    return info


def _check_source(
    source: Source, max_bad: int | None, betons: Mapping[str, Path], present: Mapping[str, SplitInfo]
) -> None:
    for split, images in source.splits.items():
        if not len(images):
            raise InputError(f"{source.name}: the {split} split has no readable image")
    for split, info in present.items():
        if info.classes != source.classes:
            raise InputError(f"{betons[split]}: its classes differ from those of the source; use --overwrite")
    _check_bad([item for images in source.splits.values() for item in images.quarantined], max_bad)


def _check_bad(bad: Sequence[Quarantined], max_bad: int | None) -> None:
    if max_bad is not None and len(bad) > max_bad:
        first = f"the first is {bad[0].file} ({bad[0].reason})"
        raise InputError(f"max_bad: {max_bad} is less than the {len(bad)} images that cannot be read; {first}")

"""Writing a data set: three .beton files, each with its side-car, whole or not at all."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from coe_dist.data.sidecar import SPLITS, SplitInfo, WriteOptions, read_sidecar, sha256_of, sidecar_path, write_sidecar
from coe_dist.data.sources import SOURCES, Source, open_source
from coe_dist.errors import InputError


def write_dataset(
    source: str,
    out: Path,
    *,
    root: Path | None = None,
    max_resolution: int | None = None,
    jpeg_fraction: float = 0.0,
    jpeg_quality: int = 90,
    workers: int = 1,
    max_bad: int | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes train, validation and test of `fashion-mnist` or of an `imagefolder` tree to out/SPLIT.beton.

    max_resolution: longest side in pixels; jpeg_fraction: share of the images stored as JPEG, the others raw; workers:
    processes; max_bad: unreadable images tolerated over all splits (none: any number; all are listed in the side-car);
    limit: first so many images of each split. A split that is already there, complete and written with the same options
    is kept. A file appears under its name when it is complete, its side-car after it.

    Returns {"folder", "splits": {split: {"status": "written" | "already there", "count", "bytes", "quarantined",
    "seconds"}}, "warnings": [...], "seconds"}. Raises InputError for bad arguments, sources and existing files;
    WriterError when writing fails.
    """
    options = WriteOptions(
        max_resolution=max_resolution, jpeg_fraction=jpeg_fraction, jpeg_quality=jpeg_quality, limit=limit
    )
    _check_arguments(source, options, workers, max_bad)
    out = Path(out)
    start = time.perf_counter()
    present = {} if overwrite else {split: info for split in SPLITS if (info := _existing(out, split, source, options))}
    report: dict[str, Any] = {"folder": str(out), "splits": {}, "warnings": []}
    opened: Source | None = None
    if len(present) < len(SPLITS):
        opened = open_source(source, root, max_resolution=max_resolution, limit=limit, workers=workers)
        report["warnings"] = list(opened.warnings)
        _check_bad(opened, max_bad, out, present)
    with _only_writer(out) if opened else nullcontext():
        for split in SPLITS:
            split_start = time.perf_counter()
            info = present.get(split)
            if info is None:
                assert opened is not None
                info = _write_split(opened, split, out, options, workers, progress)
            report["splits"][split] = {
                "status": "already there" if split in present else "written",
                "count": info.count,
                "bytes": info.bytes,
                "quarantined": len(info.quarantined),
                "seconds": time.perf_counter() - split_start,
            }
    report["seconds"] = time.perf_counter() - start
    return report


def _check_arguments(source: str, options: WriteOptions, workers: int, max_bad: int | None) -> None:
    side = options.max_resolution
    rules = (
        ("source", source, source in SOURCES, " or ".join(SOURCES)),
        ("max_resolution", side, side is None or side >= 8, "8 or more"),
        ("jpeg_fraction", options.jpeg_fraction, 0 <= options.jpeg_fraction <= 1, "a number from 0 to 1"),
        ("jpeg_quality", options.jpeg_quality, 1 <= options.jpeg_quality <= 100, "a whole number from 1 to 100"),
        ("workers", workers, workers >= 1, "a whole number of at least 1"),
        ("max_bad", max_bad, max_bad is None or max_bad >= 0, "0 or more"),
        ("limit", options.limit, options.limit is None or options.limit >= 1, "1 or more"),
    )
    for field, value, allowed, words in rules:
        if not allowed:
            raise InputError(f"{field}: {value!r} is not allowed; give {words}")


def _existing(out: Path, split: str, source: str, options: WriteOptions) -> SplitInfo | None:
    beton = out / f"{split}.beton"
    if not beton.exists():
        return None
    try:
        info = read_sidecar(beton)
    except InputError as error:
        raise InputError(f"{error} (nothing was changed)") from error
    for field, found, wanted in (("source", info.source, source), ("options", info.written, options)):
        if found != wanted:
            raise InputError(f"{beton}: written with {field} {found}, not {wanted}; use --overwrite or another folder")
    return info


def _check_bad(source: Source, max_bad: int | None, out: Path, present: dict[str, SplitInfo]) -> None:
    for split, info in present.items():
        if info.classes != source.classes:
            raise InputError(f"{out / split}.beton: its classes differ from those of the source; use --overwrite")
    bad = [item for split in source.splits.values() for item in split.quarantined]
    if max_bad is not None and len(bad) > max_bad:
        first = f"the first is {bad[0].file} ({bad[0].reason})"
        raise InputError(f"max_bad: {max_bad} is less than the {len(bad)} images that cannot be read; {first}")


def _write_split(
    source: Source, name: str, out: Path, options: WriteOptions, workers: int, progress: bool
) -> SplitInfo:
    from coe_dist.data.writer import write_beton

    split, beton = source.splits[name], out / f"{name}.beton"
    temporary = out / f".{name}.beton.partial"
    try:
        with _progress_bar(name, len(split), progress) as on_progress:
            write_beton(
                temporary,
                split,
                jpeg_fraction=options.jpeg_fraction,
                jpeg_quality=options.jpeg_quality,
                workers=min(workers, len(split)),
                on_progress=on_progress,
            )
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        info = SplitInfo(
            source=source.name,
            split=name,
            classes=source.classes,
            count=len(split),
            counts_per_class=tuple(np.bincount(split.labels_N, minlength=len(source.classes)).tolist()),
            channels=3 if source.channels == 3 else 1,
            shape=split.shape,
            mean=source.mean,
            std=source.std,
            quarantined=tuple(split.quarantined),
            written=options,
            bytes=temporary.stat().st_size,
            sha256=sha256_of(temporary),
        )
        sidecar_path(beton).unlink(missing_ok=True)  # a crash between the two lines below must not leave a false pair
        temporary.replace(beton)
        write_sidecar(beton, info)
    finally:
        temporary.unlink(missing_ok=True)
    return info


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Two writers in one folder would mix their pages."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".write.lock").open("w")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{out}: another process is writing here") from error
        except OSError:
            pass  # a file system without locks
        yield


@contextmanager
def _progress_bar(name: str, total: int, shown: bool) -> Iterator[Callable[[int], None] | None]:
    if not shown:
        yield None
        return
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as bar:
        task = bar.add_task(f"{name}.beton", total=total)
        yield lambda done: bar.update(task, completed=done)

"""One .beton with what lies beside it: whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from coe_dist.data.progress import progress_bar
from coe_dist.data.samples import Sample, write_quarantine, write_samples
from coe_dist.data.sidecar import SplitInfo, WriteOptions, sha256_of, sidecar_path, write_sidecar
from coe_dist.data.sources import Source
from coe_dist.errors import InputError


def write_split(
    beton: Path, source: Source, split: str, options: WriteOptions, *, workers: int, progress: bool
) -> SplitInfo:
    """Writes the split and its lists. The file appears under its name when it is complete, its side-car after it.

    Raises InputError when the place cannot be written to, WriterError when writing fails.
    """
    from coe_dist.data.writer import write_beton

    images = source.splits[split]
    temporary = beton.with_name(f".{beton.name}.partial")
    with _only_writer(beton):
        try:
            with progress_bar(f"{split}: writing", len(images), progress) as on_progress:
                checksums_N = write_beton(
                    temporary,
                    images,
                    jpeg_fraction=options.jpeg_fraction,
                    jpeg_quality=options.jpeg_quality,
                    workers=min(workers, len(images)),
                    on_progress=on_progress,
                )
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            info = SplitInfo(
                source=source.name,
                split=split,
                classes=source.classes,
                count=len(images),
                counts_per_class=tuple(np.bincount(images.labels_N, minlength=len(source.classes)).tolist()),
                channels=3 if source.channels == 3 else 1,
                shape=images.shape,
                mean=source.mean,
                std=source.std,
                root=source.root,
                quarantined=tuple(images.quarantined),
                written=options,
                bytes=temporary.stat().st_size,
                sha256=sha256_of(temporary),
            )
            sidecar_path(beton).unlink(missing_ok=True)  # a crash in the lines below must not leave a false pair
            write_samples(beton, [Sample(images.file_of(i), checksums_N[i]) for i in range(len(images))])
            write_quarantine(beton, images.quarantined)
            temporary.replace(beton)
            write_sidecar(beton, info)
        finally:
            temporary.unlink(missing_ok=True)
    return info


@contextmanager
def _only_writer(beton: Path) -> Iterator[None]:
    """Two writers of one file would mix their pages."""
    try:
        beton.parent.mkdir(parents=True, exist_ok=True)
        lock = beton.with_name(f".{beton.name}.lock").open("w")
    except OSError as error:
        raise InputError(f"{beton.parent}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{beton}: another process is writing it") from error
        except OSError:
            pass  # a file system without locks
        yield

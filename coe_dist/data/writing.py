"""How a data set is written: the arguments, what is allowed, and what of them the file depends on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from coe_dist.data.sidecar import WriteOptions
from coe_dist.data.sources import Opening
from coe_dist.errors import InputError


@dataclass(frozen=True)
class Writing:
    """max_resolution: longest side in pixels; jpeg_fraction: share of the images stored as JPEG, the others raw;
    workers: processes; max_bad: unreadable images tolerated over all splits (none: any number; all are listed); limit:
    first so many images of each split; labels, synsets: the classes of images that lie in one folder (see labels.py).
    What is there, complete and written with the same options from the same folder, is kept without `overwrite`.
    """

    max_resolution: int | None = None
    jpeg_fraction: float = 0.0
    jpeg_quality: int = 90
    workers: int = 1
    max_bad: int | None = None
    limit: int | None = None
    labels: Path | None = None
    synsets: Path | None = None
    overwrite: bool = False
    progress: bool = False

    def check(self) -> None:
        side = self.max_resolution
        rules = (
            ("max_resolution", side, side is None or side >= 8, "8 or more"),
            ("jpeg_fraction", self.jpeg_fraction, 0 <= self.jpeg_fraction <= 1, "a number from 0 to 1"),
            ("jpeg_quality", self.jpeg_quality, 1 <= self.jpeg_quality <= 100, "a whole number from 1 to 100"),
            ("workers", self.workers, self.workers >= 1, "a whole number of at least 1"),
            ("max_bad", self.max_bad, self.max_bad is None or self.max_bad >= 0, "0 or more"),
            ("limit", self.limit, self.limit is None or self.limit >= 1, "1 or more"),
            ("synsets", self.synsets, self.synsets is None or self.labels is not None, "it together with labels"),
        )
        for field, value, allowed, words in rules:
            if not allowed:
                raise InputError(f"{field}: {value!r} is not allowed; give {words}")

    def opening(self) -> Opening:
        return Opening(self.max_resolution, self.limit, self.workers, self.labels, self.synsets, self.progress)

    def options(self) -> WriteOptions:
        """What the file depends on. Raises InputError for labels that cannot be read."""
        labels = None
        if self.labels is not None:
            try:
                contents = [path.read_bytes() for path in (self.labels, self.synsets) if path is not None]
            except OSError as error:
                raise InputError(f"labels: {error.filename} cannot be read ({error.strerror})") from error
            labels = hashlib.sha256(b"\0".join(contents)).hexdigest()
        return WriteOptions(
            max_resolution=self.max_resolution,
            jpeg_fraction=self.jpeg_fraction,
            jpeg_quality=self.jpeg_quality,
            limit=self.limit,
            labels=labels,
        )

"""What a data set is before it is written: labelled splits of RGB images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from coe_dist.data.sidecar import Quarantined
from coe_dist.errors import InputError

SOURCES = ("fashion-mnist", "imagefolder")


class SourceSplit(Protocol):
    """Image i is `split[i]`: (uint8 [H,W,3] contiguous, class). Reading one that was accepted may still raise."""

    labels_N: npt.NDArray[np.int64]
    quarantined: Sequence[Quarantined]

    @property
    def shape(self) -> tuple[int, int] | None:
        """(H, W) in pixels when all images share it."""

    @property
    def largest(self) -> int:
        """H * W of the largest image."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]: ...
    def file_of(self, index: int) -> str:
        """What image `index` is read from, relative to the source's folder, in one line."""


@dataclass(frozen=True)
class Source:
    """Labelled splits. `mean` and `std`: per channel in 0..1, over train, every image weighing the same; `root`: the
    folder that is read."""

    name: str
    classes: tuple[str, ...]
    channels: int
    splits: dict[str, SourceSplit]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    warnings: tuple[str, ...] = ()
    root: str | None = None


@dataclass(frozen=True)
class Opening:
    """How a source is read. `limit`: the first so many images of each split; `workers`: processes that check images;
    `labels`, `synsets`: see labels.py."""

    max_resolution: int | None = None
    limit: int | None = None
    workers: int = 1
    labels: Path | None = None
    synsets: Path | None = None
    progress: bool = False


AS_IT_IS = Opening()


def open_source(name: str, root: Path | None, opening: Opening = AS_IT_IS) -> Source:
    """Finds and checks a whole data set. `root` is needed for `imagefolder` and optional for `fashion-mnist`.

    Raises InputError for anything missing or inconsistent.
    """
    from coe_dist.data.fashion_mnist import open_fashion_mnist
    from coe_dist.data.imagefolder import open_imagefolder

    if name == "fashion-mnist":
        if opening.labels is not None:
            raise InputError(f"labels: {opening.labels} is not allowed for fashion-mnist, which has its own")
        source = open_fashion_mnist(root, max_resolution=opening.max_resolution, limit=opening.limit)
    elif name == "imagefolder":
        if root is None:
            raise InputError("root: missing; the source imagefolder needs the folder that holds train and val")
        source = open_imagefolder(root, opening)
    else:
        raise InputError(f"source: {name!r} is not allowed; give {' or '.join(SOURCES)}")
    return source

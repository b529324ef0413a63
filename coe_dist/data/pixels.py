"""Any image file -> RGB uint8, as preparation.py reads it, or a reason why not."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ImageStat

from coe_dist.preparation import read_image


class Inspection(NamedTuple):
    """Of a readable image: size in pixels as it will be stored, mean and mean square of each channel in 0..1."""

    height: int
    width: int
    mean: tuple[float, float, float]
    square: tuple[float, float, float]


def read_pixels(path: Path, max_resolution: int | None = None) -> npt.NDArray[np.uint8]:
    """uint8 [H,W,3], contiguous; see read_image."""
    return np.ascontiguousarray(np.asarray(read_image(path, max_resolution)))


def inspect_file(path: Path, max_resolution: int | None = None) -> Inspection | str:
    """Decodes the whole file; for an unreadable one, the reason in one line."""
    try:
        image = read_image(path, max_resolution)
        statistics = ImageStat.Stat(image)
        mean = tuple(float(value) / 255 for value in statistics.mean)
        square = tuple(
            float(value) / count / 255**2 for value, count in zip(statistics.sum2, statistics.count, strict=True)
        )
    except Exception as error:  # a decoder may raise anything on damaged bytes, and nothing may reach the writer
        reason = str(error).replace(str(path), path.name)
        return " ".join(f"{type(error).__name__}: {reason}".split())
    return Inspection(image.height, image.width, mean, square)  # type: ignore[arg-type]

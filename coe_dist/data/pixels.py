"""Any image file -> RGB uint8, or a reason why not."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, ImageStat

LARGEST_SIDE = 65535  # FFCV stores sides in 16 bits


class Inspection(NamedTuple):
    """Of a readable image: size in pixels as it will be stored, mean and mean square of each channel in 0..1."""

    height: int
    width: int
    mean: tuple[float, float, float]
    square: tuple[float, float, float]


def read_image(path: Path, max_resolution: int | None = None) -> Image.Image:
    """Opens a file whatever its name says and converts to RGB: EXIF rotation applied (broken EXIF ignored), first frame
    of an animation, transparency dropped as in torchvision, 16-bit grayscale scaled to 8 bits (65535 -> 255). The
    longer side is reduced to max_resolution by area averaging. Raises what Pillow raises, ValueError for
    unusable pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken EXIF and palette transparency warn for each image
        with Image.open(path) as opened:
            opened.load()
            image: Image.Image = opened
            with contextlib.suppress(Exception):  # EXIF comes from cameras and editors: anything can be raised
                image = ImageOps.exif_transpose(opened)
            image = _to_rgb(image)
    if max(image.size) > LARGEST_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels; at most {LARGEST_SIDE} a side")
    if max_resolution is not None and max(image.size) > max_resolution:
        ratio = max_resolution / max(image.size)
        width, height = (max(int(ratio * side), 1) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    return image


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(f"pixel values from {values.min()} to {values.max()}; 0 to 65535 are readable")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating point pixels have no known range")
    return image.convert("RGB")

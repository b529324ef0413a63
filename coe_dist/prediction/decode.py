"""A file -> the uint8 pixels that evaluation would give the networks for this image, or the reason why not.

Decoding is the data set writer's (coe_dist.data.pixels), cropping and resizing the evaluation loader's
(coe_dist.data.resample). So an image gets the very pixels it would have had in a data set written with the same
max_resolution and stored raw; images stored as JPEG there (jpeg_fraction) were compressed once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from coe_dist.data.augment import centre_crops
from coe_dist.data.pixels import read_image
from coe_dist.prediction.files import Broken

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Preparation:
    """channels and resolution (side in pixels) of what the networks take.

    crop_all: also images of exactly that size are cropped, as the loader does for data sets of several sizes.
    max_resolution: pixels of the longer side to which the data set's writer reduced its images.
    """

    channels: int
    resolution: int
    crop_all: bool = False
    max_resolution: int | None = None


def decode(file: str, preparation: Preparation) -> Pixels | Broken:
    """uint8 [channels, resolution, resolution]. Never raises for what is in the file."""
    path = Path(file)
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("no such file" if not path.exists() else "not a file")
        return prepare(read_image(path, preparation.max_resolution), preparation)
    except Exception as error:  # a decoder may raise anything on damaged bytes
        reason = str(error).replace(str(path), path.name)
        return Broken(file, " ".join(f"{type(error).__name__}: {reason}".split()))


def prepare(image: Image.Image, preparation: Preparation) -> Pixels:
    """An RGB image -> uint8 [channels, resolution, resolution], contiguous.

    An image of that size is taken whole (unless crop_all), any other cropped to the centre, a square of 224/256 of the
    shorter side, and resized. For networks of one channel colours become their luma (ITU-R 601), which leaves gray
    images as they are.
    """
    from coe_dist.data.resample import resample  # compiled when first used

    if preparation.channels == 1:
        image = image.convert("L").convert("RGB")  # resized like the data set's, which FFCV stores in three channels
    pixels_HWC: Pixels = np.asarray(image)
    side = preparation.resolution
    if pixels_HWC.shape[:2] != (side, side) or preparation.crop_all:
        height, width = pixels_HWC.shape[:2]
        top, left, size, _ = (int(v) for v in centre_crops(np.array([height]), np.array([width]))[0])
        pixels_CHW = np.empty((preparation.channels, side, side), np.uint8)
        resample(np.ascontiguousarray(pixels_HWC), top, left, size, size, 0, 0, False, pixels_CHW)
        return pixels_CHW
    return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)[: preparation.channels])

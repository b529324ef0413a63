"""An image file of any kind and size -> the pixels that evaluation gives the networks for it. numpy and Pillow alone:
exported models carry this file as prepare.py, with the record that it reads beside it.

    python prepare.py photo.jpg more/*.png > request.json        # the body that a served model takes

    preparation = recorded_preparation("DIR")                    # from Python, beside a copy of this file
    images_NCHW = prepare_files(["photo.jpg"], preparation)      # uint8

1. The file is read whatever its name says (read_image), and reduced as the data set's writer did.
2. A square of 224/256 of the shorter side is cut from the middle; of an image that already has the networks' size only
   where images of the data set have several sizes (crop_all).
3. The crop is resized by the antialiased bilinear filter, as data/resample.py does: the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

LARGEST_SIDE = 65535  # FFCV stores sides in 16 bits
CENTRE_RATIO = 224 / 256  # side of the centre crop / shorter side of the image, the usual rule of ImageNet evaluation
RULE: Final = "centre 224/256, antialiased bilinear"
RECORDS = ("config.json", "manifest.json", "artifacts/weights/config.json")  # where exported folders keep it

Pixels = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Resize = Callable[[Pixels, int, int, int, Pixels], None]
"""(pixels_HW3, top, left, side, out_CRR): lays that square of the image, resized, into `out`."""


@dataclass(frozen=True)
class Preparation:
    """channels and resolution (side in pixels) of what the networks take.

    crop_all: also images of exactly that size are cropped, as the loader does for data sets of several sizes.
    max_resolution: pixels of the longer side to which the data set's writer reduced its images; None: it did not.
    """

    channels: int
    resolution: int
    crop_all: bool = False
    max_resolution: int | None = None

    def record(self) -> dict[str, Any]:
        """What is kept beside channels and resolution, wherever these are kept."""
        return {"rule": RULE, "crop_all": self.crop_all, "max_resolution": self.max_resolution}


def recorded_preparation(folder: str | Path) -> Preparation:
    """What the folder of an exported model says. Raises ValueError where it says nothing, or a rule of another
    version."""
    for name in RECORDS:
        try:
            found = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
            record = dict(found["preparation"])
            if record.pop("rule") != RULE:
                raise ValueError(f"{Path(folder) / name}: preparation.rule: give {RULE!r}")
            return Preparation(found["channels"], found["resolution"], **record)
        except (OSError, KeyError, TypeError):
            continue
    raise ValueError(
        f"{folder}: no record of how images are prepared; give the folder of an exported model, and export "
        "again what an earlier version wrote"
    )


def prepare_files(files: Sequence[str | Path], preparation: Preparation) -> Pixels:
    """uint8 [N, channels, resolution, resolution]. Raises what read_image does."""
    side = preparation.resolution
    images_NCHW = np.empty((len(files), preparation.channels, side, side), np.uint8)
    for number, file in enumerate(files):
        images_NCHW[number] = prepare(read_image(Path(file), preparation.max_resolution), preparation)
    return images_NCHW


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(f"pixel values from {values.min()} to {values.max()}; 0 to 65535 are readable")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating point pixels have no known range")
    return image.convert("RGB")


def centre_crops(heights_B: Integers, widths_B: Integers) -> Integers:
    """[B,4] of (top, left, height, width): a square of 224/256 of the shorter side, in the middle."""
    side_B = np.maximum((CENTRE_RATIO * np.minimum(heights_B, widths_B)).astype(np.int64), 1)
    return np.stack([(heights_B - side_B) // 2, (widths_B - side_B) // 2, side_B, side_B], axis=1)


def prepare(image: Image.Image, preparation: Preparation, resize: Resize | None = None) -> Pixels:
    """An RGB image that read_image has reduced -> uint8 [channels, resolution, resolution], contiguous.

    For networks of one channel colours become their luma (ITU-R 601), which leaves gray images as they are. resize:
    another function that computes the same; None: this file's.
    """
    if preparation.channels == 1:
        image = image.convert("L").convert("RGB")  # resized like the data set's, which FFCV stores in three channels
    pixels_HW3: Pixels = np.ascontiguousarray(np.asarray(image))
    side = preparation.resolution
    if pixels_HW3.shape[:2] == (side, side) and not preparation.crop_all:
        return np.ascontiguousarray(pixels_HW3.transpose(2, 0, 1)[: preparation.channels])
    [[top, left, size, _]] = centre_crops(*(np.array([length]) for length in pixels_HW3.shape[:2])).tolist()
    out_CRR = np.empty((preparation.channels, side, side), np.uint8)
    (resize or _resize)(pixels_HW3, top, left, size, out_CRR)
    return out_CRR


def _resize(pixels_HW3: Pixels, top: int, left: int, size: int, out_CRR: Pixels) -> None:
    """The sums of data/resample.py in its order, in float32: rows first, then columns, rounded to nearest."""
    crop_HWC = pixels_HW3[top : top + size, left : left + size, : len(out_CRR)]
    first_R, weights_RK = _filter(size, out_CRR.shape[1])
    rows_RWC = np.zeros((len(first_R), size, len(out_CRR)), np.float32)
    columns_RRC = np.full((len(first_R), len(first_R), len(out_CRR)), 0.5, np.float32)
    for k, weight_R in enumerate(weights_RK.T):  # taps beyond an output's own have the weight zero
        rows_RWC += weight_R[:, None, None] * crop_HWC[np.minimum(first_R + k, size - 1)]
    for k, weight_R in enumerate(weights_RK.T):
        columns_RRC += weight_R[:, None] * rows_RWC[:, np.minimum(first_R + k, size - 1)]
    out_CRR[:] = columns_RRC.astype(np.uint8).transpose(2, 0, 1)


def _filter(source: int, target: int) -> tuple[Integers, npt.NDArray[np.float32]]:
    """Of each output pixel along one side: its first source pixel, and the weights from there on (sum 1)."""
    scale = source / target
    support = max(scale, 1.0)
    centre_R = (np.arange(target) + 0.5) * scale
    first_R = np.maximum((centre_R - support + 0.5).astype(np.int64), 0)
    count_R = np.minimum((centre_R + support + 0.5).astype(np.int64), source) - first_R
    taps_K = np.arange(count_R.max())
    places_RK = first_R[:, None] + taps_K
    weights_RK = np.maximum(1 - np.abs(places_RK + 0.5 - centre_R[:, None]) / support, 0.0).astype(np.float32)
    weights_RK[taps_K >= count_R[:, None]] = 0
    total_R = weights_RK.astype(np.float64).cumsum(axis=1)[:, -1]  # summed one after the other
    return first_R, (weights_RK / total_R[:, None]).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the JSON body that the served model takes.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file of any kind and size")
    files = parser.parse_args().images
    try:
        images_NCHW = prepare_files(files, recorded_preparation(Path(__file__).resolve().parent))
    except Exception as error:  # a decoder may raise anything on damaged bytes
        parser.exit(2, f"prepare.py: {' '.join(str(error).split())}\n")
    body: dict[str, Any] = {"inputs": images_NCHW.tolist()}
    json.dump(body, sys.stdout)


if __name__ == "__main__":
    main()

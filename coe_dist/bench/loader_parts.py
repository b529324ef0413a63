"""Where a loader's time goes: the parts of one image's way, each by itself in one thread, in CPU milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coe_dist.data.augment import random_crops
from coe_dist.data.ffcv_binding import imdecode
from coe_dist.data.resample import resample
from coe_dist.data.stored import StoredImages

IMAGES = 64  # of each kind


def stored_parts(beton: Path, resolution: int) -> dict[str, float]:
    """Of the images of a .beton: decoding one JPEG (0 where there is none), resampling one image, and the share of
    JPEGs. jpeg_ms * jpeg_share + resample_ms is the time without the loader's own."""
    stored = StoredImages(beton)
    jpegs = [i for i in range(len(stored)) if stored.is_jpeg(i)]
    raws = [i for i in range(len(stored)) if not stored.is_jpeg(i)]

    def decode(index: int) -> Any:
        height, width = stored.size(index)
        image_HW3 = np.empty((height, width, 3), np.uint8)
        imdecode(stored.bytes_of(index), image_HW3, height, width, height, width, 0, 0, 1, 1, False, False)
        return image_HW3

    chosen = (jpegs + raws)[:IMAGES]
    images = [(stored.pixels(i), _crop(i, *stored.size(i))) for i in chosen]
    out = np.empty((3, resolution, resolution), np.uint8)
    return {
        "jpeg_share": len(jpegs) / len(stored),
        "jpeg_ms": _milliseconds(decode, jpegs[:IMAGES]) if jpegs else 0.0,
        "resample_ms": _milliseconds(lambda pair: resample(pair[0], *pair[1], 0, 0, False, out), images),
    }


def file_parts(files: list[Path], resolution: int) -> dict[str, float]:
    """Of the original files, as torchvision's ImageFolder reads them: open, decode; crop and resize (Pillow)."""
    files = files[:IMAGES]

    def decode(path: Path) -> Image.Image:
        with path.open("rb") as file:
            return Image.open(file).convert("RGB")

    def resize(pair: tuple[Image.Image, tuple[int, int, int, int]]) -> Image.Image:
        image, (top, left, height, width) = pair
        part = image.crop((left, top, left + width, top + height))
        return part.resize((resolution, resolution), Image.Resampling.BILINEAR)

    images = [(image, _crop(i, image.height, image.width)) for i, image in enumerate(map(decode, files))]
    return {"jpeg_ms": _milliseconds(decode, files), "resample_ms": _milliseconds(resize, images)}


def _crop(index: int, height: int, width: int) -> tuple[int, int, int, int]:
    crops_14 = random_crops(7, np.array([index]), np.array([height]), np.array([width]))
    top, left, crop_height, crop_width = crops_14[0].tolist()
    return top, left, crop_height, crop_width


def _milliseconds(work: Callable[[Any], object], items: Iterable[Any]) -> float:
    """CPU milliseconds of this thread per item: the least of three rounds, after one that warms up."""
    items = list(items)
    rounds = []
    for _ in range(4):
        start = time.thread_time()
        for item in items:
            work(item)
        rounds.append(time.thread_time() - start)
    return 1000 * min(rounds[1:]) / len(items)

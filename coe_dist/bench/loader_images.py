"""The JPEG files of the loader's benchmark: made once, kept in the user's cache.

Like ImageNet's in what a loader's time depends on: about 400 x 350 pixels, 4:2:0 JPEG of about 100 kB, and the 1/f
amplitude spectrum of natural scenes (with random phases), most of it shared by the three channels. Each image is a
piece of one of a few large fields, scaled in brightness and contrast, so that no two are equal.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

CLASSES = 4
FIELDS, FIELD_SIDE = 8, 1024
WIDTH, HEIGHT = (320, 480), (280, 420)  # pixels, uniform
QUALITY = 92


def benchmark_images(count: int, folder: Path | None = None) -> Path:
    """A tree FOLDER/train/CLASS/*.JPEG with `count` images in four classes, and FOLDER/val with one image a class."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coe_dist"
    folder = folder or cache / f"loader-benchmark-{count}"
    complete = folder / "complete"
    if not complete.is_file():
        fields = [_field(seed) for seed in range(FIELDS)]
        for index in range(count + CLASSES):
            split, label = ("train" if index < count else "val"), index % CLASSES
            place = folder / split / f"class_{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_piece(fields, index)).save(place / f"{index:06d}.JPEG", quality=QUALITY)
        complete.touch()
    return folder


def _field(seed: int) -> npt.NDArray[np.float32]:
    """[side, side, 3], mean 0 and standard deviation 1 per channel."""
    generator = np.random.default_rng([1, seed])
    side = FIELD_SIDE
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf

    def plane() -> npt.NDArray[np.float64]:
        phases = np.exp(2j * np.pi * generator.random(frequency.shape))
        values = np.fft.irfft2(phases / frequency, s=(side, side))
        normal: npt.NDArray[np.float64] = values / values.std()
        return normal

    shared = plane()
    channels = [shared + 0.4 * plane() for _ in range(3)]
    return np.stack([channel / channel.std() for channel in channels], axis=-1).astype(np.float32)


def _piece(fields: list[npt.NDArray[np.float32]], index: int) -> npt.NDArray[np.uint8]:
    generator = np.random.default_rng([2, index])
    height, width = int(generator.integers(*HEIGHT, endpoint=True)), int(generator.integers(*WIDTH, endpoint=True))
    top, left = int(generator.integers(FIELD_SIDE - height)), int(generator.integers(FIELD_SIDE - width))
    piece = fields[index % FIELDS][top : top + height, left : left + width]
    pixels = generator.uniform(90, 150) + generator.uniform(40, 65) * piece
    clipped: npt.NDArray[np.uint8] = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return clipped

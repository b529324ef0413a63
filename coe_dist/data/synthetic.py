"""JPEG files that are made, not photographed: for the loader's benchmark and for rehearsals of a training.

Like ImageNet's in what reading them depends on: 4:2:0 JPEG, about 400 x 350 pixels and 100 kB at full size, and the 1/f
amplitude spectrum of natural scenes (with random phases), most of it shared by the three channels. Each image is a
piece of one of a few large fields, scaled in brightness and contrast, so that no two are equal. Nothing in an image
tells its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from coe_dist.resources import usable_cores

FIELDS, FIELD_SIDE = 8, 1024
WIDTH, HEIGHT = (320, 480), (280, 420)  # pixels, uniform
QUALITY = 92


def write_synthetic_images(folder: Path, counts: Mapping[str, int], *, classes: int, scale: float = 1.0) -> Path:
    """A tree FOLDER/SPLIT/CLASS/*.JPEG with so many images of each split in counts, spread evenly over the classes.

    scale: of both sides. A function of its arguments alone; where a tree is complete it stays as it is. Returns FOLDER.
    """
    complete = folder / "complete"
    if complete.is_file():
        return folder
    fields = [_field(seed) for seed in range(FIELDS)]
    digits = len(str(classes - 1))
    places: list[Path] = []
    for split, count in counts.items():
        for label in range(min(count, classes)):
            (folder / split / f"class_{label:0{digits}d}").mkdir(parents=True, exist_ok=True)
        places += [folder / split / f"class_{index % classes:0{digits}d}" for index in range(count)]

    def write(index: int) -> None:
        Image.fromarray(_piece(fields, index, scale)).save(places[index] / f"{index:06d}.JPEG", quality=QUALITY)

    with ThreadPoolExecutor(usable_cores()) as pool:  # encoding leaves Python's lock
        for _ in pool.map(write, range(len(places))):
            pass
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


def _piece(fields: list[npt.NDArray[np.float32]], index: int, scale: float) -> npt.NDArray[np.uint8]:
    generator = np.random.default_rng([2, index])
    height, width = (round(scale * int(generator.integers(*sides, endpoint=True))) for sides in (HEIGHT, WIDTH))
    top, left = int(generator.integers(FIELD_SIDE - height)), int(generator.integers(FIELD_SIDE - width))
    piece = fields[index % FIELDS][top : top + height, left : left + width]
    pixels = generator.uniform(90, 150) + generator.uniform(40, 65) * piece
    clipped: npt.NDArray[np.uint8] = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return clipped

"""Images made for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def save_noise(path: Path, height: int, width: int, seed: int) -> np.ndarray:
    """A lossless image of smooth noise; returns its pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")
    return np.asarray(image)

"""A file -> the uint8 pixels that evaluation would give the networks for this image, or the reason why not.

Reading and cropping are the data set writer's and the evaluation loader's (coe_dist/preparation.py). So an image gets
the very pixels it would have had in a data set written with the same max_resolution and stored raw; images stored as
JPEG there (jpeg_fraction) were compressed once more.
"""

from __future__ import annotations

from pathlib import Path

from coe_dist.prediction.files import Broken
from coe_dist.preparation import Pixels, Preparation, prepare, read_image


def decode(file: str, preparation: Preparation) -> Pixels | Broken:
    """uint8 [channels, resolution, resolution]. Never raises for what is in the file."""
    path = Path(file)
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("no such file" if not path.exists() else "not a file")
        return prepare(read_image(path, preparation.max_resolution), preparation, _resize)
    except Exception as error:  # a decoder may raise anything on damaged bytes
        reason = str(error).replace(str(path), path.name)
        return Broken(file, " ".join(f"{type(error).__name__}: {reason}".split()))


def _resize(pixels_HW3: Pixels, top: int, left: int, size: int, out_CRR: Pixels) -> None:
    """The loader's compiled kernel, six times as fast as preparation.py's own."""
    from coe_dist.data.resample import resample  # compiled when first used

    resample(pixels_HW3, top, left, size, size, 0, 0, False, out_CRR)

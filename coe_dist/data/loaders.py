"""A loader by its name in the configuration; only the chosen one's libraries are imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from coe_dist.data.batches import SplitReader
from coe_dist.errors import InputError


def check_loader(name: str) -> None:
    """Raises InputError where `name` needs a package that is not installed; imports nothing."""
    if name == "ffcv" and importlib.util.find_spec("ffcv") is None:
        raise InputError("data.loader: ffcv is not allowed, FFCV is not installed here; give torchvision")


def open_loader(name: str, beton: Path, **options: Any) -> SplitReader:
    """`ffcv` or `torchvision`; the options are SplitReader's. Both give the same samples, labels and ids, and pixels
    that differ only by the JPEG decoder's and the filter's rounding.

    Raises InputError where FFCV does not load, and what SplitReader raises.
    """
    if name == "torchvision":
        from coe_dist.data.torchvision_loader import TorchvisionLoader

        return TorchvisionLoader(beton, **options)
    try:
        from coe_dist.data.loader import SplitLoader
    except ImportError as error:
        cause = " ".join(str(error).split())
        raise InputError(
            f"data.loader: ffcv cannot be used here, FFCV does not load ({cause}); give torchvision"
        ) from error
    return SplitLoader(beton, **options)

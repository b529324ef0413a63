"""Fashion-MNIST from a folder of IDX files, Debian's package, or, as the last resort, a download."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coe_dist.data.order import permutation
from coe_dist.data.sidecar import Quarantined
from coe_dist.data.sources import Source
from coe_dist.errors import InputError
from coe_dist.seeds import derive_seed

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
VALIDATION = 5000  # images cut from the 60,000 of train

_TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


class ArraySplit:
    """Grayscale images in memory, handed out as RGB: FFCV stores three channels, side-car and loader know it is one."""

    def __init__(
        self, images_NHW: Images, labels_N: Labels, file: str = "", places_N: Sequence[int] | None = None
    ) -> None:
        """Image i is number places_N[i] of `file` (number i without places)."""
        self.images_NHW, self.labels_N = images_NHW, labels_N
        self._file, self._places_N = file, places_N
        self.quarantined: Sequence[Quarantined] = ()

    @property
    def shape(self) -> tuple[int, int] | None:
        return int(self.images_NHW.shape[1]), int(self.images_NHW.shape[2])

    @property
    def largest(self) -> int:
        return int(self.images_NHW.shape[1] * self.images_NHW.shape[2])

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> tuple[Images, int]:
        return np.repeat(self.images_NHW[index][:, :, None], 3, axis=2), int(self.labels_N[index])

    def file_of(self, index: int) -> str:
        return f"{self._file}, image {index if self._places_N is None else self._places_N[index]}"


def open_fashion_mnist(root: Path | None, *, max_resolution: int | None = None, limit: int | None = None) -> Source:
    """55,000 train, 5,000 validation (drawn from train with a fixed seed, our own rule) and 10,000 test images.

    Raises InputError when an explicit `root` lacks the four files, or a file is damaged.
    """
    if max_resolution is not None and max_resolution < 28:
        raise InputError(
            f"max_resolution: {max_resolution} is not allowed for fashion-mnist; its images have 28 pixels"
        )
    folder = find_folder(root)
    images_NHW, labels_N = _read_pair(folder, *_TRAIN)
    test_NHW, test_N = _read_pair(folder, *_TEST)
    if len(labels_N) <= VALIDATION:
        raise InputError(f"{folder}: {len(labels_N)} training images; more than {VALIDATION} are needed")
    shuffled = permutation(len(labels_N), derive_seed(0, "fashion-mnist", "validation"))
    validation, train = np.sort(shuffled[:VALIDATION])[:limit], np.sort(shuffled[VALIDATION:])[:limit]
    splits = {
        "train": ArraySplit(images_NHW[train], labels_N[train], _TRAIN[0], train.tolist()),
        "validation": ArraySplit(images_NHW[validation], labels_N[validation], _TRAIN[0], validation.tolist()),
        "test": ArraySplit(test_NHW[:limit], test_N[:limit], _TEST[0]),
    }
    pixels = splits["train"].images_NHW
    counts = np.bincount(pixels.reshape(-1), minlength=256) / pixels.size
    levels = np.arange(256) / 255
    mean = float(counts @ levels)
    std = float(np.sqrt(counts @ (levels - mean) ** 2))
    return Source("fashion-mnist", CLASSES, 1, dict(splits), (mean,), (std,), root=str(folder.resolve()))


def find_folder(root: Path | None) -> Path:
    """The folder with the four IDX files: `root` if given, else Debian's package, else a download (user's cache)."""
    if root is not None:
        for folder in (root, root / "FashionMNIST" / "raw"):
            if _complete(folder):
                return folder
        raise InputError(f"{root}: no Fashion-MNIST here; it needs {', '.join(_TRAIN + _TEST)}, plain or .gz")
    if _complete(DEBIAN_FOLDER):
        return DEBIAN_FOLDER
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coe_dist"
    return download(cache)


def download(cache: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    try:
        for train in (True, False):
            FashionMNIST(str(cache), train=train, download=True)
    except (OSError, RuntimeError) as error:
        cause = " ".join(str(error).split())
        raise InputError(
            "fashion-mnist: not found here and not downloaded; install Debian's package dataset-fashion-mnist"
            f" or give the folder of its files ({cause})"
        ) from error
    return cache / "FashionMNIST" / "raw"


def _complete(folder: Path) -> bool:
    return all(_file(folder, name) is not None for name in _TRAIN + _TEST)


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_pair(folder: Path, images: str, labels: str) -> tuple[Images, Labels]:
    images_NHW, labels_N = _read_idx(folder, images, 3), _read_idx(folder, labels, 1)
    if len(images_NHW) != len(labels_N) or images_NHW.shape[1:] != (28, 28):
        raise InputError(
            f"{folder}: {images} has shape {images_NHW.shape} for {len(labels_N)} labels; need [n,28,28] for n"
        )
    if labels_N.max(initial=0) >= len(CLASSES):
        raise InputError(
            f"{folder}/{labels}: label {labels_N.max()} is not allowed; labels are 0 to {len(CLASSES) - 1}"
        )
    return images_NHW, labels_N.astype(np.int64)


def _read_idx(folder: Path, name: str, dimensions: int) -> Images:
    path = _file(folder, name)
    if path is None:
        raise InputError(f"{folder / name}: missing")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
        data = np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions))
    except (OSError, EOFError, ValueError, zlib.error, struct.error) as error:
        raise InputError(f"{path}: damaged ({error}); fetch it again") from error
    if magic != 0x800 + dimensions or data.size != np.prod(shape, dtype=np.int64):
        raise InputError(f"{path}: not an IDX file of {dimensions} dimensions in bytes, or incomplete; fetch it again")
    return data.reshape(shape)

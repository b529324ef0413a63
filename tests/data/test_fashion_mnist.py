import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from coe_dist.data.fashion_mnist import CLASSES, find_folder, open_fashion_mnist
from coe_dist.errors import InputError


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def fake(folder: Path, suffix: str = "", train: int = 5010, label: int = 9) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("t10k", 20)):
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", np.zeros((count, 28, 28)))
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", np.arange(count) % (label + 1))
    return folder


def test_real_splits_cover_the_published_set_once() -> None:
    source = open_fashion_mnist(None)
    parts = source.splits
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [55_000, 5_000, 10_000]
    assert source.classes == CLASSES
    assert np.bincount(parts["test"].labels_N).tolist() == [1000] * 10
    together = np.bincount(parts["train"].labels_N) + np.bincount(parts["validation"].labels_N)
    assert together.tolist() == [6000] * 10
    folder = find_folder(None)
    plain = next(folder.glob("train-images*"))
    content = gzip.decompress(plain.read_bytes()) if plain.suffix == ".gz" else plain.read_bytes()
    original = np.frombuffer(content, np.uint8, offset=16).reshape(60_000, 784)
    cut = np.concatenate([parts[name].images_NHW.reshape(-1, 784) for name in ("train", "validation")])
    key = np.random.default_rng(0).integers(1, 2**31, 784)
    assert np.array_equal(np.sort(original @ key), np.sort(cut @ key))
    mean = parts["train"].images_NHW.mean() / 255
    assert source.mean == pytest.approx((mean,))
    assert source.std == pytest.approx((parts["train"].images_NHW.std() / 255,))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_explicit_folder(tmp_path: Path, suffix: str) -> None:
    source = open_fashion_mnist(fake(tmp_path / "FashionMNIST" / "raw", suffix).parents[1], limit=7)
    assert [len(split) for split in source.splits.values()] == [7, 7, 7]
    image, label = source.splits["test"][3]
    assert (image.shape, image.dtype, label) == ((28, 28, 3), np.uint8, 3)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Fashion-MNIST here"):
        open_fashion_mnist(tmp_path)
    fake(tmp_path, ".gz")
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: damaged"):
        open_fashion_mnist(tmp_path)
    images.write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\0\0\0\1" * 3))
    with pytest.raises(InputError, match="not an IDX file"):
        open_fashion_mnist(tmp_path)


def test_wrong_content_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="label 10 is not allowed"):
        open_fashion_mnist(fake(tmp_path / "a", label=10))
    with pytest.raises(InputError, match="more than 5000 are needed"):
        open_fashion_mnist(fake(tmp_path / "b", train=100))
    folder = fake(tmp_path / "c")
    write_idx(folder / "t10k-labels-idx1-ubyte", np.zeros(19))
    with pytest.raises(InputError, match="t10k-images-idx3-ubyte"):
        open_fashion_mnist(folder)
    with pytest.raises(InputError, match="max_resolution: 14"):
        open_fashion_mnist(folder, max_resolution=14)

"""Random operations against a naive numpy version and Pillow, and their parameters as a function of the sample."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from noise_images import save_noise
from PIL import Image, ImageEnhance, ImageOps

from coe_dist.config import AugmentationConfig
from coe_dist.data.augment import augmentation_key
from coe_dist.data.fashion_mnist import open_fashion_mnist
from coe_dist.data.loader import SplitLoader
from coe_dist.data.pixel_operations import GREY, KINDS, alter
from coe_dist.data.random_operations import AREA, RandomOperations, random_operations

STRENGTHS = (-1.0, -0.55, 0.0, 0.3, 0.83, 1.0)
KEY = augmentation_key(0, 0)
NO_BOX = np.zeros((1, 4), np.int64)


def picture(channels: int, tmp_path: Path, side: int = 40) -> np.ndarray:
    pixels = (save_noise(tmp_path / "noise.png", side, side, 7) * 0.7 + 20).astype(np.uint8)  # short of both ends
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[:channels])


def altered(image_CHW: np.ndarray, kind: str, strength: float) -> np.ndarray:
    images = image_CHW[None].copy()
    alter(images, np.array([[KINDS.index(kind)]]), np.array([[strength]]), NO_BOX)
    return images[0]


def naive(image_CHW: np.ndarray, kind: str, strength: float) -> np.ndarray:
    """Stated per pixel, or with Pillow where it has the operation in the same units."""
    channels, height, width = image_CHW.shape
    image = Image.fromarray(image_CHW.transpose(1, 2, 0) if channels == 3 else image_CHW[0])
    values = image_CHW.astype(float)
    if kind in ("brightness", "contrast", "saturation"):
        grey = np.asarray(image.convert("L")).astype(float)
        base: Any = {"brightness": 0.0, "contrast": np.floor(grey.mean() + 0.5), "saturation": grey}[kind]
        if channels == 1 and kind == "saturation":
            return image_CHW
        return np.floor(np.clip(base + (values - base) * (1 + 0.9 * strength), 0, 255) + 0.5).astype(np.uint8)
    if kind == "posterize":
        image = ImageOps.posterize(image, 8 - int(4 * abs(strength) + 0.5))
    elif kind == "solarize":
        image = ImageOps.solarize(image, 256 - int(192 * abs(strength) + 0.5))
    elif kind == "autocontrast":
        image = ImageOps.autocontrast(image)
    else:
        fill = GREY if channels == 1 else (GREY,) * 3
        half = height / 2  # Pillow's map takes corners as its origin
        shear, angle = 0.3 * strength, np.radians(30 * strength)
        cos, sin = np.cos(angle), np.sin(angle)
        moved = float(np.rint(0.45 * strength * height))
        matrix = {
            "identity": (1, 0, 0, 0, 1, 0),
            "shear_x": (1, shear, -shear * half, 0, 1, 0),
            "shear_y": (1, 0, 0, shear, 1, -shear * half),
            "translate_x": (1, 0, moved, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, moved),
            "rotate": (cos, sin, half - cos * half - sin * half, -sin, cos, half + sin * half - cos * half),
        }[kind]
        image = image.transform((width, height), Image.Transform.AFFINE, matrix, fillcolor=fill)
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_equals_its_naive_version(kind: str, channels: int, tmp_path: Path) -> None:
    image = picture(channels, tmp_path)
    for strength in STRENGTHS:
        got, wanted = altered(image, kind, strength), naive(image, kind, strength)
        difference = np.abs(got.astype(int) - wanted)
        if kind in ("shear_x", "shear_y", "rotate"):  # a pixel on the edge of two goes either way
            assert (difference > 0).mean() < 0.01, strength
        else:
            assert difference.max() <= (1 if kind == "autocontrast" else 0), strength
        if abs(strength) == 1.0 and kind != "identity" and not (kind == "saturation" and channels == 1):
            assert (got != image).mean() > 0.05, "it does something"


@pytest.mark.parametrize(("kind", "enhancer"), [("brightness", "Brightness"), ("saturation", "Color")])
def test_blends_are_pillows(kind: str, enhancer: str, tmp_path: Path) -> None:
    image = picture(3, tmp_path)
    for strength in STRENGTHS:
        enhance = getattr(ImageEnhance, enhancer)(Image.fromarray(image.transpose(1, 2, 0)))
        wanted = np.asarray(enhance.enhance(1 + 0.9 * strength)).transpose(2, 0, 1)
        assert np.abs(altered(image, kind, strength).astype(int) - wanted).max() <= 1


def test_operations_follow_one_another_and_the_box_comes_last(tmp_path: Path) -> None:
    image = picture(3, tmp_path)
    box = np.array([[3, 5, 10, 7]])
    kinds = ["rotate", "solarize", "translate_x"]
    images = image[None].copy()
    alter(images, np.array([[KINDS.index(kind) for kind in kinds]]), np.array([[0.4, -0.6, 0.2]]), box)
    step = altered(altered(altered(image, "rotate", 0.4), "solarize", -0.6), "translate_x", 0.2)
    step[:, 3:13, 5:12] = GREY
    assert np.array_equal(images[0], step)


def test_parameters_belong_to_the_sample_and_fill_their_ranges() -> None:
    augmentation = AugmentationConfig(operations=5, magnitude=8.0, erase=0.25)
    ids = np.arange(4000)
    whole = random_operations(augmentation, KEY, ids, 50)
    some = np.array([7, 3999, 12, 7])
    part = random_operations(augmentation, KEY, some, 50)
    assert all(np.array_equal(a[some], b) for a, b in zip(whole, part, strict=True))
    fewer = random_operations(AugmentationConfig(operations=2, magnitude=8.0), KEY, ids, 50)
    assert np.array_equal(fewer.kinds_BO, whole.kinds_BO[:, :2])
    for kinds in whole.kinds_BO.T:
        counts = np.bincount(kinds, minlength=len(KINDS))
        assert len(counts) == len(KINDS)
        assert np.abs(counts - 4000 / len(KINDS)).max() < 80
    for number in range(5):
        strengths = whole.strengths_BO[:, number]
        assert 0.78 < strengths.max() < 0.8
        assert -0.8 < strengths.min() < -0.78
        assert abs(strengths.mean()) < 0.03
        assert abs(np.corrcoef(whole.kinds_BO[:, number], strengths)[0, 1]) < 0.06
    top, left, height, width = whole.boxes_B4[whole.boxes_B4[:, 2] > 0].T
    assert abs(len(top) / 4000 - 0.25) < 0.03
    assert ((top >= 0) & (left >= 0) & (top + height <= 50) & (left + width <= 50)).all()
    share = height * width / 2500
    assert share.min() > AREA[0] * 0.7
    assert share.max() < AREA[1] * 1.1
    assert share.std() > 0.03
    assert not whole.boxes_B4[whole.boxes_B4[:, 2] == 0].any()
    assert not fewer.boxes_B4.any()


def loaded(beton: Path, rank: int = 0, world: int = 1, **options: Any) -> dict[int, np.ndarray]:
    augmentation = AugmentationConfig(flip=False, shift=0, operations=2, magnitude=9.0, erase=0.5)
    defaults = {"global_batch": 32, "resolution": 28, "seed": 5, "train": True, "augmentation": augmentation}
    loader = SplitLoader(beton, rank=rank, world_size=world, **{**defaults, **options})
    images = {
        int(i): image.numpy() for batch in loader.epoch(1) for i, image in zip(*reversed(batch[::2]), strict=True)
    }
    loader.close()
    return images


def test_the_loader_applies_them_whatever_the_ranks_and_threads(fashion: Path) -> None:
    seen = loaded(fashion / "train.beton")
    split: Any = open_fashion_mnist(None, limit=len(seen)).splits["train"]
    expected = split.images_NHW[:, None].copy()
    augmentation = AugmentationConfig(operations=2, magnitude=9.0, erase=0.5)
    chosen: RandomOperations = random_operations(augmentation, augmentation_key(5, 1), np.arange(len(seen)), 28)
    alter(expected, *chosen)
    assert all(np.array_equal(seen[i], expected[i]) for i in seen)
    assert sum(np.array_equal(seen[i][0], split.images_NHW[i]) for i in seen) < len(seen) / 4
    others = [loaded(fashion / "train.beton", rank, 3, threads=2, global_batch=20) for rank in range(3)]
    together = {i: image for part in others for i, image in part.items()}
    assert together.keys() == seen.keys()
    assert all(np.array_equal(together[i], seen[i]) for i in seen)


def test_evaluation_is_left_alone(fashion: Path) -> None:
    split: Any = open_fashion_mnist(None, limit=50).splits["test"]
    seen = loaded(fashion / "test.beton", train=False, limit=50)
    assert all(np.array_equal(image[0], split.images_NHW[i]) for i, image in seen.items())

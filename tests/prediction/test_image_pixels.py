"""A file gets the pixels that the evaluation loader would give the networks for it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import batches_of

from coe_dist.data.beton import write_dataset
from coe_dist.data.fashion_mnist import open_fashion_mnist
from coe_dist.data.sidecar import read_sidecar
from coe_dist.prediction.decode import decode
from coe_dist.prediction.files import Broken
from coe_dist.preparation import Preparation


def save(path: Path, height: int, width: int, seed: int) -> None:
    """A lossless image of smooth noise."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path, format="PNG")


def tree_of(root: Path, sizes: list[tuple[int, int]]) -> Path:
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            for i, (height, width) in enumerate(sizes):
                save(root / split / name / f"{i}.png", height, width, 100 * label + i + (50 if split == "val" else 0))
    return root


def loaded(beton: Path, resolution: int) -> list[bytes]:
    images = torch.cat([batch.images_BCHW for batch in batches_of(beton, resolution, 8)])
    return [image.numpy().tobytes() for image in images]


@pytest.mark.parametrize(
    ("sizes", "max_resolution"),
    [
        ([(40, 71), (71, 40), (64, 64), (32, 32), (9, 200), (200, 150), (12, 12), (37, 36)], None),
        ([(40, 71), (71, 40), (64, 64), (32, 32), (9, 200), (200, 150)], 60),
        ([(32, 32)] * 3, None),
        ([(48, 48)] * 3, None),
    ],
    ids=["mixed", "reduced by the writer", "as they are", "one other size"],
)
def test_pixels_are_those_of_the_evaluation_loader(
    sizes: list[tuple[int, int]], max_resolution: int | None, tmp_path: Path
) -> None:
    root = tree_of(tmp_path / "tree", sizes)
    write_dataset("imagefolder", tmp_path / "data", root=root, max_resolution=max_resolution)
    info = read_sidecar(tmp_path / "data" / "test.beton")
    preparation = Preparation(3, 32, crop_all=info.shape != (32, 32), max_resolution=max_resolution)
    mine = [decode(str(file), preparation) for file in sorted((root / "val").rglob("*.png"))]
    assert all(not isinstance(pixels, Broken) and pixels.shape == (3, 32, 32) for pixels in mine)
    expected = loaded(tmp_path / "data" / "test.beton", 32)
    assert len(set(expected)) == len(expected) > 4
    assert sorted(pixels.tobytes() for pixels in mine if not isinstance(pixels, Broken)) == sorted(expected)


@pytest.mark.parametrize("resolution", [28, 20])
def test_gray_files_for_networks_of_one_channel(resolution: int, tmp_path: Path) -> None:
    write_dataset("fashion-mnist", tmp_path / "data", limit=20)
    split = open_fashion_mnist(None, limit=20).splits["test"]
    mine = []
    for number in range(20):
        pixels_HWC, _ = split[number]
        Image.fromarray(pixels_HWC[:, :, 0]).save(tmp_path / f"{number}.png")
        pixels = decode(str(tmp_path / f"{number}.png"), Preparation(1, resolution))
        assert not isinstance(pixels, Broken)
        assert pixels.shape == (1, resolution, resolution)
        mine.append(pixels.tobytes())
    assert mine == loaded(tmp_path / "data" / "test.beton", resolution)


def test_colours_become_luma_for_networks_of_one_channel(tmp_path: Path) -> None:
    for colour, luma in (((255, 0, 0), 76), ((0, 255, 0), 150), ((0, 0, 255), 29), ((90, 90, 90), 90)):
        Image.new("RGB", (28, 28), colour).save(tmp_path / "flat.png")
        pixels = decode(str(tmp_path / "flat.png"), Preparation(1, 28))
        assert not isinstance(pixels, Broken)
        assert np.unique(pixels).tolist() == [luma]


def test_an_image_of_the_networks_size_is_whole_unless_the_data_set_has_several_sizes(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 32, 32, 1)
    whole = np.asarray(Image.open(tmp_path / "a.png")).transpose(2, 0, 1)
    assert np.array_equal(decode(str(tmp_path / "a.png"), Preparation(3, 32)), whole)
    assert not np.array_equal(decode(str(tmp_path / "a.png"), Preparation(3, 32, crop_all=True)), whole)


def test_what_cannot_be_read_has_a_reason_and_never_hangs(tmp_path: Path) -> None:
    save(tmp_path / "whole.png", 40, 40, 1)
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("404\nnot found")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("nowhere.png")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    for name in ("cut.png", "text.png", "pipe.png", "link.png", "float.tif"):
        found = decode(str(tmp_path / name), Preparation(3, 32))
        assert isinstance(found, Broken), name
        assert found.file == str(tmp_path / name)
        assert "\n" not in found.reason
        assert str(tmp_path) not in found.reason

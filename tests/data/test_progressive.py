"""Smaller images in early epochs: the schedule, and that a loader keeps to it for any share and any step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coe_dist.config import AugmentationConfig, ProgressiveConfig
from coe_dist.data.beton import write_dataset
from coe_dist.data.fashion_mnist import open_fashion_mnist
from coe_dist.data.loader import SplitLoader
from coe_dist.data.loaders import open_loader
from coe_dist.data.order import share
from coe_dist.data.progressive import resolution_of

RAMP = ProgressiveConfig(start=20, from_epoch=1, until_epoch=3)
PLAIN = AugmentationConfig(flip=False, shift=0)


def test_the_schedule_by_hand() -> None:
    ramp = ProgressiveConfig(start=128, from_epoch=2, until_epoch=6)
    assert [resolution_of(epoch, 176, ramp) for epoch in range(8)] == [128, 128, 128, 144, 160, 160, 176, 176]
    assert [resolution_of(epoch, 28, RAMP) for epoch in range(5)] == [20, 20, 28, 28, 28]
    assert resolution_of(0, 28, None) == 28


@given(st.integers(8, 300), st.integers(1, 300), st.integers(0, 40), st.integers(1, 40))
def test_the_schedule_never_falls_and_keeps_its_ends(start: int, more: int, first: int, length: int) -> None:
    ramp = ProgressiveConfig(start=start, from_epoch=first, until_epoch=first + length)
    sides = [resolution_of(epoch, start + more, ramp) for epoch in range(first + length + 2)]
    assert sides == sorted(sides)
    assert sides[: first + 1] == [start] * (first + 1)
    assert sides[-2:] == [start + more] * 2


def make(beton: Path, rank: int = 0, world: int = 1, **options: Any) -> SplitLoader:
    defaults = {"resolution": 28, "augmentation": PLAIN, "train": True, "progressive": RAMP}
    return SplitLoader(beton, global_batch=32, rank=rank, world_size=world, seed=5, **{**defaults, **options})


def test_images_grow_between_epochs_and_resume_in_the_middle(fashion: Path) -> None:
    loader = make(fashion / "train.beton")
    for epoch, side in ((0, 20), (3, 28), (1, 20)):  # there and back: one loader serves all
        whole = list(loader.epoch(epoch))
        assert {batch.images_BCHW.shape[1:] for batch in whole} == {(1, side, side)}
        parts = [make(fashion / "train.beton", rank, 3) for rank in range(3)]
        rest = [list(part.epoch(epoch, start_step=4)) for part in parts]
        for step, batch in enumerate(whole[4:]):
            for rank in range(3):
                rows = slice(*share(len(batch.ids_B), rank, 3))
                assert torch.equal(rest[rank][step].images_BCHW, batch.images_BCHW[rows])
        for part in parts:
            part.close()
    loader.close()


def test_a_rank_without_rows_has_the_shape_of_the_others(fashion: Path) -> None:
    loader = make(fashion / "train.beton", 3, 4, limit=34)  # the last batch has 2 images
    assert [tuple(batch.images_BCHW.shape) for batch in loader.epoch(0)] == [(8, 1, 20, 20), (0, 1, 20, 20)]
    loader.close()


def test_a_smaller_image_is_the_whole_image_resized(fashion: Path) -> None:
    split: Any = open_fashion_mnist(None, limit=50).splits["train"]
    loader = make(fashion / "train.beton", limit=50)
    seen = {int(i): image for batch in loader.epoch(0) for i, image in zip(batch.ids_B, batch.images_BCHW, strict=True)}
    for i, image in seen.items():
        whole = np.asarray(Image.fromarray(split.images_NHW[i]).resize((20, 20), Image.Resampling.BILINEAR), dtype=int)
        assert np.abs(image[0].numpy() - whole).max() <= 1, i
    loader.close()


def test_random_crops_do_not_depend_on_the_size(image_tree: Path, tmp_path: Path) -> None:
    write_dataset("imagefolder", tmp_path, root=image_tree)
    crops = AugmentationConfig(flip=True, shift=0, random_resized_crop=True)
    small = make(tmp_path / "train.beton", augmentation=crops, resolution=64)
    large = make(tmp_path / "train.beton", augmentation=crops, resolution=64, progressive=None)
    (one,), (other,) = small.epoch(0), large.epoch(0)
    assert one.images_BCHW.shape[2:] == (20, 20)
    assert other.images_BCHW.shape[2:] == (64, 64)
    shrunk = torch.nn.functional.interpolate(other.images_BCHW.float(), (20, 20), mode="area")
    distance = (one.images_BCHW.float() - shrunk).abs().mean((1, 2, 3))
    strangers = (one.images_BCHW.float() - shrunk.roll(1, 0)).abs().mean((1, 2, 3))
    assert float(distance.max()) < 0.5 * float(strangers.min())
    small.close()
    large.close()


def test_the_torchvision_loader_keeps_to_it_too(fashion: Path) -> None:
    operations = AugmentationConfig(flip=True, shift=2, operations=2, erase=0.5)
    for epoch, augmentation, most in ((0, PLAIN, 1), (3, operations, 0)):  # resized; not resized but altered
        pair = [
            open_loader(
                name,
                fashion / "train.beton",
                global_batch=32,
                rank=2,
                world_size=3,
                resolution=28,
                seed=5,
                train=True,
                augmentation=augmentation,
                progressive=RAMP,
                limit=65,  # the last batch has one image, which is another rank's
            )
            for name in ("ffcv", "torchvision")
        ]
        batches = [list(loader.epoch(epoch)) for loader in pair]
        assert [len(batch.ids_B) for batch in batches[1]] == [10, 10, 0]
        for one, other in zip(*batches, strict=True):
            assert one.images_BCHW.shape == other.images_BCHW.shape
            difference = (one.images_BCHW.int() - other.images_BCHW.int()).abs()
            assert int(difference.max() if difference.numel() else 0) <= most
        for loader in pair:
            loader.close()


def test_evaluation_is_always_at_the_full_size(fashion: Path) -> None:
    loader = make(fashion / "test.beton", train=False)
    assert {batch.images_BCHW.shape[2:] for batch in loader.epoch(0)} == {(28, 28)}
    with pytest.raises(ValueError, match="start_step"):
        loader.epoch(0, start_step=99)
    loader.close()

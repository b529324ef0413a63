"""Both loaders side by side on the same files: equal samples, labels and ids, and near-equal pixels.

Tolerance: both filters round to within one level of the same sum. The JPEG decoders differ (FFCV's asks for the fast
transform), by a few levels on natural edges.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coe_dist.config import AugmentationConfig
from coe_dist.data.batches import Batch
from coe_dist.data.beton import write_dataset
from coe_dist.data.loaders import check_loader, open_loader
from coe_dist.errors import InputError, TrainingError

CROPS = AugmentationConfig(random_resized_crop=True, shift=2)
RAW_LEVELS, JPEG_LEVELS, JPEG_MEAN = 1, 12, 1.0


def read(kind: str, beton: Path, epoch: int = 0, start_step: int = 0, **options: Any) -> list[Batch]:
    defaults = {"global_batch": 8, "rank": 0, "world_size": 1, "resolution": 32, "seed": 3, "train": True}
    loader = open_loader(kind, beton, **{**defaults, "augmentation": CROPS, **options})
    batches = list(loader.epoch(epoch, start_step=start_step))
    loader.close()
    return batches


def assert_same_samples(ours: list[Batch], theirs: list[Batch]) -> np.ndarray:
    """The absolute differences of all pixels."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.ids_B, other.ids_B)
        assert torch.equal(one.labels_B, other.labels_B)
        assert one.images_BCHW.shape == other.images_BCHW.shape
        assert all(a.dtype == b.dtype for a, b in zip(one, other, strict=True))
        assert other.images_BCHW.is_contiguous()
    pixels = [torch.cat([batch.images_BCHW for batch in batches]).numpy().astype(int) for batches in (ours, theirs)]
    return np.abs(pixels[0] - pixels[1])


@pytest.mark.parametrize("options", [{"train": False}, {}, {"threads": 2, "global_batch": 3}, {"limit": 9}])
def test_raw_images_of_any_size(image_tree: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    write_dataset("imagefolder", tmp_path, root=image_tree)
    beton = tmp_path / "train.beton"
    different = assert_same_samples(
        read("ffcv", beton, epoch=1, **options), read("torchvision", beton, epoch=1, **options)
    )
    assert different.max() <= RAW_LEVELS


def test_stored_jpegs(image_tree: Path, tmp_path: Path) -> None:
    write_dataset("imagefolder", tmp_path, root=image_tree, jpeg_fraction=1.0)
    different = assert_same_samples(*(read(kind, tmp_path / "train.beton") for kind in ("ffcv", "torchvision")))
    assert different.max() <= JPEG_LEVELS
    assert different.mean() <= JPEG_MEAN


def test_gray_images_of_one_size_are_equal_to_the_byte(fashion: Path) -> None:
    options = {"resolution": 28, "augmentation": AugmentationConfig(shift=3), "global_batch": 32}
    beton = fashion / "train.beton"
    assert assert_same_samples(*(read(kind, beton, 2, 1, **options) for kind in ("ffcv", "torchvision"))).max() == 0
    for rank in range(3):  # an empty share of the last batch included
        split = {**options, "rank": rank, "world_size": 3, "global_batch": 101}
        assert assert_same_samples(*(read(kind, beton, **split) for kind in ("ffcv", "torchvision"))).max() == 0


def test_starting_an_epoch_ends_the_one_before_and_damage_surfaces(image_tree: Path, tmp_path: Path) -> None:
    write_dataset("imagefolder", tmp_path, root=image_tree, jpeg_fraction=1.0)
    beton = tmp_path / "train.beton"
    options = {"global_batch": 4, "rank": 0, "world_size": 1, "resolution": 32, "seed": 0, "train": True}
    loader = open_loader("torchvision", beton, **options, augmentation=CROPS)
    old = loader.epoch(0)
    next(old)
    assert len(list(loader.epoch(1))) == loader.steps_per_epoch
    with pytest.raises(RuntimeError, match="epoch 0 was ended"):
        next(old)
    loader.close()
    content = bytearray(beton.read_bytes())
    start = content.index(b"\xff\xd8\xff")
    content[start : start + 200] = bytes(200)
    beton.write_bytes(content)
    with pytest.raises(TrainingError, match=r"image \d+: its JPEG is damaged"):
        read("torchvision", beton)


def test_it_works_where_ffcv_does_not_load(fashion: Path) -> None:
    program = f"""
import sys
sys.modules["ffcv"] = None
from coe_dist.data.loaders import check_loader, open_loader
from coe_dist.errors import InputError
options = dict(global_batch=50, rank=0, world_size=1, resolution=28, seed=0, train=True, augmentation=None)
loader = open_loader("torchvision", {str(fashion / "train.beton")!r}, **options)
print(sum(len(batch.ids_B) for batch in loader.epoch(0)))
loader.close()
try:
    open_loader("ffcv", {str(fashion / "train.beton")!r}, **options)
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, refused = done.stdout.splitlines()
    assert count == "203"
    assert "data.loader: ffcv cannot be used here" in refused
    assert refused.endswith("give torchvision")


def test_labels_outside_the_classes_are_refused(fashion: Path, tmp_path: Path) -> None:
    text = (fashion / "train.json").read_text()
    (tmp_path / "train.beton").write_bytes((fashion / "train.beton").read_bytes())
    (tmp_path / "train.json").write_text(text)
    content = json.loads(text)
    counts = content["counts_per_class"]
    content["counts_per_class"], content["classes"] = [*counts[:8], sum(counts[8:])], content["classes"][:9]
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"label 9 of image \d+ is not allowed; the side-car names 9 classes"):
        read("torchvision", tmp_path / "train.beton")


def test_a_missing_package_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_loader("torchvision")
    with pytest.raises(InputError, match=r"data\.loader: ffcv is not allowed, FFCV is not installed here"):
        check_loader("ffcv")

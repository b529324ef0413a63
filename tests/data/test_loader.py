import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coe_dist.config import AugmentationConfig
from coe_dist.data.augment import augmentation_key, placements
from coe_dist.data.batches import Batch
from coe_dist.data.beton import write_dataset
from coe_dist.data.decode import LabelDecoder
from coe_dist.data.fashion_mnist import open_fashion_mnist
from coe_dist.data.imagefolder import open_imagefolder
from coe_dist.data.loader import SplitLoader
from coe_dist.data.order import epoch_order
from coe_dist.errors import InputError, TrainingError

COUNT = 203
AUGMENTATION = AugmentationConfig(shift=3)


def make(beton: Path, rank: int = 0, world: int = 1, **options: Any) -> SplitLoader:
    defaults = {"global_batch": 32, "resolution": 28, "seed": 5, "train": True, "augmentation": AUGMENTATION}
    return SplitLoader(beton, rank=rank, world_size=world, **{**defaults, **options})


def read(loader: SplitLoader, epoch: int = 0, start_step: int = 0) -> list[Batch]:
    batches = list(loader.epoch(epoch, start_step=start_step))
    loader.close()
    return batches


def by_id(batches: list[Batch]) -> dict[int, np.ndarray]:
    return {int(i): image.numpy() for batch in batches for i, image in zip(batch.ids_B, batch.images_BCHW, strict=True)}


def original() -> tuple[np.ndarray, np.ndarray]:
    split = open_fashion_mnist(None, limit=COUNT).splits["train"]
    return split.images_NHW, split.labels_N  # type: ignore[attr-defined]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("batch", [7, 32, 203, 500])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_ranks_together_are_the_global_batches(fashion: Path, world: int, batch: int, train: bool) -> None:
    ranks = [read(make(fashion / "train.beton", r, world, global_batch=batch, train=train), 2) for r in range(world)]
    order = epoch_order(COUNT, 5, 2, shuffle=train)
    steps = -(-COUNT // batch)
    assert [len(batches) for batches in ranks] == [steps] * world
    for step in range(steps):
        together = torch.cat([batches[step].ids_B for batches in ranks])
        assert together.tolist() == order[step * batch : (step + 1) * batch].tolist()
        for batches in ranks:
            rows = len(batches[step].ids_B)
            assert batches[step].images_BCHW.shape == (rows, 1, 28, 28)
            assert batches[step].labels_B.shape == (rows,)
            assert batches[step].labels_B.dtype == batches[step].ids_B.dtype == torch.int64
            assert batches[step].images_BCHW.dtype == torch.uint8
            assert batches[step].images_BCHW.is_contiguous()


def test_evaluation_gives_the_stored_pixels(fashion: Path) -> None:
    images, labels = original()
    batches = read(make(fashion / "train.beton", train=False))
    assert np.array_equal(torch.cat([b.images_BCHW for b in batches]).numpy()[:, 0], images)
    assert torch.cat([b.labels_B for b in batches]).tolist() == labels.tolist()


def test_training_pixels_equal_a_naive_augmentation(fashion: Path) -> None:
    images, labels = original()
    found = read(make(fashion / "train.beton"), epoch=3)
    seen = by_id(found)
    place = placements(AUGMENTATION, augmentation_key(5, 3), np.arange(COUNT))
    for i in range(COUNT):
        padded = np.pad(images[i], 3)
        top, left = 3 - place.down_B[i], 3 - place.right_B[i]
        moved = padded[top : top + 28, left : left + 28]
        if place.flip_B[i]:
            padded = np.pad(images[i], 3)
            moved = padded[top : top + 28, left : left + 28][:, ::-1]
        assert np.array_equal(seen[i][0], moved), i
    for batch in found:
        assert batch.labels_B.tolist() == labels[batch.ids_B.numpy()].tolist()


def test_augmented_pixels_depend_on_the_sample_alone(fashion: Path) -> None:
    beton = fashion / "train.beton"
    whole = by_id(read(make(beton), epoch=1))
    for world, batch, threads in ((3, 20, 1), (2, 64, 2)):
        parts = [b for r in range(world) for b in read(make(beton, r, world, global_batch=batch, threads=threads), 1)]
        other = by_id(parts)
        assert other.keys() == whole.keys()
        assert all(np.array_equal(other[i], whole[i]) for i in whole)
    later = by_id(read(make(beton), epoch=2))
    assert sum(np.array_equal(later[i], whole[i]) for i in whole) < 20


def test_epochs_repeat_and_resume_in_the_middle(fashion: Path) -> None:
    loader = make(fashion / "train.beton", 1, 2)
    first = list(loader.epoch(4))
    list(loader.epoch(5))
    for start in (0, 1, 5, loader.steps_per_epoch):
        again = list(loader.epoch(4, start_step=start))
        assert len(again) == loader.steps_per_epoch - start
        for a, b in zip(first[start:], again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    loader.close()
    # another number of ranks goes on at the same place
    ranks = [read(make(fashion / "train.beton", r, 3), 4, start_step=3) for r in range(3)]
    ids = [int(i) for step in zip(*ranks, strict=True) for batch in step for i in batch.ids_B]
    assert ids == epoch_order(COUNT, 5, 4, shuffle=True)[3 * 32 :].tolist()
    with pytest.raises(ValueError, match="start_step"):
        loader.epoch(0, start_step=8)


def test_limit_uses_the_first_images(fashion: Path) -> None:
    batches = read(make(fashion / "train.beton", limit=50, global_batch=16))
    assert sorted(by_id(batches)) == list(range(50))
    assert len(batches) == 4


def test_batches_own_their_memory(fashion: Path) -> None:
    loader = make(fashion / "train.beton", global_batch=4)
    kept, copies = [], []
    for batch in loader.epoch(0):
        kept.append(batch)
        copies.append(batch.images_BCHW.clone())
    assert all(torch.equal(batch.images_BCHW, copy) for batch, copy in zip(kept, copies, strict=True))
    loader.close()


def reading_threads() -> int:
    return sum(type(thread).__name__ == "EpochIterator" for thread in threading.enumerate())


def test_break_and_restart_leave_no_thread_behind(fashion: Path) -> None:
    before = reading_threads()
    loader = make(fashion / "train.beton", global_batch=2)
    for _ in loader.epoch(0):
        break
    assert reading_threads() == before
    old = loader.epoch(0)
    next(old)
    assert len(list(loader.epoch(1))) == loader.steps_per_epoch
    with pytest.raises(RuntimeError, match="epoch 0 was ended"):
        next(old)
    loader.close()
    assert reading_threads() == before


def test_torch_keeps_its_threads(fashion: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        loader = make(fashion / "train.beton", threads=2)
        for _ in loader.epoch(0):
            assert torch.get_num_threads() == 3
        loader.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_two_loaders_at_once(fashion: Path) -> None:
    one, two = make(fashion / "train.beton", threads=2), make(fashion / "test.beton", train=False, threads=2)
    pairs = list(zip(one.epoch(0), two.epoch(0), strict=True))
    assert sum(len(a.ids_B) for a, _ in pairs) == sum(len(b.ids_B) for _, b in pairs) == COUNT
    one.close()
    two.close()


def test_a_failing_operation_surfaces(fashion: Path) -> None:
    loader = make(fashion / "train.beton")
    loader._decoder._augmentation = object()  # type: ignore[assignment]
    with pytest.raises(TrainingError, match="AttributeError") as error:
        list(loader.epoch(0))
    assert isinstance(error.value.__cause__, AttributeError)
    loader._decoder._augmentation = AUGMENTATION
    assert len(list(loader.epoch(0))) == loader.steps_per_epoch
    loader.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_reading_thread_surfaces(fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: LabelDecoder) -> Any:
        def decode(ids_B: Any, memory: Any, metadata: Any, storage_state: Any) -> Any:
            raise RuntimeError("no labels")

        return decode

    monkeypatch.setattr(LabelDecoder, "generate_code", broken)
    with pytest.raises(TrainingError, match="its thread ended early"):
        list(make(fashion / "train.beton").epoch(0))


def test_labels_outside_the_classes_are_refused(fashion: Path, tmp_path: Path) -> None:
    shutil.copytree(fashion, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "train.json").read_text())
    content["counts_per_class"] = [*content["counts_per_class"][:8], sum(content["counts_per_class"][8:])]
    content["classes"] = content["classes"][:9]
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"label 9 of image \d+ is not allowed; the side-car names 9 classes"):
        make(tmp_path / "train.beton")


@pytest.fixture(scope="module")
def varied(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("varied")
    write_dataset("imagefolder", folder, root=image_tree)
    return folder


def test_images_of_varying_size_are_cropped_to_the_centre(varied: Path, image_tree: Path) -> None:
    source = open_imagefolder(image_tree).splits["train"]
    options = {"global_batch": 5, "augmentation": None, "train": False}
    seen = by_id(read(make(varied / "train.beton", resolution=35, **options)))
    compared = 0
    for i in range(len(source)):
        image = source[i][0]
        side = int(min(image.shape[:2]) * 224 / 256)
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        crop = image[top : top + side, left : left + side]
        assert seen[i].shape == (3, 35, 35)
        if side == 35:  # no resizing needed: exact
            assert np.array_equal(seen[i].transpose(1, 2, 0), crop)
            compared += 1
        else:
            assert abs(seen[i].mean() - crop.mean()) < 4
    assert compared > 0


def test_random_crops_of_varying_size_depend_on_the_sample_alone(varied: Path) -> None:
    options = {"augmentation": AugmentationConfig(random_resized_crop=True, shift=0), "resolution": 32}
    whole = by_id(read(make(varied / "train.beton", global_batch=22, **options)))
    parts = [
        b for r in range(3) for b in read(make(varied / "train.beton", r, 3, global_batch=7, threads=2, **options))
    ]
    other = by_id(parts)
    assert other.keys() == whole.keys()
    assert all(np.array_equal(other[i], whole[i]) for i in whole)
    later = by_id(read(make(varied / "train.beton", global_batch=22, **options), epoch=1))
    assert not any(np.array_equal(later[i], whole[i]) for i in whole)


def test_a_damaged_stored_jpeg_surfaces(image_tree: Path, tmp_path: Path) -> None:
    write_dataset("imagefolder", tmp_path, root=image_tree, jpeg_fraction=1.0)
    beton = tmp_path / "train.beton"
    content = bytearray(beton.read_bytes())
    start = content.index(b"\xff\xd8\xff")
    content[start : start + 200] = bytes(200)
    beton.write_bytes(content)
    loader = make(beton, resolution=32, train=False)
    with pytest.raises(TrainingError, match="damaged"):
        list(loader.epoch(0))
    loader.close()

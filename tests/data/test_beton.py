import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import batches_of

from coe_dist.data.beton import write_dataset
from coe_dist.data.fashion_mnist import ArraySplit, open_fashion_mnist
from coe_dist.data.loader import SplitLoader
from coe_dist.data.sidecar import read_sidecar, sha256_of
from coe_dist.data.writer import WriterError, write_beton
from coe_dist.errors import InputError

COUNT = 203


def test_sidecars_describe_the_files(fashion: Path) -> None:
    for split, info in ((name, read_sidecar(fashion / f"{name}.beton", verify=True)) for name in ("train", "test")):
        assert (info.split, info.source, info.channels, info.shape) == (split, "fashion-mnist", 1, (28, 28))
        assert info.count == COUNT == sum(info.counts_per_class)
        assert info.sha256 == sha256_of(fashion / f"{split}.beton")
    assert sorted(path.name for path in fashion.iterdir() if not path.name.startswith(".")) == sorted(
        f"{split}.{kind}" for split in ("train", "validation", "test") for kind in ("beton", "json", "samples.tsv")
    )
    content = json.loads((fashion / "train.json").read_text())
    assert content["format"] == 1
    assert content["classes"][9] == "Ankle boot"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.glob("*.beton")}


def test_what_is_there_is_kept_and_what_is_missing_written_identically(fashion: Path, tmp_path: Path) -> None:
    shutil.copytree(fashion, tmp_path, dirs_exist_ok=True)
    (tmp_path / "test.beton").unlink()
    report = write_dataset("fashion-mnist", tmp_path, limit=COUNT)
    assert [part["status"] for part in report["splits"].values()] == ["already there", "already there", "written"]
    assert digests(tmp_path) == digests(fashion)
    with pytest.raises(InputError, match="limit=203"):
        write_dataset("fashion-mnist", tmp_path, limit=50)
    with pytest.raises(InputError, match="source fashion-mnist, not imagefolder"):
        write_dataset("imagefolder", tmp_path, root=tmp_path, limit=COUNT)
    write_dataset("fashion-mnist", tmp_path, limit=50, overwrite=True)
    assert read_sidecar(tmp_path / "train.beton", verify=True).count == 50


@pytest.mark.parametrize(
    "arguments",
    [
        {"source": "cifar"},
        {"jpeg_fraction": 1.5},
        {"jpeg_quality": 0},
        {"workers": 0},
        {"max_bad": -1},
        {"limit": 0},
        {"max_resolution": 2},
        {"source": "imagefolder"},
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(reversed(arguments)) if len(arguments) == 1 else "") as error:
        write_dataset(**{"source": "fashion-mnist", "out": tmp_path, **arguments})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        write_dataset("fashion-mnist", tmp_path / "file" / "out", limit=5)


def test_odd_and_bad_images_of_a_tree(image_tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    shutil.copytree(image_tree, root)
    Image.new("CMYK", (50, 60), (0, 255, 255, 0)).save(root / "train" / "bee" / "cmyk.JPEG", format="JPEG")
    Image.fromarray(np.full((50, 50), 65535, np.uint16)).save(root / "train" / "bee" / "deep.png")
    for name, content in (("text.jpg", b"not an image"), ("empty.jpg", b"")):
        (root / "train" / "ant" / name).write_bytes(content)
    cut = (root / "train" / "ant" / "3.png").read_bytes()
    (root / "train" / "ant" / "cut.png").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(InputError, match="max_bad: 2 is less than the 3"):
        write_dataset("imagefolder", tmp_path / "out", root=root, max_bad=2)
    assert not (tmp_path / "out").exists()
    report = write_dataset("imagefolder", tmp_path / "out", root=root, workers=2, max_resolution=64)
    assert sum(part["quarantined"] for part in report["splits"].values()) == 3
    info = read_sidecar(tmp_path / "out" / "train.beton")
    listed = [item.file for split in ("train", "validation") for item in
              read_sidecar(tmp_path / "out" / f"{split}.beton").quarantined]  # fmt: skip
    assert sorted(listed) == ["train/ant/cut.png", "train/ant/empty.jpg", "train/ant/text.jpg"]
    assert (info.channels, info.shape, len(info.mean)) == (3, None, 3)


class Failing(ArraySplit):
    """Reading image 150 does what a subclass says."""

    def __init__(self) -> None:
        super().__init__(np.zeros((300, 28, 28), np.uint8), np.zeros(300, np.int64))

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index == 150:
            self.fail()
        return super().__getitem__(index)

    def fail(self) -> None:
        raise OSError("the disk\nis gone")


class Killed(Failing):
    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Stalled(Failing):
    def fail(self) -> None:
        time.sleep(600)


class NotRgb(Failing):
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, label = super().__getitem__(0)
        return (image[:, :, :1] if index == 150 else image), label


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Failing, "OSError: the disk is gone"),
        (Killed, "died with exit code -9"),
        (Stalled, "no progress for 2 s"),
        (NotRgb, "Invalid shape"),
    ],
)
def test_a_failing_writer_ends_in_an_error(tmp_path: Path, workers: int, kind: type[Failing], message: str) -> None:
    with pytest.raises(WriterError, match=message) as error:
        write_beton(tmp_path / "x.beton", kind(), workers=workers, stall_seconds=2.0 if kind is Stalled else 50.0)
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_nothing_that_looks_complete(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coe_dist.data import beton

    root = tmp_path / "tree"
    shutil.copytree(image_tree, root)
    out = tmp_path / "out"

    def open_then_lose_a_file(*arguments: object, **options: object) -> object:
        source = open_source(*arguments, **options)
        for file in (root / "val" / "bee").iterdir():
            file.unlink()
        return source

    open_source = beton.open_source
    monkeypatch.setattr(beton, "open_source", open_then_lose_a_file)
    with pytest.raises(WriterError, match="was readable when it was checked"):
        write_dataset("imagefolder", out, root=root)
    names = {path.name for path in out.iterdir() if not path.name.endswith(".lock")}
    assert names == {
        f"{split}.{kind}" for split in ("train", "validation") for kind in ("beton", "json", "samples.tsv")
    }


def test_damaged_files_are_named(fashion: Path, tmp_path: Path) -> None:
    shutil.copytree(fashion, tmp_path, dirs_exist_ok=True)
    beton, sidecar = tmp_path / "train.beton", tmp_path / "train.json"
    content, text = beton.read_bytes(), sidecar.read_text()

    def refused(message: str, **options: bool) -> None:
        with pytest.raises(InputError, match=message) as error:
            read_sidecar(beton, **options)
        assert "\n" not in str(error.value)

    beton.write_bytes(content[:-1])
    refused("damaged")
    with pytest.raises(InputError, match="damaged"):
        SplitLoader(beton, global_batch=4, rank=0, world_size=1, resolution=28, seed=0, train=True, augmentation=None)
    with pytest.raises(InputError, match="nothing was changed"):
        write_dataset("fashion-mnist", tmp_path, limit=COUNT)
    beton.write_bytes(b"")
    refused("damaged")
    beton.write_bytes(bytes(len(content)))
    refused("header")
    beton.write_bytes(content[:-9] + b"\1" + content[-8:])
    read_sidecar(beton)
    refused("sha256", verify=True)
    sidecar.write_text(text[:100])
    refused("not a readable side-car")
    sidecar.write_text(text.replace('"count": 203', '"count": 204'))
    refused("counts_per_class")
    sidecar.write_text(text.replace('"channels": 1', '"channels": 2'))
    refused("channels")
    sidecar.unlink()
    refused("missing")
    beton.unlink()
    refused("no such file")


def test_pixels_survive_jpeg(tmp_path: Path) -> None:
    split = open_fashion_mnist(None, limit=40).splits["test"]
    assert isinstance(split, ArraySplit)
    for fraction in (0.5, 1.0):
        out = tmp_path / str(fraction)
        write_dataset("fashion-mnist", out, limit=40, jpeg_fraction=fraction, jpeg_quality=95)
        [batch] = batches_of(out / "test.beton", 28)
        error = np.abs(batch.images_BCHW.numpy()[:, 0].astype(int) - split.images_NHW).mean((1, 2))
        assert batch.labels_B.tolist() == split.labels_N.tolist()
        assert error.max() < 12
        exact = int((error == 0).sum())
        assert exact < 3 if fraction == 1 else 8 < exact < 32

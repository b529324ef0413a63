"""One file from one folder, what lies beside it, and the ways such a call can be wrong."""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from noise_images import save_noise
from PIL import Image
from small_data import batches_of

from coe_dist.data.beton import write, write_dataset, write_file
from coe_dist.data.samples import read_samples, samples_path
from coe_dist.data.sidecar import read_sidecar
from coe_dist.data.stored import StoredImages
from coe_dist.errors import InputError


@pytest.fixture
def tree(image_tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image_tree, tmp_path / "tree"))


def status(report: dict[str, Any]) -> list[str]:
    return [part["status"] for part in report["splits"].values()]


def test_train_and_val_share_classes_and_statistics(tree: Path, tmp_path: Path) -> None:
    train, val = tmp_path / "out" / "train.beton", tmp_path / "out" / "val.beton"
    assert status(write_file(tree / "train", train, max_resolution=50, jpeg_fraction=0.5, workers=2)) == ["written"]
    assert status(write_file(tree / "val", val, max_resolution=50)) == ["written"]
    one, other = read_sidecar(train, verify=True), read_sidecar(val, verify=True)
    assert (one.split, other.split, one.count, other.count) == ("train", "validation", 24, 6)
    assert (one.classes, one.mean, one.std) == (other.classes, other.mean, other.std)
    assert one.counts_per_class == (12, 12)
    stored = StoredImages(train)
    assert max(max(stored.size(i)) for i in range(24)) == 50
    assert 0 < sum(stored.is_jpeg(i) for i in range(24)) < 24
    assert sum(len(batch.labels_B) for batch in batches_of(val, 32, 4)) == 6


def test_samples_name_the_file_each_was_made_from(tree: Path, tmp_path: Path) -> None:
    beton = tmp_path / "train.beton"
    write_file(tree / "train", beton)
    samples, stored, classes = read_samples(beton, 24), StoredImages(beton), read_sidecar(beton).classes
    assert samples is not None
    assert len({sample.file for sample in samples}) == 24
    for i, sample in enumerate(samples):
        assert np.array_equal(stored.pixels(i), np.asarray(Image.open(tree / "train" / sample.file)))
        assert Path(sample.file).parts[0] == classes[stored.labels_N[i]]
    samples_path(beton).write_text("zz\n")
    with pytest.raises(InputError, match="not a list of samples"):
        read_samples(beton, 24)


def test_what_is_complete_is_kept_and_what_differs_is_refused(tree: Path, tmp_path: Path) -> None:
    train, val = tmp_path / "train.beton", tmp_path / "val.beton"
    write_file(tree / "train", train)
    write_file(tree / "val", val)
    written = train.stat().st_mtime_ns, val.stat().st_mtime_ns
    assert status(write_file(tree / "train", train)) == status(write_file(tree / "val", val)) == ["already there"]
    assert (train.stat().st_mtime_ns, val.stat().st_mtime_ns) == written
    with pytest.raises(InputError, match=r"jpeg_fraction=1\.0"):
        write_file(tree / "train", train, jpeg_fraction=1.0)
    with pytest.raises(InputError, match=r"written with root .*train, not .*val"):
        write_file(tree / "val", train)
    assert (train.stat().st_mtime_ns, val.stat().st_mtime_ns) == written
    (tree / "train" / "ant" / "0.png").unlink()
    write_file(tree / "train", train, overwrite=True)
    with pytest.raises(InputError, match="classes and statistics are not those of the training file"):
        write_file(tree / "val", val)


def test_bad_images_are_listed_and_counted(tree: Path, tmp_path: Path) -> None:
    (tree / "train" / "ant" / "bad one.jpg").write_bytes(b"")
    (tree / "train" / "bee" / "page.JPEG").write_text("<html>404</html>")
    name = os.fsdecode(b"\xff\xfe latin.png")
    (tree / "train" / "bee" / name).write_bytes(b"\x89PNG")
    beton = tmp_path / "train.beton"
    with pytest.raises(InputError, match="max_bad: 2 is less than the 3 images that cannot be read; the first is "):
        write_file(tree / "train", beton, max_bad=2)
    assert not beton.exists()
    (part,) = write_file(tree / "train", beton, max_bad=3)["splits"].values()
    assert (part["count"], part["quarantined"]) == (24, 3)
    lines = sorted(line.split("\t") for line in Path(part["quarantine"]).read_text(encoding="utf-8").splitlines())
    assert [file for file, _ in lines] == ["ant/bad one.jpg", "bee/\\xff\\xfe latin.png", "bee/page.JPEG"]
    assert all("UnidentifiedImageError" in reason for _, reason in lines)
    for file in ("ant/bad one.jpg", "bee/page.JPEG", f"bee/{name}"):
        (tree / "train" / file).unlink()
    (part,) = write_file(tree / "train", beton, overwrite=True)["splits"].values()
    assert part["quarantine"] is None
    assert not (tmp_path / "train.quarantine.tsv").exists()


def test_names_that_are_no_text_are_written(tmp_path: Path) -> None:
    strange = os.fsdecode(b"caf\xe9 1\n2.png")
    save_noise(tmp_path / "train" / "ä ö" / strange, 9, 9, 0)
    write_file(tmp_path / "train", tmp_path / "train.beton")
    samples = read_samples(tmp_path / "train.beton", 1)
    assert samples is not None
    assert samples[0].file == "ä ö/caf\\xe9 1\\n2.png"


def test_differing_classes_are_named(tree: Path, tmp_path: Path) -> None:
    write_file(tree / "train", tmp_path / "train.beton")
    (tree / "val" / "bee").rename(tree / "val" / "wasp")
    with pytest.raises(InputError, match=r"tree/val: .* of .*tree/train: it lacks bee and has in addition wasp"):
        write_file(tree / "val", tmp_path / "val.beton")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folder": "tree/train", "out": "new"}, "out: .*new is not allowed for a single folder"),
        ({"folder": "tree/train", "out": "mine.beton"}, "split: mine.beton does not tell it; give train, validation"),
        ({"folder": "tree/train", "out": "mine.beton", "split": "dev"}, "split: 'dev' is not allowed"),
        ({"folder": "tree/val", "out": "val.beton"}, "train_file: .*train.beton is missing"),
        ({"folder": "nowhere", "out": "train.beton"}, "nowhere: no such folder"),
        ({"folder": "tree/train", "out": "train.beton", "root": "tree"}, "root: .* give only one"),
        (
            {"folder": "tree/train", "out": "train.beton", "source": "fashion-mnist"},
            "source: fashion-mnist is not allowed",
        ),
        (
            {"folder": "tree/train", "out": "train.beton", "labels": "tree/l.csv"},
            "labels: .*classes are the folders",
        ),
        ({"folder": "tree/train", "out": "train.beton", "synsets": "x"}, "synsets: .* together with labels"),
        ({"out": "train.beton"}, "out: .*train.beton is not allowed for a whole data set"),
        ({"out": "new", "split": "train"}, "split: train is not allowed without a folder"),
        ({"out": "new", "root": "tree", "labels": "gone.csv"}, "labels: .*gone.csv cannot be read"),
    ],
)
def test_wrong_calls_are_named(tree: Path, tmp_path: Path, arguments: dict[str, str], message: str) -> None:
    (tree / "l.csv").write_text("a,ant\n")
    paths = {key: tmp_path / value if key not in ("split", "source") else value for key, value in arguments.items()}
    with pytest.raises(InputError, match=message) as error:
        write(**{"source": "imagefolder", **paths})
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    with (tmp_path / ".train.beton.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"train\.beton: another process is writing it"):
            write_dataset("fashion-mnist", tmp_path, limit=5)
    assert not (tmp_path / "train.beton").exists()

"""Damage of every kind is found and named; the contact sheet shows the right images over the right names."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coe_dist.data.beton import write_file
from coe_dist.data.contact_sheet import CAPTION, MARGIN, TILE, contact_sheet, write_contact_sheet
from coe_dist.data.samples import read_samples, samples_path
from coe_dist.data.sidecar import read_sidecar, sidecar_path
from coe_dist.data.stored import StoredImages
from coe_dist.data.verify import verify
from coe_dist.errors import InputError


@pytest.fixture(scope="module")
def whole(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    beton = tmp_path_factory.mktemp("whole") / "train.beton"
    write_file(image_tree / "train", beton, jpeg_fraction=0.5)
    return beton


@pytest.fixture
def beton(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / whole.name


def damage(beton: Path, index: int, change: bytes, skip: int) -> None:
    """Puts bytes `skip` bytes behind the start of a sample's."""
    stored = StoredImages(beton)
    start = stored.bytes_of(index).__array_interface__["data"][0] - stored._mapped.__array_interface__["data"][0]
    content = bytearray(beton.read_bytes())
    content[start + skip : start + skip + len(change)] = change
    beton.write_bytes(content)


def first(beton: Path, *, jpeg: bool) -> int:
    stored = StoredImages(beton)
    return next(i for i in range(len(stored)) if stored.is_jpeg(i) == jpeg)


def test_a_whole_file_is_whole(beton: Path) -> None:
    expected = {"file": str(beton), "images": 24, "whole": True, "problems": [], "damaged": []}
    assert verify(beton) == verify(beton, workers=3) == expected
    samples_path(beton).unlink()  # of an older file
    assert verify(beton) == expected


def test_damaged_samples_are_named(beton: Path) -> None:
    jpeg, raw = first(beton, jpeg=True), first(beton, jpeg=False)
    samples = read_samples(beton, 24)
    assert samples is not None
    damage(beton, jpeg, bytes(100), 0)
    damage(beton, raw, b"\x01\x02\x03", 1000)  # still pixels: only the checksum can tell
    found = verify(beton, workers=2)
    assert not found["whole"]
    assert [(item["sample"], item["file"]) for item in found["damaged"]] == [
        (i, samples[i].file) for i in sorted((jpeg, raw))
    ]
    reasons = {item["sample"]: item["reason"] for item in found["damaged"]}
    assert "its JPEG is damaged" in reasons[jpeg]
    assert "not those that were written" in reasons[raw]
    samples_path(beton).unlink()
    assert [(item["sample"], item["file"]) for item in verify(beton)["damaged"]] == [(jpeg, None)]


def test_damage_outside_the_images_is_told(beton: Path) -> None:
    content = beton.read_bytes()
    beton.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    (problem,) = verify(beton)["problems"]
    assert "outside the images" in problem
    beton.write_bytes(content[: len(content) // 2])
    (problem,) = verify(beton)["problems"]
    assert "damaged" in problem
    beton.write_bytes(content)
    sidecar_path(beton).unlink()
    assert not verify(beton)["whole"]
    with pytest.raises(InputError, match="no such file"):
        verify(beton.with_name("other.beton"))


def tile(sheet: np.ndarray, index: int, columns: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """(image area, caption area)."""
    top, left = MARGIN + index // columns * (TILE + CAPTION + MARGIN), MARGIN + index % columns * (TILE + MARGIN)
    return sheet[top : top + TILE, left : left + TILE], sheet[top + TILE : top + TILE + CAPTION, left : left + TILE]


def test_the_sheet_shows_each_sample_in_its_place(beton: Path) -> None:
    stored, sheet = StoredImages(beton), np.asarray(contact_sheet(beton, 10))
    assert sheet.shape == (MARGIN + 2 * (TILE + CAPTION + MARGIN), MARGIN + 8 * (TILE + MARGIN), 3)
    for index in range(10):
        image = stored.pixels(index)
        area, caption = tile(sheet, index)
        height, width = image.shape[:2]
        top, left = (TILE - height) // 2, (TILE - width) // 2
        assert np.array_equal(area[top : top + height, left : left + width], image)
        assert caption.min() < 100  # black letters on white
    area, caption = tile(sheet, 12)
    assert area.min() == caption.min() == 255  # after the last one


def test_captions_are_the_classes(beton: Path) -> None:
    before = np.asarray(contact_sheet(beton, 24))
    content = json.loads(sidecar_path(beton).read_text())
    content["classes"][1] = "an elephant of a name that is far too long"
    sidecar_path(beton).write_text(json.dumps(content))
    after, labels_N = np.asarray(contact_sheet(beton, 24)), StoredImages(beton).labels_N
    assert set(labels_N) == {0, 1}
    for index in range(24):
        assert np.array_equal(tile(before, index)[0], tile(after, index)[0])
        assert np.array_equal(tile(before, index)[1], tile(after, index)[1]) == (labels_N[index] == 0)


def test_the_picture_is_written_once(beton: Path, tmp_path: Path) -> None:
    out = write_contact_sheet(beton, tmp_path / "deep" / "grid.png", count=1000)
    with Image.open(out) as image:
        assert image.size == contact_sheet(beton, read_sidecar(beton).count).size
    with pytest.raises(InputError, match=r"out: .*grid.png exists; use --overwrite"):
        write_contact_sheet(beton, out)
    write_contact_sheet(beton, out, count=1, overwrite=True)
    for count, name, message in ((0, "a.png", "n: 0 is not allowed"), (4, "a.txt", "ends in .png")):
        with pytest.raises(InputError, match=message):
            write_contact_sheet(beton, tmp_path / name, count=count)
    damage(beton, first(beton, jpeg=True), bytes(100), 0)
    with pytest.raises(InputError, match=r"sample \d+: its JPEG is damaged"):
        write_contact_sheet(beton, tmp_path / "b.png", count=24)

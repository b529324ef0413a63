import shutil
from pathlib import Path

import numpy as np
import pytest
from noise_images import save_noise
from PIL import Image

from coe_dist.data.imagefolder import open_imagefolder
from coe_dist.data.pixels import Inspection, inspect_file, read_pixels
from coe_dist.data.sources import Opening
from coe_dist.errors import InputError

GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)


def test_odd_images_become_the_right_rgb(tmp_path: Path) -> None:
    colour, gray = Image.fromarray(COLOUR), Image.fromarray(GRAY)
    repeated = np.repeat(GRAY[:, :, None], 3, 2)

    colour.save(tmp_path / "png.JPEG", format="PNG")
    assert np.array_equal(read_pixels(tmp_path / "png.JPEG"), COLOUR)
    for kind in ("BMP", "WEBP"):
        colour.save(tmp_path / f"{kind}.JPEG", format=kind, **({"lossless": True} if kind == "WEBP" else {}))
        assert np.array_equal(read_pixels(tmp_path / f"{kind}.JPEG"), COLOUR)
    gray.save(tmp_path / "gray.png")
    assert np.array_equal(read_pixels(tmp_path / "gray.png"), repeated)
    gray.convert("P").save(tmp_path / "palette.gif")
    assert np.array_equal(read_pixels(tmp_path / "palette.gif"), repeated)
    colour.convert("RGBA").save(tmp_path / "alpha.png")
    assert np.array_equal(read_pixels(tmp_path / "alpha.png"), COLOUR)
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(read_pixels(tmp_path / "deep.png"), repeated)
    gray.convert("L").convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(read_pixels(tmp_path / "bits.png"))) == {0, 255}
    flat = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # pure red
    flat.save(tmp_path / "cmyk.JPEG", format="JPEG", quality=95)
    red = read_pixels(tmp_path / "cmyk.JPEG")
    assert red[..., 0].min() > 245
    assert red[..., 1:].max() < 10


def test_transparency_is_dropped_whatever_form_it_has(tmp_path: Path) -> None:
    clear = np.dstack([COLOUR, np.zeros(COLOUR.shape[:2], np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert np.array_equal(read_pixels(tmp_path / "clear.png"), COLOUR)
    Image.fromarray(np.dstack([GRAY, GRAY // 2])).save(tmp_path / "gray.png")
    assert np.array_equal(read_pixels(tmp_path / "gray.png"), np.repeat(GRAY[:, :, None], 3, 2))
    palette = Image.fromarray(GRAY).convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    palette.save(tmp_path / "palette.gif", transparency=7)
    for name in ("palette.png", "palette.gif"):
        assert np.array_equal(read_pixels(tmp_path / name), np.repeat(GRAY[:, :, None], 3, 2)), name


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "film.JPEG", format="GIF", save_all=True, append_images=frames[1:])
    assert (read_pixels(tmp_path / "film.JPEG") == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (20_000, 3), (1, 20_000)])
def test_extreme_shapes_are_read_and_reduced(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "extreme.jpg", quality=100, subsampling=0)
    pixels = read_pixels(tmp_path / "extreme.jpg")
    assert pixels.shape == (size[1], size[0], 3)
    reduced = read_pixels(tmp_path / "extreme.jpg", max_resolution=500)
    assert max(reduced.shape) <= 500
    assert min(reduced.shape[:2]) >= 1
    assert np.abs(reduced.astype(int) - (10, 200, 30)).max() <= 3
    found = inspect_file(tmp_path / "extreme.jpg", max_resolution=500)
    assert isinstance(found, Inspection)
    assert (found.height, found.width) == reduced.shape[:2]


def test_a_size_that_ffcv_cannot_store_has_a_reason(tmp_path: Path) -> None:
    Image.new("L", (65_536, 1)).save(tmp_path / "long.png")
    assert "at most 65535 a side" in str(inspect_file(tmp_path / "long.png"))


def test_exif_rotation_is_applied_and_broken_exif_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    Image.fromarray(COLOUR).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_pixels(tmp_path / "turned.png"), np.rot90(COLOUR, 3))
    Image.fromarray(COLOUR).save(tmp_path / "broken.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x12\x01garbage")
    assert read_pixels(tmp_path / "broken.jpg").shape == COLOUR.shape


def test_unreadable_files_have_a_reason(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("404 not found")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "wide.tif")
    for name in ("cut.jpg", "empty.jpg", "text.jpg", "link.jpg", "float.tif", "wide.tif"):
        reason = inspect_file(tmp_path / name)
        assert isinstance(reason, str), name
        assert "\n" not in reason
    assert isinstance(inspect_file(tmp_path / "whole.jpg"), Inspection)


def test_inspection_matches_the_pixels(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    found = inspect_file(tmp_path / "a.png", max_resolution=15)
    assert isinstance(found, Inspection)
    pixels = read_pixels(tmp_path / "a.png", max_resolution=15) / 255
    assert pixels.shape == (10, 15, 3) == (found.height, found.width, 3)
    assert found.mean == pytest.approx(pixels.mean((0, 1)))
    assert found.square == pytest.approx((pixels**2).mean((0, 1)))


def test_tree_is_split_and_labelled_by_sorted_names(image_tree: Path) -> None:
    source = open_imagefolder(image_tree)
    assert source.classes == ("ant", "bee")
    assert [len(source.splits[name]) for name in ("train", "validation", "test")] == [22, 2, 6]
    assert np.bincount(source.splits["validation"].labels_N).tolist() == [1, 1]
    seen = {split[i][0].tobytes() for split in source.splits.values() for i in range(len(split))}
    assert len(seen) == 24  # all of train's, cut or not; val's repeat some of them
    pixels = [source.splits["train"][i][0] / 255 for i in range(22)]
    mean = np.mean([image.mean((0, 1)) for image in pixels], 0)
    second = np.mean([(image**2).mean((0, 1)) for image in pixels], 0)
    assert source.mean == pytest.approx(mean)
    assert source.std == pytest.approx(np.sqrt(second - mean**2))
    assert source.splits["train"].shape is None
    limited = open_imagefolder(image_tree, Opening(limit=8)).splits["train"].labels_N
    assert set(limited) == {0, 1}  # the first images are a fair sample, not all of one class


def test_own_test_folder_and_validation_name(image_tree: Path, tmp_path: Path) -> None:
    shutil.copytree(image_tree / "train", tmp_path / "train")
    shutil.copytree(image_tree / "val", tmp_path / "validation")
    shutil.copytree(image_tree / "val", tmp_path / "test")
    source = open_imagefolder(tmp_path)
    assert [len(source.splits[name]) for name in ("train", "validation", "test")] == [24, 6, 6]


def test_clutter_links_and_strange_names(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("10", "2", "häuser am see", "z"):
            save_noise(tmp_path / split / name / "deep" / "im age.PNG", 9, 9, 1)
            save_noise(tmp_path / split / name / "b.jpeg", 9, 9, 2)
        (tmp_path / split / "z" / "._b.jpeg").write_bytes(b"Mac OS X")
        (tmp_path / split / "z" / ".hidden.png").write_bytes(b"x")
        (tmp_path / split / "z" / "Thumbs.db").write_bytes(b"x")
        (tmp_path / split / "z" / "ring").symlink_to(tmp_path / split / "z")
        (tmp_path / split / ".cache").mkdir()
        (tmp_path / split / "__MACOSX").mkdir()
        (tmp_path / split / "README.txt").write_text("x")
    (tmp_path / "train" / "linked").symlink_to(tmp_path / "train" / "z")
    # the same letters, as macOS spells them
    (tmp_path / "val" / "häuser am see").rename(tmp_path / "val" / "ha\u0308user am see")
    (tmp_path / "val" / "linked").symlink_to(tmp_path / "val" / "z")
    source = open_imagefolder(tmp_path)
    assert source.classes == ("10", "2", "häuser am see", "linked", "z")
    assert np.bincount(source.splits["test"].labels_N).tolist() == [2] * 5
    assert not any(split.quarantined for split in source.splits.values())


def test_bad_files_are_quarantined_by_name(image_tree: Path, tmp_path: Path) -> None:
    shutil.copytree(image_tree, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train" / "ant" / "bad one.jpg").write_bytes(b"")
    source = open_imagefolder(tmp_path, Opening(workers=2))
    bad = [item for split in source.splits.values() for item in split.quarantined]
    assert [item.file for item in bad] == ["train/ant/bad one.jpg"]
    assert "UnidentifiedImageError" in bad[0].reason


def test_workers_give_the_same_source(tmp_path: Path) -> None:
    for split, count in (("train", 40), ("val", 1)):
        for name in "ab":
            for i in range(count):
                save_noise(tmp_path / split / name / f"{i}.png", 8, 8, i)
    one, two = open_imagefolder(tmp_path), open_imagefolder(tmp_path, Opening(workers=2))
    assert one.mean == two.mean
    assert np.array_equal(one.splits["train"].labels_N, two.splits["train"].labels_N)


@pytest.mark.parametrize(("test_folder", "sizes"), [(False, [20, 2, 2]), (True, [22, 2, 6])])
def test_what_is_missing_is_cut_from_train(
    image_tree: Path, tmp_path: Path, test_folder: bool, sizes: list[int]
) -> None:
    shutil.copytree(image_tree / "train", tmp_path / "train")
    if test_folder:
        shutil.copytree(image_tree / "val", tmp_path / "test")
    source = open_imagefolder(tmp_path)
    splits = [source.splits[name] for name in ("train", "validation", "test")]
    assert [len(split) for split in splits] == sizes
    files = [split.file_of(i) for split in splits for i in range(len(split))]
    assert len(set(files)) == sum(sizes)
    cut = "validation is" if test_folder else "validation and test are"
    assert source.warnings == (f"{tmp_path}: no folder val; {cut} cut from train, a tenth of each class",)


def test_differing_classes_are_named(image_tree: Path, tmp_path: Path) -> None:
    shutil.copytree(image_tree, tmp_path, dirs_exist_ok=True)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "wasp")
    with pytest.raises(InputError, match="lacks bee and has in addition wasp"):
        open_imagefolder(tmp_path)


def test_missing_folders_and_empty_classes_are_named(image_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train: no such folder"):
        open_imagefolder(tmp_path)
    shutil.copytree(image_tree, tmp_path, dirs_exist_ok=True)
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).rename(tmp_path / f"kept-{name}")
    with pytest.raises(InputError, match="no class folders"):
        open_imagefolder(tmp_path)
    for name in ("ant", "bee"):
        (tmp_path / f"kept-{name}").rename(tmp_path / "train" / name)
    for file in (tmp_path / "val" / "bee").iterdir():
        file.unlink()
    assert open_imagefolder(tmp_path).warnings == (f"{tmp_path / 'val' / 'bee'}: no images",)
    for file in (tmp_path / "train" / "bee").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match="bee: no readable image"):
        open_imagefolder(tmp_path)
    for file in (tmp_path / "train" / "bee").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="bee: no images"):
        open_imagefolder(tmp_path)

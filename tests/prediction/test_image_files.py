"""What names, folders and patterns mean: every file once, in a stable order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coe_dist.errors import InputError
from coe_dist.prediction.files import list_images


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a/2.png", "a/10.JPG", "a/note.txt", "a/.hidden.png", "a/.cache/x.png", "a/sub/1.webp", "b/x y.png")
    touch(tmp_path, "odd.name", "a[1].png")
    return tmp_path


def test_folders_files_and_patterns(tree: Path) -> None:
    assert list_images(["a"]).files == ["a/10.JPG", "a/2.png", "a/sub/1.webp"]
    assert list_images(["./a/"]).files == ["./a/10.JPG", "./a/2.png", "./a/sub/1.webp"]
    assert list_images(["odd.name", "a/note.txt"]).files == ["odd.name", "a/note.txt"]  # named: taken as they are
    assert list_images(["*/*.png"]).files == ["a/2.png", "b/x y.png"]
    assert list_images(["**/*.*g"]).files == ["a/2.png", "a[1].png", "b/x y.png"]
    assert list_images(["a*"]).files == ["a/10.JPG", "a/2.png", "a/sub/1.webp", "a[1].png"]  # a pattern finds folders
    assert list_images(["a[1].png"]).files == ["a[1].png"]  # what exists is no pattern
    assert list_images(["b", "a/sub", "b"]).files == ["b/x y.png", "a/sub/1.webp"]  # in the order they are named
    assert list_images(["a/.hidden.png"]).files == ["a/.hidden.png"]
    assert list_images([str(tree / "b")]).files == [str(tree / "b" / "x y.png")]


def test_every_file_once_however_it_is_reached(tree: Path) -> None:
    (tree / "link").symlink_to("a")
    (tree / "a" / "sub" / "up").symlink_to("../..")  # a ring
    listed = list_images(["a/2.png", "./a//2.png", "a", str(tree / "a" / "2.png"), "link", "b/../a/2.png", "a/*.png"])
    real = [os.path.realpath(file) for file in listed.files]
    assert len(set(real)) == len(real)
    assert listed.files[:2] == ["a/2.png", "a/10.JPG"]
    assert set(real) == {str(tree / name) for name in ("a/2.png", "a/10.JPG", "a/sub/1.webp", "b/x y.png", "a[1].png")}
    (tree / "b" / "other.png").symlink_to("x y.png")  # a name of its own
    assert list_images(["b"]).files == ["b/other.png", "b/x y.png"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["nowhere.png"], "IMAGES: nowhere.png: no such file or folder"),
        (["a", "b/*.gif"], r"IMAGES: b/\*.gif: no file matches this pattern"),
        (["empty"], "IMAGES: empty: no images; a folder's images end in .bmp, "),
        (["pipe"], "IMAGES: pipe is not allowed; it is neither a file nor a folder"),
        (["gone"], "IMAGES: gone is not allowed; it is neither"),
    ],
)
def test_refused(names: list[str], words: str, tree: Path) -> None:
    (tree / "empty").mkdir()
    os.mkfifo(tree / "pipe")
    (tree / "gone").symlink_to("nowhere")
    with pytest.raises(InputError, match=f"^{words}"):
        list_images(names)
    assert list_images(["a", "empty"]).files == list_images(["a"]).files


def test_a_folder_that_cannot_be_listed_is_told(tree: Path) -> None:
    """root may list any folder, so the folder vanishes instead: its name is too long for the system."""
    deep = tree / "deep"
    deep.mkdir()
    place, descriptor = deep, os.open(deep, os.O_RDONLY)
    for _ in range(40):  # longer than PATH_MAX in the end; made step by step, as no single path could
        os.mkdir("d" * 120, dir_fd=descriptor)
        below = os.open("d" * 120, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor, place = below, place / ("d" * 120)
    os.close(descriptor)
    listed = list_images(["a", "deep"])
    assert listed.files == list_images(["a"]).files
    assert len(listed.unreadable) == 1
    assert "File name too long" in listed.unreadable[0].reason

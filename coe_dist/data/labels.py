"""The classes of images that lie in one folder: a CSV (`file,class`), or ILSVRC's list of numbers.

CSV: the file with or without its ending, then the class; more words after the class are left out, which is the form of
`ImageId,PredictionString`. A header line is recognised by naming neither an image nor a class.
Numbers: line i is the number of the i-th image in the order of the names. Which class a number is, a second file tells
(`synsets`): the devkit's meta.mat, lines of `class number ...`, or lines of one class each, the first being number 1.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from coe_dist.errors import InputError

_WORDNET = re.compile(r"n\d{8}")
_ILSVRC = 1000  # classes


def read_labels(
    labels: Path, folder: Path, images: Sequence[Path], classes: Sequence[str], synsets: Path | None
) -> list[tuple[Path, int]]:
    """(image, class index) for every image of the folder, sorted by name. Raises InputError, with the line, where an
    image has no label or two, a label no image, or a class is not one of `classes`."""
    lines = _lines(labels)
    number_of = {name: index for index, name in enumerate(classes)}
    images = sorted(images)
    if lines[0].isdigit():
        return _numbered(labels, lines, folder, images, number_of, synsets)
    if synsets is not None:
        raise InputError(f"synsets: {synsets} is not allowed; {labels} names the classes itself, it holds no numbers")
    return _named(labels, lines, folder, images, number_of)


def _named(
    labels: Path, lines: list[str], folder: Path, images: Sequence[Path], number_of: dict[str, int]
) -> list[tuple[Path, int]]:
    by_name: dict[str, Path] = {}
    for path in images:
        for name in (path.stem, path.name, path.relative_to(folder).as_posix()):  # the last wins
            by_name[name] = path
    found: dict[Path, int] = {}
    absent: list[str] = []
    for line, row in enumerate(csv.reader(lines), 1):
        if len(row) < 2:
            raise InputError(f"{labels}, line {line}: {lines[line - 1]!r} is not allowed; give file,class")
        file, text = row[0].strip(), row[1].strip()
        name = text if text in number_of else text.split(" ")[0]
        if line == 1 and file not in by_name and name not in number_of:
            continue
        if name not in number_of:
            raise InputError(f"{labels}, line {line}: {name!r} is not one of the {len(number_of)} training classes")
        if file not in by_name:
            absent.append(file)
        elif by_name[file] in found:
            raise InputError(f"{labels}, line {line}: {file} has been given a class before")
        else:
            found[by_name[file]] = number_of[name]
    unlabelled = [path for path in images if path not in found]
    if unlabelled:
        first = unlabelled[0].name
        raise InputError(f"{labels}: no class for {len(unlabelled)} images of {folder}, the first is {first}")
    if absent:
        raise InputError(f"{labels}: {len(absent)} of its images are not in {folder}, the first is {absent[0]}")
    return [(path, found[path]) for path in images]


def _numbered(
    labels: Path,
    lines: list[str],
    folder: Path,
    images: Sequence[Path],
    number_of: dict[str, int],
    synsets: Path | None,
) -> list[tuple[Path, int]]:
    if synsets is None:
        raise InputError(
            f"labels: {labels} holds numbers; give synsets too, the file with the class of each number "
            "(the devkit's meta.mat, or a text file)"
        )
    if len(images) != len(lines):
        raise InputError(f"{labels}: {len(lines)} numbers for the {len(images)} images of {folder}")
    names = _synsets(synsets, number_of)
    labelled = []
    for line, (text, path) in enumerate(zip(lines, images, strict=True), 1):
        if text.isdigit() and int(text) in names:
            name = names[int(text)]
        else:
            raise InputError(f"{labels}, line {line}: {text!r} is not one of the {len(names)} numbers of {synsets}")
        if name not in number_of:
            raise InputError(f"{synsets}: number {text} is {name}, which is not one of the training classes")
        own = re.search(r"(\d+)$", path.stem)
        if own and int(own[1]) != line:
            raise InputError(f"{labels}, line {line}: would label {path.name}, which is not image {line} by its name")
        labelled.append((path, number_of[name]))
    return labelled


def _synsets(path: Path, classes: Collection[str]) -> dict[int, str]:
    if path.suffix == ".mat":
        return _devkit(path)
    lines = _lines(path)
    words = [line.split() for line in lines]
    if all(len(word) > 1 and word[1].isdigit() for word in words):
        return {int(word[1]): word[0] for word in words}
    whole = all(line in classes for line in lines)  # classes of several words
    names = lines if whole else [word[0] for word in words]
    if len(names) == _ILSVRC and names == sorted(names) and all(_WORDNET.fullmatch(name) for name in names):
        raise InputError(
            f"{path}: its classes are in alphabetical order, which is not the order of ILSVRC's numbers; "
            "give the devkit's meta.mat"
        )
    return dict(enumerate(names, 1))


def _devkit(path: Path) -> dict[int, str]:
    """The numbers of the classes in ILSVRC2012_devkit_t12/data/meta.mat; inner nodes of the tree are left out."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(str(path), squeeze_me=True)["synsets"]
        return {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets if int(entry["num_children"]) == 0}
    except Exception as error:  # a parser may raise anything on bytes that are something else
        raise InputError(f"{path}: not the devkit's meta.mat ({' '.join(str(error).split())})") from error


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({getattr(error, 'strerror', None) or error})") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(f"{path}: empty")
    if not all(lines):
        raise InputError(f"{path}, line {lines.index('') + 1}: empty")
    return lines

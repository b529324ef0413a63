"""Images that lie in one folder, labelled by a CSV or by ILSVRC's numbers."""

from pathlib import Path

import numpy as np
import pytest
from noise_images import save_noise

from coe_dist.data.imagefolder import open_imagefolder
from coe_dist.data.labels import read_labels
from coe_dist.data.sources import Opening
from coe_dist.errors import InputError

CLASSES = ("n01", "n02", "n03")
ORDER = ("n03", "n01", "n02")  # what the numbers 1, 2, 3 stand for
TRUTH = (2, 2, 1, 3, 1)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    folder = tmp_path / "val"
    for i in range(1, len(TRUTH) + 1):
        save_noise(folder / f"ILSVRC2012_val_{i:08d}.JPEG", 8, 9, i)
    (folder / "._ILSVRC2012_val_00000001.JPEG").write_bytes(b"Mac OS X")
    (folder / "Thumbs.db").write_bytes(b"x")
    return folder


def labels_of(flat: Path, labels: Path, synsets: Path | None = None) -> list[str]:
    images = [path for path in flat.iterdir() if path.suffix == ".JPEG" and not path.name.startswith(".")]
    found = read_labels(labels, flat, images, CLASSES, synsets)
    assert [path for path, _ in found] == sorted(images)
    return [CLASSES[label] for _, label in found]


def text(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def numbers(folder: Path) -> Path:
    return text(folder / "ILSVRC2012_validation_ground_truth.txt", *map(str, TRUTH))


EXPECTED = [ORDER[number - 1] for number in TRUTH]


def test_numbers_with_each_form_of_their_meaning(flat: Path, tmp_path: Path) -> None:
    from scipy.io import savemat

    kind = np.dtype([("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")])
    rows = [(i, name, "a kind of thing", 0) for i, name in enumerate(ORDER, 1)] + [(4, "n99", "things", 3)]
    savemat(tmp_path / "meta.mat", {"synsets": np.array(rows, kind).reshape(-1, 1)})
    listed = text(tmp_path / "order.txt", *ORDER)
    with_words = text(tmp_path / "words.txt", *(f"{name} a kind of thing" for name in ORDER))
    mapping = text(tmp_path / "map_clsloc.txt", "n02 3 word", "n03 1 word", "n01 2 word")
    for synsets in (tmp_path / "meta.mat", listed, with_words, mapping):
        assert labels_of(flat, numbers(tmp_path), synsets) == EXPECTED, synsets


def test_csv_in_the_forms_that_are_about(flat: Path, tmp_path: Path) -> None:
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 6)]
    shuffled = [3, 0, 4, 1, 2]
    kaggle = [f"{names[i]},{EXPECTED[i]} 85 1 499 272 {EXPECTED[i]} 1 2 3 4" for i in shuffled]
    plain = [f"{names[i]}.JPEG,{EXPECTED[i]}" for i in shuffled]
    for lines in (["ImageId,PredictionString", *kaggle], kaggle, ["file,class", *plain], plain):
        assert labels_of(flat, text(tmp_path / "labels.csv", *lines)) == EXPECTED
    from_a_spreadsheet = "\r\n".join(["\ufefffile,class", *plain])
    (tmp_path / "labels.csv").write_bytes(from_a_spreadsheet.encode())
    assert labels_of(flat, tmp_path / "labels.csv") == EXPECTED


def test_classes_of_several_words(tmp_path: Path) -> None:
    save_noise(tmp_path / "val" / "a.png", 8, 8, 0)
    labels = text(tmp_path / "labels.csv", 'a.png,"great white shark, big"')
    classes = ("great", "great white shark, big")
    assert read_labels(labels, tmp_path / "val", [tmp_path / "val" / "a.png"], classes, None)[0][1] == 1
    order = text(tmp_path / "order.txt", *reversed(classes))
    truth = text(tmp_path / "truth.txt", "1")
    assert read_labels(truth, tmp_path / "val", [tmp_path / "val" / "a.png"], classes, order)[0][1] == 1


def csv_lines(*changes: tuple[int, str]) -> list[str]:
    lines = [f"ILSVRC2012_val_{i:08d},n01" for i in range(1, 6)]
    for index, line in changes:
        lines[index:] = [line, *lines[index + 1 :]]
    return lines


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (csv_lines((2, "ILSVRC2012_val_00000003,n77")), "line 3: 'n77' is not one of the 3 training classes"),
        (
            csv_lines((2, "ILSVRC2012_val_00000001,n01")),
            "line 3: ILSVRC2012_val_00000001 has been given a class before",
        ),
        (csv_lines((2, "ILSVRC2012_val_00000003")), "line 3: .* give file,class"),
        (csv_lines((2, "")), "line 3: empty"),
        (csv_lines()[:4], "no class for 1 images of .*, the first is ILSVRC2012_val_00000005.JPEG"),
        ([*csv_lines(), "missing,n02"], "1 of its images are not in .*, the first is missing"),
        ([], "empty"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused(flat: Path, tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        labels_of(flat, text(tmp_path / "labels.csv", *lines))
    assert "\n" not in str(error.value)
    assert "labels.csv" in str(error.value)


def test_numbers_that_do_not_fit_are_refused(flat: Path, tmp_path: Path) -> None:
    order, truth = text(tmp_path / "order.txt", *ORDER), numbers(tmp_path)

    def refused(message: str, labels: Path, synsets: Path | None) -> None:
        with pytest.raises(InputError, match=message) as error:
            labels_of(flat, labels, synsets)
        assert "\n" not in str(error.value)

    refused("holds numbers; give synsets too", truth, None)
    refused("4 numbers for the 5 images", text(tmp_path / "short.txt", "1", "2", "3", "1"), order)
    refused("line 2: '4' is not one of the 3 numbers", text(tmp_path / "high.txt", "1", "4", "1", "1", "1"), order)
    refused("number 1 is n09", truth, text(tmp_path / "other.txt", "n09", *ORDER[1:]))
    refused("not the devkit's meta.mat", truth, text(tmp_path / "meta.mat", "nothing"))
    refused("cannot be read", truth, tmp_path / "gone.txt")
    refused("cannot be read as text", flat / "ILSVRC2012_val_00000001.JPEG", order)
    refused("names the classes itself", text(tmp_path / "labels.csv", *csv_lines()), order)
    alphabetical = text(tmp_path / "LOC_synset_mapping.txt", *(f"n{i:08d} word" for i in range(1000)))
    refused("alphabetical order, which is not the order of ILSVRC's numbers", truth, alphabetical)
    (flat / "ILSVRC2012_val_00000002.JPEG").rename(flat / "ILSVRC2012_val_00000007.JPEG")
    refused("would label ILSVRC2012_val_00000003.JPEG, which is not image 2", truth, order)


def test_a_tree_with_a_flat_val(flat: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        for i in range(4):
            save_noise(tmp_path / "train" / name / f"{i}.png", 8, 9, i)
    with pytest.raises(InputError, match="its images lie in no class folders; name their classes with labels"):
        open_imagefolder(tmp_path)
    opening = Opening(labels=numbers(tmp_path), synsets=text(tmp_path / "order.txt", *ORDER))
    test = open_imagefolder(tmp_path, opening).splits["test"]
    found = {test.file_of(i): CLASSES[test[i][1]] for i in range(len(test))}
    assert found == {f"val/ILSVRC2012_val_{i:08d}.JPEG": name for i, name in enumerate(EXPECTED, 1)}

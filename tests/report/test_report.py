"""The report of made-up run folders: numbers present, names escaped, nothing to load, missing parts named."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data import write_small

from coe_dist.coe.calibration import ece
from coe_dist.data.stored import StoredImages
from coe_dist.errors import InputError
from coe_dist.report import write_report
from coe_dist.report.card import write_card
from coe_dist.report.folder import Evaluation, read_run
from coe_dist.report.heat import clustered
from coe_dist.report.quality import confusion, reliability, standings
from coe_dist.report.words import macs, percent
from coe_dist.tracking.per_image import PerImage

CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "<b>Boot</b> & $co"]
VOID = {"meta", "link", "br", "img", "hr", "input"}


def write_run(folder: Path, experts: int = 4, classes: list[str] = CLASSES, epochs: int = 16) -> Path:
    """A run folder as training, evaluation and the comparison leave it."""
    folder.mkdir(parents=True)
    per_epoch, lines = 215, []
    lines.append({"kind": "start", "time": 1.0, "task": "train", "epochs": epochs, "world_size": 2,
                  "steps_per_epoch": per_epoch, "experts": experts, "experts_per_sample": 2,
                  "images": 55000, "step": 0})  # fmt: skip
    for step in range(20, per_epoch * epochs + 1, 20):
        decay, wave = math.exp(-step / 900), math.sin(step / 37) / 40
        loads = [1 + 0.5 * math.sin(step / 500 + j) * decay for j in range(experts)]
        metrics: dict[str, Any] = {
            "train/loss": 0.9 + 3 * decay + wave, "train/loss_experts": 0.3 + 2 * decay + wave,
            "train/loss_delegator": 0.6 + 1.4 * decay, "train/loss_selection": 1.0 + 0.4 * decay - wave,
            "train/learning_rate": 0.1, "train/images_per_second": 4100.0,
        }  # fmt: skip
        metrics |= {f"expert/{j:02d}/load": load / sum(loads) for j, load in enumerate(loads)}
        lines.append(
            {"kind": "train", "time": 1.0 + step, "step": step, "epoch": step // per_epoch, "metrics": metrics}
        )
    for epoch in range(epochs):
        rise = 1 - math.exp(-(epoch + 1) / 3)
        metrics = {"val/top1": 0.868 * rise, "val/top1_delegator": 0.754 * rise, "val/top1_oracle": 0.938 * rise}
        metrics |= {f"expert/{j:02d}/val_load": 1 / experts for j in range(experts)}
        metrics |= {f"expert/{j:02d}/accuracy": 0.8 * rise for j in range(1, experts)}  # the first is never chosen
        lines.append({"kind": "evaluation", "time": 1.0, "step": (epoch + 1) * per_epoch, "epoch": epoch,
                      "split": "validation", "metrics": metrics})  # fmt: skip
    lines.append({"kind": "end", "time": 9.0, "step": per_epoch * epochs, "seconds": 412.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    delegator, cost = 42_000, 240_000
    curve = []
    for i in range(41):
        threshold = 0.3 + 0.7 * i / 40
        rate = max(0.0, 1 - threshold**1.5)
        average = delegator + (1 - rate) * cost
        top1 = 0.869 - 0.1 * rate**3
        curve.append({"threshold": threshold, "exit_rate": rate, "average_macs": average, "top1": top1})
    top = {
        "coe": 0.8671,
        "delegator": 0.7543,
        "oracle": 0.9382,
        "experts": [0.71 + 0.01 * (j % 5) for j in range(experts)],
    }
    evaluation = {
        "split": "test", "images": 10000, "top1": top, "exit_rate": 0.2512, "average_macs": 221_712.0, "threshold": 0.9,
        "load": [1 / experts] * experts, "curve": curve, "macs": {"delegator": delegator, "experts": [cost] * experts},
        "expert_accuracy": [0.84, None, *[0.88] * (experts - 2)],
    }  # fmt: skip
    (folder / "evaluation-test.json").write_text(json.dumps(evaluation))
    selected = [[int(1000 * (0.85 if (c + j) % experts == 0 else 0.15 / (experts - 1))) for j in range(experts)]
                for c in range(len(classes))]  # fmt: skip
    selected[0][1] = 0
    details = {"classes": classes, "selected": selected, "correct": [[int(0.9 * n) for n in row] for row in selected],
               "images_per_class": [1000] * len(classes)}  # fmt: skip
    (folder / "details-test.json").write_text(json.dumps(details))
    (folder / "config.yaml").write_text("name: demo\ntracking:\n  uri: https://me:hunter2@tracker.example/x\n")
    return folder


def write_summary(folder: Path) -> None:
    summary = {
        "coe": {"top1": 0.8671, "average_macs": 221_712}, "single": {"top1": 0.8563, "macs": 240_000},
        "single_same_macs": {"top1": 0.8602, "macs": 278_000}, "seed": 0,
        "seconds": {"data": 12.0, "train_coe": 412.5, "train_single": 131.0, "evaluate": 9.0},
        "expert_samples_per_image": {"coe": 2, "single": 1, "single_same_macs": 1},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


class Page(HTMLParser):
    """Checks that tags nest and collects what the tests ask for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.headings: list[int] = []
        self.words: list[str] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "data", "action", "poster", "srcset"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check(page: Page) -> None:
    """What holds for every report."""
    links = {reference for reference in page.references if not reference.startswith("data:image/")}
    assert all(reference.startswith("#") for reference in links)
    assert {reference[1:] for reference in links} <= set(page.ids)
    assert page.source.count("<script>") == page.source.count("<script") == 1
    assert set(re.findall(r"url\(#([^)]*)\)", page.source)) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://(?!\*\*\*@)", page.source)
    assert "@import" not in page.source
    assert not {"link", "iframe", "object"} & page.tags
    assert "#0a0b" not in page.source  # every placeholder colour became a variable
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))


def test_a_complete_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    write_summary(folder)
    path = write_report([folder])
    assert path == folder / "report.html"
    page = Page(path)
    check(page)
    for number in ("86.7", "85.6", "86.0", "222k", "240k", "278k", "75.4", "93.8", "-1.1", "-0.7", "25.1%", "7 min"):
        assert number in page.text
    for heading in ("Result", "Accuracy and cost", "Training", "Experts", "Who answers what"):
        assert heading in page.text
    assert page.text.count("missing") == 2  # only what needs the rows of single images
    assert page.source.count("<svg") == 6
    assert "<b>Boot" not in page.source
    assert "<b>Boot</b> & $co" in page.text
    assert "hunter2" not in page.source
    assert "one expert network" in page.text
    assert "threshold 0.9" in page.text


def test_without_a_comparison_the_evaluation_gives_the_headline(tmp_path: Path) -> None:
    page = Page(write_report([write_run(tmp_path / "demo")], tmp_path / "elsewhere" / "page.html"))
    check(page)
    assert "delegator alone" in page.text
    assert "best of its experts alone" in page.text
    assert not (tmp_path / "demo" / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("metrics.jsonl", "No training curves"),
        ("evaluation-test.json", "has not been evaluated"),
        ("details-test.json", "No table of classes and experts"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, file: str, sentence: str) -> None:
    folder = write_run(tmp_path / "demo")
    assert sentence not in Page(write_report([folder])).text
    (folder / file).unlink()
    page = Page(write_report([folder]))
    check(page)
    assert sentence in page.text


def test_unreadable_files_are_named_and_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    (folder / "evaluation-test.json").write_text('{"split": "test"')
    (folder / "summary.json").write_text('{"coe": {"top1": "</p><script>"}}')
    details = json.loads((folder / "details-test.json").read_text())
    details["correct"].pop()
    (folder / "details-test.json").write_text(json.dumps(details))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99, "metr')
    page = Page(write_report([folder]))
    check(page)
    for name in ("evaluation-test.json", "summary.json", "details-test.json"):
        assert f"{name} is left out" in page.text
    assert page.source.count("<svg") == 4


def test_many_experts_and_classes(tmp_path: Path) -> None:
    names = [f"class {c}" for c in range(100)]
    page = Page(write_report([write_run(tmp_path / "wide", experts=64, classes=names, epochs=2)]))
    check(page)
    assert "the 40 of 100 classes" in page.text
    assert "the 16 most used of 64 experts" in page.text
    assert "middle half" in page.text


def test_several_runs_and_a_baseline(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "demo"), write_run(tmp_path / "a&b <i>", experts=6)
    single = tmp_path / "single"
    single.mkdir()
    lines = [{"kind": "start", "time": 0.0, "task": "baseline", "epochs": 3, "steps_per_epoch": 2, "step": 0}]
    lines += [
        {"kind": "train", "time": 0.0, "step": s, "epoch": 0, "metrics": {"train/loss": "NaN" if s == 2 else 1 / s}}
        for s in range(1, 7)
    ]
    lines += [{"kind": "evaluation", "time": 0.0, "step": 6, "epoch": 2, "metrics": {"val/top1": 0.4321}}]
    (single / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report([first, second, single], tmp_path / "all.html"))
    check(page)
    assert "All runs" in page.text
    assert "Settings that differ None, as far as their configurations tell." in page.text
    assert "a&b <i>" in page.text
    assert "<i>" not in page.source
    assert "Last validation top-1: 43.2%" in page.text
    assert "not finished" in page.text


def test_the_last_value_of_a_step_counts(tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    folder.mkdir()
    values = [(1, 0.1), (2, 0.2), (1, 0.3), (2, 0.7654)]  # the second process began again at step 1
    lines = [{"kind": "evaluation", "time": 0.0, "step": s, "metrics": {"val/top1": v}} for s, v in values]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "top-1: 76.5%" in Page(write_report([folder])).text


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="not a run folder"):
        write_report([tmp_path])
    folder = write_run(tmp_path / "demo")
    with pytest.raises(InputError, match=r"--out: .* cannot be written"):
        write_report([folder], folder / "config.yaml" / "page.html")
    with pytest.raises(InputError, match=r"--out: .* is a folder"):
        write_report([folder], folder)


def test_the_model_card(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    path = write_card(folder)
    assert path == folder / "model-card.md"
    text = path.read_text()
    for words in (
        "# demo",
        "## Limits",
        "| collaboration | 86.7 | 222k on average |",
        "| delegator alone | 75.4 | 42.0k |",
        "On 10000 test images.",
        "itself, from confidence 0.9000 on",
        r"Bag, \<b\>Boot\</b\> \& $co",
        "- epochs: 16",
    ):
        assert words in text
    assert "hunter2" not in text
    (folder / "evaluation-test.json").unlink()
    assert "Not evaluated yet." in write_card(folder).read_text()
    with pytest.raises(InputError, match="no such run folder"):
        write_card(tmp_path / "nowhere")


def test_numbers_as_words() -> None:
    assert [macs(v) for v in (None, 12, 999, 42_000, 221_712, 1_934_000, 24_400_000, 2.5e9)] == [
        "–", "12", "999", "42.0k", "222k", "1.93M", "24.4M", "2.50G",
    ]  # fmt: skip
    assert [percent(v) for v in (None, 0.0, 0.86714, 1.0)] == ["–", "0.0", "86.7", "100.0"]


def test_settings_that_differ_and_a_single_network(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "demo"), write_run(tmp_path / "other", experts=6)
    (second / "config.yaml").write_text("name: other\ntracking:\n  uri: https://me:hunter3@x.example/\nseed: 7\n")
    single = tmp_path / "single"
    single.mkdir()
    (single / "evaluation-test.json").write_text('{"split": "test", "images": 10000, "top1": 0.8767, "macs": 240000}')
    path = write_report([first, second, single])
    assert path == first / "comparison.html"
    page = Page(path)
    check(page)
    assert "seed 7" in page.text
    assert "tracking.uri https://***@tracker.example/x https://***@x.example/" in page.text
    assert not re.search("hunter[23]", page.source)
    assert "one network alone 87.7 240k" in page.text
    assert "left out" not in page.text


def rows_of(images: int = 60, experts: int = 4, classes: int = 10) -> PerImage:
    """Rows of made-up answers to `images` images: the delegator is sure and wrong about the last one."""
    generator = np.random.default_rng(5)
    labels = np.arange(images, dtype=np.int32) % classes
    final = np.where(generator.random(images) < 0.7, labels, (labels + 1) % classes).astype(np.int32)
    rough = labels.copy()
    rough[-1] = (labels[-1] + 3) % classes
    confidence = np.linspace(0.2, 0.99, images)
    selected = generator.integers(0, experts, images, dtype=np.int32)
    right = generator.random((images, experts)) < 0.6
    sure = generator.random(images, dtype=np.float32)
    return PerImage(np.arange(images), labels, rough, confidence, selected, sure, final, sure, right)


def test_figures_of_single_images_are_those_of_a_count(tmp_path: Path) -> None:
    rows, threshold = rows_of(), 0.8
    table = confusion(rows, threshold, 10).counts_CC
    answers = [
        int(rough if confidence >= threshold else final)
        for rough, confidence, final in zip(rows.delegator_class_N, rows.confidence_N, rows.final_class_N, strict=True)
    ]
    for true in range(10):
        for answer in range(10):
            counted = sum(pair == (true, answer) for pair in zip(rows.labels_N.tolist(), answers, strict=True))
            assert table[true, answer] == counted
    assert confusion(rows, threshold, 10).mistakes(1)[0][2] == (table - np.diag(np.diag(table))).max()
    right = rows.delegator_class_N == rows.labels_N
    for diagram, stated in ((reliability("d", rows.confidence_N, right), rows.confidence_N),):
        assert diagram.ece == pytest.approx(ece(stated, right))
        assert sum(b.images for b in diagram.bins) == len(rows)
    found = {s.name: s.top1 for s in standings(evaluation_of(tmp_path), rows)}
    assert found["selected"] == pytest.approx(np.mean([rows.right_NE[i, rows.selected_N[i]] for i in range(60)]))
    assert found["worst"] == rows.right_NE.all(1).mean()


def evaluation_of(folder: Path) -> Evaluation:
    evaluation = read_run(write_run(folder / "run")).evaluation
    assert evaluation is not None
    return evaluation


def with_rows(folder: Path, data: Path) -> Path:
    """A run whose evaluations are of the data set in `data`."""
    write_run(folder)
    labels = StoredImages(data / "validation.beton").labels_N[:60].astype(np.int32)
    rows = dataclasses.replace(rows_of(), labels_N=labels)
    evaluation = json.loads((folder / "evaluation-test.json").read_text()) | {"images": 60}
    (folder / "evaluation-test.json").write_text(json.dumps(evaluation))
    for split in ("test", "validation"):
        (folder / f"images-{split}.npz").write_bytes(rows.to_bytes())
    (folder / "config.yaml").write_text(f"data:\n  folder: {data}\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("fashion"))


def test_images_of_experts_and_of_the_delegator(data: Path, tmp_path: Path) -> None:
    page = Page(write_report([with_rows(tmp_path / "demo", data)]))
    check(page)
    assert "missing" not in page.text
    assert page.source.count("<svg") == 7
    rows = PerImage.read(tmp_path / "demo" / "images-validation.npz")
    early = rows.confidence_N >= 0.9
    assert page.source.count("<img") == page.source.count('src="data:image/png;base64,')
    shown = [min(8, int((rows.selected_N == j).sum())) for j in range(4)]
    wrong = (rows.final_class_N != rows.labels_N) & ~early
    shown += [min(8, int((wrong & (rows.selected_N == j)).sum())) for j in range(4)]
    right = rows.delegator_class_N == rows.labels_N
    shown += [min(8, int((early & right).sum()))] * 2 + [min(8, int((early & ~right).sum()))]
    assert page.source.count("<img") == sum(shown)
    assert "answered <b>Boot</b> & $co" in page.text


def test_a_data_set_that_is_gone_or_another_costs_only_the_images(data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(data, tmp_path / "data")
    folder = with_rows(tmp_path / "demo", data)
    (folder / "images-validation.npz").write_bytes(rows_of().to_bytes())
    for sentence in ("was written anew since the evaluation", "is not there"):
        page = Page(write_report([folder]))
        check(page)
        assert f"No images: {data}/validation.beton {sentence}." in page.text
        assert "Confusion matrix" in page.text
        (data / "validation.beton").unlink(missing_ok=True)
    (folder / "images-test.npz").write_bytes(rows_of(experts=3).to_bytes())
    (folder / "images-validation.npz").write_bytes(b"PK not a file of ours")
    page = Page(write_report([folder]))
    assert "images-test.npz is left out: it has another number of experts" in page.text
    assert "images-validation.npz is left out" in page.text


def test_similar_rows_become_neighbours() -> None:
    rows = np.array([[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 0.9], [0.95, 0.05]])
    order = clustered(rows)
    assert sorted(order) == list(range(5))
    assert {frozenset(order[:3]), frozenset(order[2:])} & {frozenset({0, 2, 4})}
    assert clustered(rows[:2]) == [0, 1]

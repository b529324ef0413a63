"""The report of made-up run folders: numbers present, names escaped, nothing to load, missing parts named."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from coe_dist.errors import InputError
from coe_dist.report import write_report
from coe_dist.report.build import macs, percent

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
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check(page: Page) -> None:
    """What holds for every report."""
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page.source)) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://(?!\*\*\*@)", page.source)
    assert "@import" not in page.source
    assert not {"script", "link", "iframe", "img", "object"} & page.tags
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
    assert "missing" not in page.text
    assert page.source.count("<svg") == 5
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
    assert page.source.count("<svg") == 3


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


def test_numbers_as_words() -> None:
    assert [macs(v) for v in (None, 12, 999, 42_000, 221_712, 1_934_000, 24_400_000, 2.5e9)] == [
        "–", "12", "999", "42.0k", "222k", "1.93M", "24.4M", "2.50G",
    ]  # fmt: skip
    assert [percent(v) for v in (None, 0.0, 0.86714, 1.0)] == ["–", "0.0", "86.7", "100.0"]

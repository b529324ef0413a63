"""The report of made-up run folders: numbers present, names escaped, nothing to load, missing parts named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_run import write_run, write_summary
from page import Page, check

from coe_dist.errors import InputError
from coe_dist.report import write_report
from coe_dist.report.card import write_card
from coe_dist.report.words import macs, percent


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
    settings = "trained collaboration collaboration one network alone single.network ? demo 4 experts"
    assert settings in page.text
    assert "a&b <i>" in page.text
    assert "<i>" not in page.source
    assert "Last validation top-1: 43.2%" in page.text
    assert "not finished" in page.text


def single_run(folder: Path, width: float) -> Path:
    """A baseline's run folder as far as it tells what was trained; its configuration is that of write_run's."""
    folder.mkdir()
    (folder / "network.json").write_text(json.dumps({"network": "small_cnn", "options": {"width": width}}))
    (folder / "config.yaml").write_text("name: x\ntracking:\n  uri: https://me:hunter2@tracker.example/x\n")
    (folder / "metrics.jsonl").write_text('{"kind": "start", "time": 0.0, "task": "baseline", "step": 0}\n')
    return folder


def test_what_was_trained_differs_where_configurations_do_not(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    none = "Settings that differ None, as far as their configurations tell."
    assert none in Page(write_report(runs)).text
    narrow, wide = single_run(tmp_path / "narrow", 0.25), single_run(tmp_path / "wide", 0.5)
    page = Page(write_report([runs[0], narrow, wide]))
    check(page)
    assert none not in page.text
    assert (
        "trained collaboration one network alone one network alone single.network small_cnn small_cnn "
        "single.options.width 0.25 0.5 a 4 experts"
    ) in page.text
    assert "One network alone, small_cnn (width 0.5);" in page.text
    page = Page(write_report([narrow, wide], tmp_path / "two.html"))
    assert "Settings that differ setting narrow wide single.options.width 0.25 0.5 narrow" in page.text
    assert none in Page(write_report([narrow, narrow], tmp_path / "same.html")).text
    assert r"baseline): small\_cnn \(width 0.5\)." in write_card(wide).read_text()


def test_the_card_names_a_data_set_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    for place, lines in (
        ("fashion-mnist", "- source: fashion-mnist\n- training images"),
        ("small", "- source: fashion-mnist\n- folder of the data set: small\n- training images"),
    ):
        (folder / "config.yaml").write_text(f"data:\n  source: fashion-mnist\n  folder: data/{place}\n")
        assert lines in write_card(folder).read_text()


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

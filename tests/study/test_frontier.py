"""The saving in MACs from rows made by hand: thresholds and the collaboration are chosen on validation alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from study_cases import curve_for, row_for
from test_schema import loaded

from coe_dist.study.comparison import percent, summarised
from coe_dist.study.cost import calibration, makespan
from coe_dist.study.display import show_study
from coe_dist.study.frontier import finished_points, frontier
from coe_dist.study.results import Results
from coe_dist.study.schema import StudyConfig
from coe_dist.study.tables import markdown, write_tables
from coe_dist.study.trainings import Training, trainings_of
from coe_dist.study.verify import allowed_difference, compared

CURVES = {
    "single": {"kind": "single", "points": {"b": ["experts.options.width=0.2"], "a": []}},
    "coe": {"kind": "collaboration", "points": {"good": [], "lucky": ["experts.count=4"]}},
}


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    frontier = {"single": ["single"], "collaborations": ["coe"], "draws": 1000}
    return loaded(tmp_path, curves=CURVES, frontier=frontier, baseline="coe/good")


def results_of(folder: Path, trainings: list[Training]) -> Results:
    """Single networks: 70% at 1,000 MACs and 80% at 100,000. On validation coe/good saves 5x at threshold 0.5,
    coe/lucky 2x; on test coe/lucky would save more."""
    results = Results(folder / "results", "tiny")
    for training in trainings:
        if training.kind == "single":
            macs, top1 = (1000, 0.7) if training.point == "a" else (100_000, 0.8)
            results.add(row_for(training, macs=macs, top1=top1), [])
        elif training.point == "good":
            shift = 0.01 * training.seed  # seeds 0 and 1: 0.745 and 0.755 on test
            curve = [(0.1, 200, 0.5, 200, 0.95), (0.5, 2000, 0.75, 4000, 0.745 + shift), (2.0, 9000, 0.75, 9000, 0.75)]
            results.add(row_for(training, macs=4000, top1=0.75), curve_for(training, curve))
        else:
            curve = [(0.1, 200, 0.5, 200, 0.5), (0.5, 5000, 0.75, 1000, 0.8), (2.0, 9000, 0.75, 9000, 0.78)]
            changes: dict[str, Any] = {"full_test_top1": 0.75 + 0.02 * training.seed, "oracle_top1": 0.9}
            results.add(row_for(training, macs=1000, top1=0.8, **changes), curve_for(training, curve))
    return results


def test_the_saving_by_hand(study: StudyConfig, tmp_path: Path) -> None:
    trainings = trainings_of(study)
    found = frontier(study, trainings, results_of(tmp_path, trainings))
    assert found is not None
    assert (found["complete"], found["seeds"]) == (True, [0, 1])
    saving = found["macs_saving"]
    assert (saving["curve"], saving["point"], saving["threshold"]) == ("coe", "good", 0.5)
    assert (saving["macs"], saving["top1"], saving["bound"]) == (4000, pytest.approx(0.75), "exact")
    assert saving["single_macs"] == pytest.approx(10_000)  # half way from 1,000 to 100,000
    assert saving["mean"] == pytest.approx(2.5)
    # two equal draws of a seed: top-1 0.745 or 0.755, which single networks reach at 10,000 * 10 ** -+0.1
    assert (saving["low"], saving["high"]) == pytest.approx((2.5 * 10**-0.1, 2.5 * 10**0.1))
    good, lucky = found["collaborations"]
    assert good["validation_saving"] == pytest.approx(5)
    assert lucky["validation_saving"] == pytest.approx(2)
    assert lucky["saving"]["mean"] == pytest.approx(100)
    assert lucky["bound"] == "exact"
    assert [point["macs"] for point in found["single"]] == [1000, 100_000]  # by rising MACs, not the file's order
    assert found["single"][0]["top1"] == {"mean": 0.7, "sd": 0.0, "seeds": 2}
    json.dumps(found)


def test_a_baseline_is_shown_and_never_the_saving(study: StudyConfig, tmp_path: Path) -> None:
    assert study.frontier is not None
    lone = {**study.curves, "apart": study.curves["coe"].model_copy(update={"points": {"better": ["experts.count=2"]}})}
    compared = study.frontier.model_copy(update={"baselines": ["apart"]})
    study = study.model_copy(update={"curves": lone, "frontier": compared})
    trainings = trainings_of(study)
    results = results_of(tmp_path, [t for t in trainings if t.curve != "apart"])
    for training in trainings:
        if training.curve == "apart":
            curve = [(0.5, 20, 0.75, 20, 0.75), (2.0, 9000, 0.75, 9000, 0.75)]
            results.add(row_for(training, macs=20, top1=0.75), curve_for(training, curve))
    found = frontier(study, trainings, results)
    assert found is not None
    assert [point["curve"] for point in found["collaborations"]] == ["coe", "coe", "apart"]
    assert found["macs_saving"]["point"] == "good"
    only_baselines = [t for t in trainings if t.kind == "single" or t.curve == "apart"]
    assert frontier(study, only_baselines, results) is None


def test_of_two_recipes_for_a_network_the_best_on_validation_counts(study: StudyConfig, tmp_path: Path) -> None:
    assert study.frontier is not None
    flipped = {"points": {"a": ["data.augmentation.flip=false"], "b": ["experts.options.width=0.3"]}}
    curves = {**study.curves, "flipped": study.curves["single"].model_copy(update=flipped)}
    study = study.model_copy(
        update={"curves": curves, "frontier": study.frontier.model_copy(update={"single": ["single", "flipped"]})}
    )
    trainings = trainings_of(study)
    results = results_of(tmp_path, [t for t in trainings if t.curve != "flipped"])
    for training in trainings:
        if training.curve == "flipped":  # the small one better on validation and worse on test; the other the reverse
            macs, val, test = (1000, 0.71, 0.65) if training.point == "a" else (100_000, 0.79, 0.85)
            results.add(row_for(training, macs=macs, top1=val, test_top1=test), [])
    found = frontier(study, trainings, results)
    assert found is not None
    assert [(point["curve"], point["point"]) for point in found["single"]] == [("flipped", "a"), ("single", "b")]
    assert [point["top1"]["mean"] for point in found["single"]] == pytest.approx([0.65, 0.8])
    # a recipe with a seed to go does not win by the other seed, and of equal ones the first counts
    partial = results_of(tmp_path / "partial", [t for t in trainings if t.curve != "flipped"])
    for training in trainings:
        if training.curve == "flipped" and (training.point == "b" or training.seed == 0):
            macs, top1 = (1000, 0.75) if training.point == "a" else (100_000, 0.8)
            partial.add(row_for(training, macs=macs, top1=top1), [])
    found = frontier(study, trainings, partial)
    assert found is not None
    assert [(point["curve"], point["point"]) for point in found["single"]] == [("single", "a"), ("single", "b")]


def test_thresholds_below_the_curve_are_not_chosen(study: StudyConfig, tmp_path: Path) -> None:
    """At threshold 0.1 the collaboration reaches 50% on validation, which no single network of the study is as low as:
    1,000 / 200 would look like a saving."""
    trainings = trainings_of(study)
    found = frontier(study, trainings, results_of(tmp_path, trainings))
    assert found is not None
    assert {point["threshold"] for point in found["collaborations"]} == {0.5}


def test_an_unfinished_study_says_so(study: StudyConfig, tmp_path: Path) -> None:
    trainings = trainings_of(study)
    results = results_of(tmp_path, [t for t in trainings if (t.label, t.seed) != ("coe/good", 1)])
    found = frontier(study, trainings, results)
    assert found is not None
    assert (found["complete"], found["seeds"]) == (False, [0])
    assert found["collaborations"][0]["top1"] == {"mean": pytest.approx(0.745), "sd": None, "seeds": 1}
    assert frontier(study, trainings, results_of(tmp_path / "other", trainings[:1])) is None


def test_points_are_compared_seed_by_seed(study: StudyConfig, tmp_path: Path) -> None:
    trainings = trainings_of(study)
    points = finished_points(trainings, results_of(tmp_path, trainings))
    lines = {f"{line['curve']}/{line['point']}": line for line in summarised(points, "coe/good")}
    assert list(lines) == ["single/b", "single/a", "coe/good", "coe/lucky"]
    assert lines["coe/good"]["difference"] is None
    lucky = lines["coe/lucky"]
    assert lucky["difference"]["mean"] == pytest.approx(0.01)  # 0 and 0.02 above 0.75
    assert lucky["difference"]["sd"] == pytest.approx(0.02 / math.sqrt(2))
    assert lucky["oracle_top1"] == {"mean": 0.9, "sd": 0.0, "seeds": 2}
    assert lines["single/a"]["oracle_top1"] is None
    assert percent(lucky["difference"], sign=True) == "+1.00 ± 1.41"
    assert percent({"mean": 0.5, "sd": None}) == "50.00"


def test_tables_hold_the_saving_and_every_point(study: StudyConfig, tmp_path: Path) -> None:
    trainings = trainings_of(study)
    results = results_of(tmp_path, trainings)
    points = summarised(finished_points(trainings, results), "coe/good")
    summary = {
        "finished": 8,
        "trainings": 8,
        "points": points,
        "frontier": frontier(study, trainings, results),
        "baseline": "coe/good",
    }
    text = markdown("tiny", summary)
    assert (
        "reaches 75.00 on test at 4,000 average MACs; single networks need 10,000 MACs: **a saving of 2.50x**" in text
    )
    assert "best on validation, with test top-1: single/a (70.00 ± 0.00), single/b (80.00 ± 0.00)." in text
    assert "| lucky | 4 | 2 | 1,000 | 80.00 ± 0.00 |" in text
    assert "+1.00 ± 1.41" in text
    paths = write_tables(tmp_path, "tiny", summary)
    assert [path.name for path in paths] == ["tiny.json", "tiny.md"]
    assert json.loads(paths[0].read_text())["macs_saving"]["mean"] == pytest.approx(2.5)


def test_the_terminal_shows_whole_names_and_no_empty_column(
    study: StudyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = [t for t in trainings_of(study) if t.kind == "single"]
    points = summarised(finished_points(trainings, results_of(tmp_path, trainings)), None)
    long = [{**point, "curve": "a-rather-long-name", "point": "with-a-long-point"} for point in points]
    show_study(
        {
            "study": "tiny",
            "finished": 4,
            "trainings": 4,
            "points": long,
            "frontier": None,
            "baseline": None,
            "files": [],
        }
    )
    out = capsys.readouterr().out
    assert "a-rather-long-name/with-a-long-point" in out
    assert "orac" not in out
    assert "test" in out


def test_a_second_training_may_differ_as_seeds_do(study: StudyConfig, tmp_path: Path) -> None:
    trainings = trainings_of(study)
    results = results_of(tmp_path, trainings)
    points = finished_points(trainings, results)
    # the points' deviations: 0 and 0.02 / sqrt(2), one degree of freedom each
    allowed = allowed_difference("coe", points)
    assert allowed == pytest.approx(3 * math.sqrt(2) * math.sqrt((0 + 0.0002) / 2))
    before = results.rows[0]
    slower = before.model_copy(update={"seconds": 99.0, "revision": "def"})
    assert compared(before, slower, 0.0)["equal"]
    other = before.model_copy(update={"full_test_top1": (before.full_test_top1 or 0) + 0.01})
    near, far = (compared(before, other, allowed) for allowed in (0.02, 0.009))
    assert (near["equal"], near["verified"], far["verified"]) == (False, True, False)


def test_seconds_left() -> None:
    assert calibration([]) == 1.0
    assert calibration([(10.0, 15.0), (30.0, 45.0)]) == pytest.approx(1.5)
    assert makespan([3.0, 1.0, 1.0, 4.0], 2) == 6.0  # 3 | 1, 1, 4
    assert makespan([3.0, 1.0], 1) == 4.0

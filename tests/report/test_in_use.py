"""What the report and the model card say after the exit threshold was changed: the figures in use, everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_run import rows_of, write_run, write_summary
from page import Page, check

from coe_dist.report import write_report
from coe_dist.report.card import write_card
from coe_dist.report.in_use import run_in_use
from coe_dist.tracking.per_image import PerImage


def change(path: Path, **figures: Any) -> None:
    content = json.loads(path.read_text())
    content["top1"] |= figures.pop("top1", {})
    path.write_text(json.dumps(content | figures))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "demo")
    write_summary(folder)
    return folder


def test_the_headline_is_what_a_newer_evaluation_found(run: Path) -> None:
    assert "When training ended" not in Page(write_report([run])).text
    change(run / "evaluation-test.json", top1={"coe": 0.8123}, average_macs=111_000, threshold=0.6)
    page = Page(write_report([run]))
    check(page)
    assert "Collaboration of Experts 81.2 111k 2 one expert network alone 85.6 +4.4 240k 1" in page.text
    assert "one network of about the CoE's MACs after training 86.0 +4.8 278k 1" in page.text
    assert "one network of 278k MACs" in page.text  # in the figure
    assert "the same MACs" not in page.text
    assert "threshold 0.6" in page.text
    assert "the collaboration had 86.7% at 222k MACs; it was evaluated or calibrated anew since." in page.text


def test_single_networks_stand_beside_figures_of_the_same_images(run: Path) -> None:
    (run / "evaluation-test.json").rename(run / "evaluation-validation.json")
    change(run / "evaluation-validation.json", split="validation")
    page = Page(write_report([run]))
    check(page)
    assert "Collaboration of Experts 86.7 222k 2 delegator alone 75.4" in page.text
    assert "one expert network" not in page.text
    (run / "evaluation-validation.json").unlink()
    assert "Collaboration of Experts 86.7 222k 2 one expert network alone 85.6 -1.1" in Page(write_report([run])).text


def with_kept(run: Path, threshold: float | None, rows: PerImage | None) -> None:
    """As `coe-dist calibrate` leaves a run: another threshold on validation, and none of the test's figures."""
    change(run / "evaluation-test.json", images=60, ece={"coe": 0.5, "delegator": 0.25})
    (run / "evaluation-validation.json").write_text((run / "evaluation-test.json").read_text())
    change(run / "evaluation-validation.json", split="validation", threshold=threshold, top1={"coe": 0.7777})
    if rows is not None:
        (run / "images-test.npz").write_bytes(rows.to_bytes())


@pytest.mark.parametrize("threshold", [0.5, None])
def test_figures_on_test_images_are_those_of_the_threshold_in_use(run: Path, threshold: float | None) -> None:
    rows = rows_of()
    with_kept(run, threshold, rows)
    found = run_in_use(run).evaluation
    assert found is not None
    early = [threshold is not None and confidence >= threshold for confidence in rows.confidence_N]
    answers = [rows.delegator_class_N[i] if early[i] else rows.final_class_N[i] for i in range(60)]
    top1 = sum(answer == label for answer, label in zip(answers, rows.labels_N, strict=True)) / 60
    assert (found.split, found.threshold, found.exit_rate) == ("test", threshold, sum(early) / 60)
    assert found.top1.coe == pytest.approx(top1)
    assert found.average_macs == 42_000 + round(240_000 * (60 - sum(early)) / 60)
    assert found.ece["coe"] not in (None, 0.5)
    assert found.ece["delegator"] == 0.25
    page = Page(write_report([run]))
    check(page)
    assert f"Collaboration of Experts {100 * top1:.1f}" in page.text
    assert "threshold 0.9:" not in page.text
    card = write_card(run).read_text()
    assert f"| collaboration | {100 * top1:.1f} |" in card
    assert ("from confidence 0.5000 on" in card) == (threshold is not None)
    assert "0.9000" not in card


def test_without_rows_the_figures_are_those_kept_on_validation(run: Path) -> None:
    with_kept(run, 0.5, None)
    page = Page(write_report([run]))
    check(page)
    assert "evaluation-test.json is left out: its exit threshold is no longer the one in use" in page.text
    assert "Collaboration of Experts 77.8" in page.text
    assert "Over 60 validation images" in page.text
    assert "On 60 validation images." in write_card(run).read_text()
    with_kept(run, 0.9, None)
    assert "left out" not in Page(write_report([run])).text

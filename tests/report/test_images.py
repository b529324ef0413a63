"""What the report makes of the answers to single images: figures, galleries, and data sets that are gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from made_run import rows_of, with_rows, write_run
from page import Page, check
from small_data import write_small

from coe_dist.coe.calibration import ece
from coe_dist.report import write_report
from coe_dist.report.folder import Evaluation, read_run
from coe_dist.report.heat import clustered
from coe_dist.report.quality import confusion, reliability, standings
from coe_dist.tracking.per_image import PerImage


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("fashion"))


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

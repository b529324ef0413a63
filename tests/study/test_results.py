"""The CSV files: what is written is read again, an untested row makes room for a tested one, damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_cases import curve_for, row_for
from test_schema import loaded

from coe_dist.errors import InputError
from coe_dist.study.outcome import free_exit
from coe_dist.study.results import Results
from coe_dist.study.trainings import Training, trainings_of


@pytest.fixture
def trainings(tmp_path: Path) -> list[Training]:
    return trainings_of(loaded(tmp_path))


def test_what_is_written_is_read_again(tmp_path: Path, trainings: list[Training]) -> None:
    single, _, coe, *_ = trainings
    results = Results(tmp_path / "results", "tiny")
    rows = [
        row_for(single, macs=4246, top1=0.1, test_top1=None, full_test_top1=None),
        row_for(coe, macs=1234.5, top1=0.8765, threshold=0.925, oracle_top1=0.5, overrides="a=1, b='2'"),
    ]
    curve = curve_for(coe, [(0.0, 10, 0.1, 11, 0.2), (2.0, 20, 0.3, None, None)])
    results.add(rows[0], [])
    results.add(rows[1], curve)
    again = Results(tmp_path / "results", "tiny")
    assert again.rows == rows
    assert again.curve_of(coe.digest) == curve
    assert again.curve_of(single.digest) == []
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["tiny-curves.csv", "tiny.csv"]


def test_a_tested_row_takes_the_place_of_an_untested_one(tmp_path: Path, trainings: list[Training]) -> None:
    coe = trainings[2]
    results = Results(tmp_path, "tiny")
    untested = row_for(coe, macs=1, top1=0.5, test_top1=None)
    results.add(untested, curve_for(coe, [(2.0, 1, 0.5, None, None)]))
    assert results.row_of(coe.digest, test=False) == untested
    assert results.row_of(coe.digest, test=True) is None
    tested = row_for(coe, macs=1, top1=0.5)
    results.add(tested, curve_for(coe, [(2.0, 1, 0.5, 1, 0.6)]))
    again = Results(tmp_path, "tiny")
    assert again.rows == [tested]
    assert again.row_of(coe.digest, test=False) == again.row_of(coe.digest, test=True) == tested
    assert [line.test_top1 for line in again.curve_of(coe.digest)] == [0.6]


def test_a_curve_without_its_row_is_none(tmp_path: Path, trainings: list[Training]) -> None:
    """A crash between the two files leaves such a curve; the training is done again."""
    coe = trainings[2]
    results = Results(tmp_path, "tiny")
    results.add(row_for(coe, macs=1, top1=0.5), curve_for(coe, [(2.0, 1, 0.5, 1, 0.6)]))
    results.rows_path.unlink()
    again = Results(tmp_path, "tiny")
    assert again.rows == again.curve_of(coe.digest) == []


def test_damage_is_named(tmp_path: Path, trainings: list[Training]) -> None:
    results = Results(tmp_path, "tiny")
    results.add(row_for(trainings[0], macs=1, top1=0.5), [])
    whole = results.rows_path.read_text()
    results.rows_path.write_text(whole.replace(",0.5,", ",half,", 1))
    with pytest.raises(InputError, match=r"tiny\.csv: line 2: val_top1: 'half' is not allowed"):
        Results(tmp_path, "tiny")
    results.rows_path.write_text(whole.replace("val_top1", "val_top5", 1))
    with pytest.raises(InputError, match=r"tiny\.csv: its columns are .*; give study, curve, point"):
        Results(tmp_path, "tiny")
    results.rows_path.write_text(whole[: whole.rindex(",")])  # a line that was cut short
    with pytest.raises(InputError, match=r"tiny\.csv: line 2: revision: None is not allowed"):
        Results(tmp_path, "tiny")


def test_the_free_exit_is_the_cheapest_that_costs_nothing_on_validation(trainings: list[Training]) -> None:
    coe = trainings[2]
    curve = curve_for(
        coe, [(0.5, 1, 0.7, 1, 0.9), (0.8, 2, 0.85, 2, 0.1), (0.9, 3, 0.84, 3, 0.1), (2.0, 4, 0.85, 4, 0.9)]
    )
    assert free_exit(curve).threshold == 0.8
    assert free_exit(curve[2:]).threshold == 2.0

"""Prediction spread over the workers of real Rays gives what one process gives, also when a worker dies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from namespaces import clean_environment, in_private_network, python

from coe_dist.orchestration.predict import predict

SCENARIO = Path(__file__).with_name("scenario_workers.py")


@pytest.fixture(scope="module")
def spread(
    small_predictor: tuple[Path, Path], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("workers")
    done = in_private_network(
        python(SCENARIO, str(small_predictor[1]), str(pictures), str(folder / "answers.csv")),
        env=clean_environment(XDG_STATE_HOME=str(folder / "state")),
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": folder, "stderr": done.stderr}


@pytest.fixture(scope="module")
def alone(small_predictor: tuple[Path, Path], pictures: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = predict(small_predictor[1], [str(pictures)], batch=1)["predictions"]
    return rows


def same(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert [row[field] for field in ("file", "class", "expert", "macs")] == [
        expected[field] for field in ("file", "class", "expert", "macs")
    ]
    assert row["probability"] == pytest.approx(expected["probability"], abs=1e-5)


def test_more_workers_than_cores_write_the_same_csv(
    spread: dict[str, Any],
    small_predictor: tuple[Path, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(pictures)
    result = predict(small_predictor[1], ["."], csv=tmp_path / "alone.csv", top=3, batch=7, keep_rows=False)
    spread_out = [line.split(",") for line in (spread["folder"] / "answers.csv").read_text().splitlines()]
    alone = [line.split(",") for line in (tmp_path / "alone.csv").read_text().splitlines()]
    assert len(spread_out) == len(alone) == 46
    for row, expected in zip(spread_out, alone, strict=True):
        for name, cell, wanted in zip(alone[0], row, expected, strict=True):
            if name.startswith("probability") and row is not spread_out[0]:
                assert float(cell) == pytest.approx(float(wanted), abs=1e-5)
            else:
                assert cell == wanted
    assert "predictions" not in result
    assert {**spread["spread"], "csv": ""} == {**result, "csv": ""}


def test_a_dead_workers_files_are_answered_once_and_in_order(
    spread: dict[str, Any], alone: list[dict[str, Any]]
) -> None:
    death = spread["death"]
    assert death["killed"] > 0
    assert death["left"] == []
    answered = [row for row in death["rows"] if "reason" not in row]
    assert len(death["rows"]) == len(answered) + 2
    for row, expected in zip(answered, alone, strict=True):
        expert = "early exit" if row["expert"] is None else row["expert"]
        same({**row, "class": row["classes"][0], "probability": row["probabilities"][0], "expert": expert}, expected)


def test_a_cluster_is_used_while_it_has_room_and_refused_at_once_when_it_has_not(
    spread: dict[str, Any], alone: list[dict[str, Any]]
) -> None:
    for row, expected in zip(spread["cluster"]["roomy"]["predictions"], alone, strict=True):
        same(row, expected)
    code, line = spread["cluster"]["full"]
    assert code == 2
    assert line.startswith("coe-dist: --workers: 1 is not allowed; the cluster at ")
    assert " has 0 free of " in line

"""Data and run in a store: training goes on where its folder is lost, and is read by its address."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from namespaces import clean_environment, in_private_network, python
from s3_server import BUCKET, KEYS
from scenario_train import STEPS

from coe_dist.tracking.store import connect

SCENARIO = Path(__file__).with_name("scenario_train.py")
TESTS = SCENARIO.parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    search = ":".join([clean_environment()["PYTHONPATH"], str(TESTS)])
    environment = clean_environment(OMP_NUM_THREADS="1", PYTHONPATH=search)
    done = in_private_network(python(SCENARIO, str(place)), cwd=place, env=environment, timeout=840)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def last_step(found: dict[str, Any]) -> int:
    return (found["step"] // STEPS + 1) * STEPS


def test_training_resumes_from_the_store(found: dict[str, Any]) -> None:
    first, second = found["answers"]["first"], found["answers"]["second"]
    assert first["code"] == 75, first
    assert f"preempted at step {found['step']}, resumable" in first["err"]
    assert "did not reach" not in first["err"], "all was sent before it ended"
    assert second["code"] == 0, second
    records = [json.loads(line) for line in found["metrics"].splitlines()]
    starts = [record for record in records if record["kind"] == "start"]
    assert [start.get("resumed_from") for start in starts] == [None, f"step-{found['step']:08d}"]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == list(range(1, last_step(found) + 1)), "each step once"


def test_each_machine_copied_each_file_once(found: dict[str, Any], place: Path) -> None:
    errors = found["answers"]["first"]["err"]
    for split in ("train", "validation", "test"):
        assert errors.count(f"copying s3://{BUCKET}/data/small/{split}.beton") == 1, errors
    assert "/data/small/" not in found["answers"]["second"]["err"], "the copies of the first training serve the second"
    staged = json.loads(found["answers"]["staged"]["out"])["copies"]
    assert sorted(Path(copy["file"]).name for copy in staged) == ["test.beton", "train.beton", "validation.beton"]
    assert not any(copy["in_use"] for copy in staged)


def test_the_store_holds_the_run_and_no_more_saves_than_are_kept(found: dict[str, Any]) -> None:
    names = {name.removeprefix("runs/run/") for name in found["names"]}
    assert {"config.yaml", "metrics.jsonl", "report.html", "evaluation-test.json", "checkpoints/latest"} <= names
    assert 2 <= len({name.split("/")[1] for name in names if name.startswith("checkpoints/step-")}) <= 3
    assert not [name for name in names if "partial" in name or name.startswith("ray/") or "/." in name]


def test_mlflow_has_one_run_with_each_step_once(found: dict[str, Any], place: Path) -> None:
    client = connect(f"sqlite:///{place}/runs/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/images_per_second")
    assert sorted(value.step for value in history) == list(range(1, last_step(found) + 1))
    sources = {entry.dataset.source for entry in run.inputs.dataset_inputs}
    assert json.dumps({"uri": f"s3://{BUCKET}/data/small/train.beton"}) in sources


def test_a_run_is_read_by_its_address(found: dict[str, Any]) -> None:
    report, inspected = found["answers"]["report"], found["answers"]["inspect"]
    assert report["code"] == 0, report
    assert "data:image/png;base64," in Path(report["out"].strip()).read_text(), "pictures from the staged copy"
    assert inspected["code"] == 0, inspected
    assert json.loads(inspected["out"])["step"] == last_step(found)


def test_a_bucket_that_is_not_there_is_one_line_before_any_worker(found: dict[str, Any]) -> None:
    nowhere = found["answers"]["nowhere"]
    assert nowhere["code"] == 2
    (line,) = nowhere["err"].strip().splitlines()
    assert line.startswith("coe-dist: s3://no-such-bucket/data/train.json: no such file in the store")


def test_what_gives_access_is_written_nowhere(found: dict[str, Any], place: Path) -> None:
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in json.dumps(found)
    for path in place.rglob("*"):
        if path.is_file():
            assert KEYS["AWS_SECRET_ACCESS_KEY"].encode() not in path.read_bytes(), path

"""A tracking server as cluster/ starts it, killed while a run trains: nothing is lost, and training does not wait."""

from pathlib import Path

import pytest
from namespaces import ROOT, scenario
from small_data import small_config, write_config, write_small

from coe_dist.tracking.store import connect

SCENARIO = Path(__file__).with_name("scenario_mlflow.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    content = small_config(
        write_small(folder / "data"),
        folder / "runs",
        training={"epochs": 100_000, "checkpoint_every": 100_000, "evaluate_every": 100_000},
        workers={"count": 1, "device": "cpu"},
        tracking={"enabled": True, "every_steps": 1, "uri": "http://127.0.0.1:5000"},
    )
    config = write_config(folder / "config.yaml", content)
    return {**scenario(SCENARIO, folder, config, ROOT, folder=folder), "folder": folder}


def test_training_goes_on_without_the_server_and_says_so_once(found):
    assert found["code"] == 75
    assert found["done"] > found["killed_at"] + 40
    told = [line for line in found["errors"].splitlines() if "MLflow does not take the metrics" in line]
    assert len(told) == 1, found["errors"]
    assert "metrics.jsonl keeps them for later" in told[0]


def test_what_was_missed_is_sent_by_itself_or_by_sync(found):
    assert found["sent_by_itself"]
    assert found["refused"]["code"] == 2
    (line,) = found["refused"]["err"].splitlines()
    assert line.startswith("coe-dist: tracking.uri: http://127.0.0.1:5000 did not take the metrics of ")
    assert found["sync"]["code"] == 0, found["sync"]
    assert int(found["sync"]["out"].split()[0].replace(",", "")) > 0
    assert found["again"]["out"] == "0 values sent\n"


def test_mlflow_has_every_step_and_the_end(found):
    client = connect(f"sqlite:///{found['folder'] / 'store' / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == list(range(1, found["done"] + 1))
    assert run.info.status == "KILLED"

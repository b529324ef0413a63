"""The product as a user runs it: the real command line, Ray, DeepSpeed, FFCV and MLflow, on real images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from namespaces import clean_environment, in_private_network, private_network_command
from waiting import until

from coe_dist.data.beton import write_dataset
from coe_dist.data.sidecar import read_sidecar
from coe_dist.tracking.store import connect

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "from coe_dist.cli import main; main()"]
SMALL = ["data.limit=600", "training.global_batch=100", "experts.options.width=0.2", "delegator.options.width=0.1"]
DEMO = ["demo", str(ROOT / "configs/fashion_mnist.yaml"), "training.epochs=1", "workers.oversubscribe=true", *SMALL]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("user")
    write_dataset("fashion-mnist", place / "data/fashion-mnist")
    return place


def statuses(runs: Path) -> dict[str, str]:
    """MLflow's own view of the runs: name -> status."""
    client = connect(f"sqlite:///{runs / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.run_name: run.info.status for run in client.search_runs(experiments)}


def mlflow_run(runs: Path, name: str) -> Any:
    client = connect(f"sqlite:///{runs / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"attributes.run_name = '{name}'")
    return run


def artifacts(runs: Path, name: str) -> set[str]:
    run = mlflow_run(runs, name)
    assert Path(run.data.tags["checkpoints"], "latest").is_file()
    return {item.path for item in connect(f"sqlite:///{runs / 'mlflow.db'}").list_artifacts(run.info.run_id)}


def test_demo_trains_three_systems_and_compares_them(place: Path) -> None:
    done = in_private_network([*COMMAND, *DEMO], cwd=place, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    run = place / "runs/demo"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) >= {"coe", "single", "single_same_macs", "seconds", "seed"}
    assert set(summary["seconds"]) == {"data", "train_coe", "train_single", "evaluate"}
    for system, macs in (("coe", "average_macs"), ("single", "macs"), ("single_same_macs", "macs")):
        assert 0 < summary[system]["top1"] < 1
        assert isinstance(summary[system][macs], int)
    assert 1 <= summary["single_same_macs"]["macs"] / summary["coe"]["average_macs"] < 1.3
    for text in ("collaboration of experts", "one expert network alone", "report.html"):
        assert text in done.stdout
    assert f"{100 * summary['coe']['top1']:.1f}" in (run / "report.html").read_text()
    written = {"config.yaml", "evaluation-test.json", "images-test.npz", "summary.json", "report.html", "model-card.md"}
    assert artifacts(place / "runs", "demo") >= written
    for name in ("demo", "demo-single"):
        record = mlflow_run(place / "runs", name)
        assert set(record.data.tags) >= {"host", "world_size", "kind"}
        used = {entry.tags[0].value: entry.dataset for entry in record.inputs.dataset_inputs}
        assert set(used) == {"training", "validation", "test"}
        info = read_sidecar(place / "data/fashion-mnist/test.beton")
        assert used["test"].digest == info.sha256[:16]
        assert json.loads(used["test"].profile)["num_rows"] == 600
        groups = {metric.split("/")[0] for metric in record.data.metrics}
        assert groups == {"train", "val", "system", "checkpoint", *({"expert"} if name == "demo" else ())}
    card = (run / "model-card.md").read_text()
    assert f"| collaboration | {100 * summary['coe']['top1']:.1f} |" in card
    assert statuses(place / "runs") == {name: "FINISHED" for name in ("demo", "demo-single", "demo-single-same-macs")}


def test_evaluate_prints_the_contract(place: Path) -> None:
    run = place / "runs/demo"
    stored = json.loads((run / "evaluation-test.json").read_text())
    done = in_private_network([*COMMAND, "evaluate", str(run), "--json"], cwd=place, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert {"split", "images", "top1", "exit_rate", "average_macs", "load", "threshold", "curve"} <= set(result)
    assert result["images"] == 600
    assert result["top1"] == stored["top1"], "the checkpoint gives what training reported"
    assert all(set(point) == {"threshold", "exit_rate", "average_macs", "top1"} for point in result["curve"])


@contextmanager
def training(place: Path, name: str, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """`coe-dist train` with far too many epochs, from its first training record on."""
    run = place / "runs" / name
    arguments = ["train", str(ROOT / "configs/fashion_mnist.yaml"), f"name={name}", "training.epochs=10000", *SMALL]
    process = subprocess.Popen(
        private_network_command([*COMMAND, *arguments, "workers.oversubscribe=true", *overrides]),
        cwd=place,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        record = run / "metrics.jsonl"
        until(lambda: record.is_file() and '"kind": "train"' in record.read_text(), "steps", process=process)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_ends_the_run_as_killed(place: Path) -> None:
    with training(place, "interrupted", "training.checkpoint_every=10000") as process:
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert "coe-dist: interrupted" in errors.splitlines()
    assert statuses(place / "runs")["interrupted"] == "KILLED"


def test_a_wish_to_stop_ends_the_run_saved(place: Path) -> None:
    run = place / "runs/stopped"
    run.mkdir(parents=True)
    (run / "stop-requested").touch()  # of an earlier start: it must not stop this one before its first record
    with training(place, "stopped", "training.checkpoint_every=10000", "training.evaluate_every=10000") as process:
        (run / "stop-requested").touch()
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 75, errors
    step = json.loads((run / "preempted").read_text())["step"]
    assert step > 1
    assert f"coe-dist: preempted at step {step}, resumable: the same command goes on from there" in errors.splitlines()
    assert (run / "checkpoints/latest").read_text() == f"step-{step:08d}"
    assert not (run / "stop-requested").exists()
    assert not (run / "report.html").exists()
    assert statuses(place / "runs")["stopped"] == "KILLED"


def test_the_demo_after_another_budget_keeps_its_baselines(place: Path) -> None:
    run, network = place / "runs/demo", place / "runs/demo-single-same-macs/network.json"
    before = json.loads((run / "evaluation-test.json").read_text())["average_macs"], network.read_text()
    evaluate = ["evaluate", str(run), "--macs-budget", str(0.6 * before[0])]
    done = in_private_network([*COMMAND, *evaluate], cwd=place, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((run / "evaluation-test.json").read_text())["average_macs"] < 0.8 * before[0]
    done = in_private_network([*COMMAND, *DEMO], cwd=place, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    assert network.read_text() == before[1]

"""Tracking against real MLflow stores: an sqlite file and a server on the loopback that dies and comes back."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import free_port

from coe_dist.config import RunConfig, parse_config
from coe_dist.errors import InputError
from coe_dist.tracking import (
    Recorder,
    finish_run,
    log_artifacts,
    log_datasets,
    read_metrics,
    run_id_of,
    start_run,
    sync,
    tracking_uri,
    ui_command,
)
from coe_dist.tracking.datasets import DataUsed
from coe_dist.tracking.store import connect, flatten, legal_name, redact


@pytest.fixture(autouse=True)
def _no_outside_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def configuration(tmp_path: Path, name: str = "first", **more: Any) -> RunConfig:
    return parse_config({"name": name, "runs_dir": str(tmp_path / "runs"), **more})


def history(config: RunConfig, run_id: str, name: str, uri: str | None = None) -> list[tuple[int, float]]:
    client = connect(uri or tracking_uri(config))
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, legal_name(name)))


def test_a_run_in_sqlite_from_start_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configuration(tmp_path)
    run_id = start_run(config, run_name="first run", tags={"git@commit": "abc"}, params={"world_size": 2})
    assert run_id is not None
    assert run_id_of(config.run_dir) == run_id
    with Recorder(config.run_dir, config, run_id) as recorder:
        recorder.record("start", step=0, task="train", experts=4)
        for step in range(1, 4):
            values = {"train/loss": 1 / step, "acc@1": np.float32(0.5), "acc%1": torch.tensor(0.25), "bad": "text"}
            recorder.record("train", step=step, epoch=0, metrics=values)
        recorder.record(
            "evaluation", step=3, epoch=0, split="validation", metrics={"val/top1": math.nan, "x": math.inf}
        )
        assert recorder.flush(60)
        recorder.record("end", step=3, seconds=1.5)
    config.run_dir.joinpath("report.html").write_text("<html>")
    (config.run_dir / "plots").mkdir()
    (config.run_dir / "plots" / "a.txt").write_text("a")
    log_artifacts(config, run_id, [config.run_dir / "report.html", config.run_dir / "plots", tmp_path / "missing"])
    finish_run(config, run_id, "FINISHED")

    client = connect(tracking_uri(config))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first run"
    assert run.data.tags["git_at_commit"] == "abc"
    assert run.data.params["training.optimizer.learning_rate"] == "0.1"
    assert run.data.params["experts.per_sample"] == "none"
    assert run.data.params["world_size"] == "2"
    assert history(config, run_id, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert history(config, run_id, "acc@1") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert history(config, run_id, "acc%1") == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert math.isnan(history(config, run_id, "val/top1")[0][1])
    assert history(config, run_id, "x")[0][1] > 1e300
    assert {entry.path for entry in client.list_artifacts(run_id)} == {"report.html", "plots"}
    artifacts = list((tmp_path / "runs" / "mlartifacts").rglob("report.html"))
    assert len(artifacts) == 1
    assert sync(config.run_dir, config) == 0
    assert not [record for record in caplog.records if record.name.startswith("coe_dist")]

    records = list(read_metrics(config.run_dir))
    assert [r["kind"] for r in records] == ["start", "train", "train", "train", "evaluation", "end"]
    assert set(records[1]["metrics"]) == {"train/loss", "acc@1", "acc%1"}
    assert math.isnan(records[4]["metrics"]["val/top1"])
    for line in (config.run_dir / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_reopening_with_other_settings_keeps_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configuration(tmp_path)
    run_id = start_run(config, run_name="r", params={"world_size": 2})
    assert run_id is not None
    finish_run(config, run_id, "FAILED")
    again = configuration(tmp_path, training={"epochs": 99})
    assert start_run(again, run_name="r", params={"world_size": 3, "new": "x" * 900}, run_id=run_id) == run_id
    client = connect(tracking_uri(config))
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["training.epochs"] == "10"
    assert run.data.tags["resumed.training.epochs"] == "99"
    assert run.data.tags["resumed.world_size"] == "3"
    assert len(run.data.params["new"]) == 500
    assert not [record for record in caplog.records if record.name.startswith("coe_dist")]
    other = start_run(config, run_name="r", run_id="0" * 32)  # made in another store
    assert other is not None
    assert other != run_id


def test_a_step_recorded_again_after_a_resume_is_sent_once(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    run_id = start_run(config, run_name="r")
    assert run_id is not None
    for steps in (range(1, 6), range(4, 9)):  # the second process starts from a checkpoint at step 3
        with Recorder(config.run_dir, config, run_id) as recorder:
            for step in steps:
                recorder.record("train", step=step, epoch=0, metrics={f"expert/{e:02d}/load": e for e in range(600)})
            assert recorder.flush(60)
    assert [step for step, _ in history(config, run_id, "expert/07/load")] == list(range(1, 9))
    (config.run_dir / "mlflow-sync.json").unlink()  # as if the process died before it wrote its position
    sync(config.run_dir, config)
    assert [step for step, _ in history(config, run_id, "expert/599/load")] == list(range(1, 9))
    assert len(list(read_metrics(config.run_dir))) == 10


def test_the_data_of_a_run_is_recorded_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configuration(tmp_path)
    run_id = start_run(config, run_name="r")
    data = DataUsed("ours " * 200, "training", "a" * 64, str(tmp_path / "train.beton"), {"num_rows": 3})
    for _ in range(2):  # a resumed run says it again
        log_datasets(config, run_id, [data])
    assert run_id is not None
    (entry,) = connect(tracking_uri(config)).get_run(run_id).inputs.dataset_inputs
    assert json.loads(entry.dataset.source) == {"uri": str(tmp_path / "train.beton")}
    assert json.loads(entry.dataset.profile) == {"num_rows": 3}
    assert entry.dataset.digest == "a" * 36
    assert not [record for record in caplog.records if record.name.startswith("coe_dist")]


def test_a_folder_without_its_store_makes_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configuration(tmp_path)
    run_id = start_run(config, run_name="r")
    (config.run_dir / "report.html").write_text("<html>")
    (tmp_path / "runs" / "mlflow.db").unlink()  # as in a copy of the run folder on another machine
    log_artifacts(config, run_id, [config.run_dir / "report.html"])
    assert "mlflow.db is not there" in caplog.text
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_a_torn_line_costs_that_line_only(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.run_dir.mkdir(parents=True)
    whole = {"kind": "train", "time": 1.0, "step": 1, "epoch": 0, "metrics": {"a": 1}}
    (config.run_dir / "metrics.jsonl").write_text(json.dumps(whole) + "\n" + '{"kind":"train","time":2.0,"st')
    with Recorder(config.run_dir, config, None) as recorder:
        recorder.record("train", step=3, epoch=0, metrics={"a": 3})
    assert [r["step"] for r in read_metrics(config.run_dir)] == [1, 3]
    assert sync(config.run_dir, config) == 2  # no run yet: one is made
    run_id = run_id_of(config.run_dir)
    assert run_id is not None
    assert history(config, run_id, "a") == [(1, 1.0), (3, 3.0)]


def test_a_full_disk_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configuration(tmp_path)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "metrics.jsonl").symlink_to("/dev/full")
    with Recorder(config.run_dir, config, None) as recorder:
        for step in range(5):
            recorder.record("train", step=step, epoch=0, metrics={"a": 1})
    assert len(caplog.records) == 1
    assert "metrics cannot be written" in caplog.text


def test_nothing_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"http://user:hunter2@127.0.0.1:{free_port()}"
    config = configuration(tmp_path, tracking={"uri": uri})
    assert start_run(config, run_name="r") is None
    assert start_run(config, run_name="r", run_id="0" * 32) == "0" * 32
    caplog.clear()
    recorder = Recorder(config.run_dir, config, "0" * 32)
    for step in range(1, 200):
        recorder.record("train", step=step, epoch=0, metrics={"a": step})
    recorder.flush(30)
    assert recorder.flush(30) is False  # at once, while the server does not answer
    recorder.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    finish_run(config, "0" * 32, "FINISHED")
    log_artifacts(config, "0" * 32, [config.run_dir])
    log_datasets(config, "0" * 32, [DataUsed("d", "training", "1" * 16, str(tmp_path / "d.beton"), {})])
    assert len(list(read_metrics(config.run_dir))) == 199
    with pytest.raises(InputError, match="did not take the metrics") as raised:
        sync(config.run_dir, config)
    assert "hunter2" not in caplog.text + str(raised.value) + (config.run_dir / "mlflow-run.json").read_text()


def test_a_server_that_accepts_and_says_nothing(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        config = configuration(tmp_path, tracking={"uri": f"http://127.0.0.1:{silent.getsockname()[1]}"})
        recorder = Recorder(config.run_dir, config, "0" * 32)
        recorder.record("train", step=1, epoch=0, metrics={"a": 1})
        recorder.close(timeout=2)
    assert len(list(read_metrics(config.run_dir))) == 1


def test_tracking_switched_off(tmp_path: Path) -> None:
    config = configuration(tmp_path, tracking={"enabled": False})
    assert start_run(config, run_name="r") is None
    with Recorder(config.run_dir, config, None) as recorder:
        recorder.record("train", step=1, epoch=0, metrics={"a": 1})
    finish_run(config, None, "FINISHED")
    assert sorted(p.name for p in (tmp_path / "runs").rglob("*") if p.is_file()) == ["metrics.jsonl"]


class Server:
    """A real `mlflow server` with the command that `coe-dist ui` uses."""

    def __init__(self, runs_dir: Path, port: int) -> None:
        runs_dir.mkdir(parents=True, exist_ok=True)
        (runs_dir / "mlflow.db").touch()
        self.url = f"http://127.0.0.1:{port}"
        command, environment = ui_command(runs_dir, port)
        self.log = runs_dir / f"server-{time.time()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        pytest.fail(f"no answer from mlflow server:\n{self.log.read_text()}")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the server and its worker, nothing else
        self.process.wait()


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    started: list[Server] = []
    yield started
    for server in started:
        server.kill()


def test_a_server_that_dies_and_comes_back(
    tmp_path: Path, servers: list[Server], caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    servers.append(Server(tmp_path / "store", port))
    servers[0].wait()
    config = configuration(tmp_path, tracking={"uri": servers[0].url})
    run_id = start_run(config, run_name="r")
    assert run_id is not None
    recorder = Recorder(config.run_dir, config, run_id)
    for step in range(1, 11):
        recorder.record("train", step=step, epoch=0, metrics={"a": step, "b": math.nan})
    assert recorder.flush(60)
    servers[0].kill()
    for step in range(11, 31):
        recorder.record("train", step=step, epoch=0, metrics={"a": step, "b": math.inf})
    assert not recorder.flush(60)
    recorder.close()
    finish_run(config, run_id, "FINISHED")
    assert len(caplog.records) == 2  # one of the recorder, one of finish_run
    assert json.loads((config.run_dir / "mlflow-sync.json").read_text())["offset"] > 0

    servers.append(Server(tmp_path / "store", port))
    servers[1].wait()
    assert sync(config.run_dir, config) == 40
    assert sync(config.run_dir, config) == 0
    assert history(config, run_id, "a") == [(step, float(step)) for step in range(1, 31)]
    assert len(history(config, run_id, "b")) == 30
    client = connect(servers[1].url)
    assert client.get_run(run_id).info.status == "FINISHED"
    config.run_dir.joinpath("report.html").write_text("<html>")
    log_artifacts(config, run_id, [config.run_dir / "report.html"])
    assert [entry.path for entry in client.list_artifacts(run_id)] == ["report.html"]


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = parse_config({"name": "r", "runs_dir": "runs"})
    assert tracking_uri(relative) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert (
        tracking_uri(parse_config({"name": "r", "tracking": {"uri": "sqlite:///a.db"}})) == f"sqlite:///{tmp_path}/a.db"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert tracking_uri(relative) == "http://somewhere:5000"
    with pytest.raises(InputError, match="is a server already"):
        ui_command(relative)
    with pytest.raises(InputError, match="no such file"):
        ui_command(tmp_path)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://me:p@ss@db.example/mlflow", "postgresql://***@db.example/mlflow"),
        ("http://host/x?api_key=1234&a=b", "http://host/x?api_key=***&a=b"),
        ("mysql://host/db?ssl=1&password=s3cret", "mysql://host/db?ssl=1&password=***"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
    ],
)
def test_credentials_are_taken_out(text: str, clean: str) -> None:
    assert redact(text) == clean
    assert flatten({"tracking": {"uri": text, "password": "x"}}) == {"tracking.uri": clean, "tracking.password": "***"}


@given(st.text(max_size=400))
def test_every_name_becomes_legal(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    _validate_metric_name(legal_name(name))
    _validate_param_name(legal_name(name))
    assert 0 < len(legal_name(name)) <= 250

"""The real command loses workers, inside a save too, and its machine: it goes on, in one MLflow run, without a gap."""

import itertools
import json
import os
import random
import signal
import threading
import time

import pytest
from small_data import small_config, write_config, write_small
from train_command import Command, only_mlflow_run

from coe_dist.tracking import read_metrics
from coe_dist.training.checkpoint import complete_saves, damage


class Watched(threading.Thread):
    """Verifies every save that `latest` names, from the moment it is named."""

    def __init__(self, run):
        super().__init__(daemon=True)
        self.checkpoints, self.verified, self.broken, self.ended = run / "checkpoints", set(), [], threading.Event()

    def newest(self):
        try:
            return (self.checkpoints / "latest").read_text()
        except FileNotFoundError:
            return ""

    def run(self):
        while not self.ended.wait(0.005):
            name = self.newest()
            if not name:
                continue
            problem = damage(self.checkpoints / name)
            if not problem:
                self.verified.add(name)
            elif self.newest() == name:  # else a newer one took its place, and it was removed meanwhile
                self.broken.append((name, problem))


def inside_a_save(command):
    """Waits until a save is being written."""
    command.until(lambda: any(command.run.glob("checkpoints/.partial-step-*")), "save")


def at_random(command):
    time.sleep(random.Random(0).uniform(0.0, 0.5))


def lose_worker(command, moment, number, starts):
    """Kills a worker at `moment`; returns the seconds from its death to the first new step."""
    workers = command.workers()
    assert len(workers) == 2
    moment(command)
    workers[number].kill()
    died = time.time()
    command.until(lambda: len(command.records("start")) == starts, "restart")
    return command.started(starts)["time"] - died


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param([(at_random, 0), (inside_a_save, 1)], id="twice"),
        pytest.param(
            [(moment, number) for moment, number in itertools.product((at_random, inside_a_save), (0, 1))] * 3,
            id="a dozen times",
            marks=[pytest.mark.full, pytest.mark.timeout(1800)],
        ),
    ],
)
def test_lost_workers_and_a_preemption_cost_no_more_than_the_unsaved_steps(tmp_path, moments):
    data, run = write_small(tmp_path / "data"), tmp_path / "runs" / "run"
    content = small_config(
        data,
        run.parent,
        training={"epochs": 100_000, "checkpoint_every_steps": 1, "evaluate_every": 100_000},
        workers={"oversubscribe": True, "max_failures": len(moments)},
        tracking={"enabled": True, "every_steps": 1},
    )
    config, watched = write_config(tmp_path / "config.yaml", content), Watched(run)
    command = Command(config, run)
    watched.start()
    try:
        command.started(1)
        seconds = [lose_worker(command, moment, number, starts) for starts, (moment, number) in enumerate(moments, 2)]
        print("seconds from a death to the first new step:", [round(each, 1) for each in seconds])
        os.kill(command.process.pid, signal.SIGTERM)
        code, _, errors = command.end()
        assert code == 75, errors
        (preempted,) = command.records("preempted")
        step = preempted["step"]
        told = [line for line in errors.splitlines() if "worker died" in line]
        assert len(told) == len(moments)
        for number, line in enumerate(told, 1):
            assert line.startswith("a worker died (the process of rank ")
            assert line.endswith(f"); restarting from the newest checkpoint, failure {number} of {len(moments)}")
        assert (
            errors.splitlines()[-1]
            == f"coe-dist: preempted at step {step}, resumable: the same command goes on from there"
        )
        assert json.loads((run / "preempted").read_text()) == {"step": step}
        assert not (run / "stop-requested").exists()
        assert not (run / "report.html").exists()
        mlflow_run = only_mlflow_run(run)
        assert (mlflow_run.info.status, mlflow_run.data.tags["preempted"]) == ("KILLED", "true")
        assert complete_saves(run / "checkpoints")[0].name == f"step-{step:08d}"
    finally:
        command.close()

    (run / "stop-requested").touch()  # a stale one must not stop the next start
    again = Command(config, run, f"training.epochs={step // 4 + 1}", "training.evaluate_every=1")
    try:
        code, output, errors = again.end()
        assert code == 0, errors
        assert "collaboration of experts" in output
    finally:
        again.close()
        watched.ended.set()
        watched.join()
    assert (run / "report.html").is_file()
    assert not (run / "preempted").exists()
    after = only_mlflow_run(run)
    assert after.info.run_id == mlflow_run.info.run_id
    assert (after.info.status, after.data.tags["preempted"]) == ("FINISHED", "false")
    assert watched.broken == []
    assert len(watched.verified) > 2 * len(moments)
    check_steps(run, len(moments) + 2, step)


def check_steps(run, starts, preempted_step):
    """Every start goes on from a save of at most three steps ago (one is written while the next step runs)."""
    done, begun = 0, []
    for record in read_metrics(run):
        if record["kind"] == "start":
            assert done - 3 <= record["step"] <= done
            done = record["step"]
            begun.append(done)
        elif record["kind"] == "train":
            assert record["step"] == done + 1
            assert record["epoch"] == done // 4
            done += 1
    assert len(begun) == starts
    assert begun[0] == 0
    assert min(begun[1:]) > 0
    assert begun[-1] == preempted_step
    assert done == 4 * (preempted_step // 4 + 1)

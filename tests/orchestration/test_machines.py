"""Training across machines with addresses of their own: one is cut off, another is killed, and the run goes on from its
saves on what is left."""

import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from namespaces import clean_environment, machines
from small_data import small_config, write_config, write_small
from train_command import COMMAND, only_mlflow_run
from waiting import PATIENCE_SECONDS, until

from coe_dist.orchestration.processes import end_marked, marked_processes, marking_variable, new_mark
from coe_dist.orchestration.worker_output import warnings_log
from coe_dist.tracking import read_metrics
from coe_dist.training.stopping import preempted_at, request_stop

RAY = str(Path(sys.executable).with_name("ray"))


class Cluster:
    """A Ray head on machine 0, which trains nothing, and one core on each machine that joins."""

    def __init__(self, network, folder):
        self.network, self.folder, self.marks = network, folder, {}
        self.address = f"{network.addresses[0]}:6379"
        self.environment = clean_environment(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_USAGE_STATS_ENABLED="0",
            GLOO_SOCKET_IFNAME="va",
            RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="10",
            # a machine that is silent for some seconds is gone (Ray's own limit is above a minute)
            RAY_health_check_initial_delay_ms="1000",
            RAY_health_check_period_ms="2000",
            RAY_health_check_timeout_ms="2000",
            RAY_health_check_failure_threshold="4",
        )

    def start(self, number):
        mark = self.marks[number] = new_mark()
        command = [RAY, "start", f"--node-ip-address={self.network.addresses[number]}", "--num-gpus=0"]
        command += [f"--temp-dir={self.folder / str(number)}", f"--object-store-memory={80 * 2**20}"]
        if number == 0:
            command += ["--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false"]
        else:
            command += [f"--address={self.address}", "--num-cpus=1"]
        environment = self.environment | marking_variable(mark)
        done = subprocess.run(
            self.network.command(number, command), env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def kill(self, number):
        for process in marked_processes(self.marks[number]):
            process.kill()

    def train(self, config):
        command = [*COMMAND, str(config), "--address", self.address]
        return subprocess.Popen(
            self.network.command(0, command),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def close(self):
        for mark in self.marks.values():
            end_marked(mark, grace_seconds=0.1)


@pytest.fixture
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="m", dir="/tmp"))  # a short path: Ray's sockets lie below it
    with machines(4) as network:
        made = Cluster(network, folder)
        try:
            yield made
        finally:
            made.close()
            shutil.rmtree(folder, ignore_errors=True)


class Watched:
    """A command that trains, and what its run folder says."""

    def __init__(self, cluster, config, run):
        self.process, self.run = cluster.train(config), run

    def records(self, kind):
        return [record for record in read_metrics(self.run) if record["kind"] == kind]

    def until(self, found, what):
        return until(found, what, process=self.process)

    def trained(self, starts):
        """Waits for the given start and some steps and a save after it."""

        def found():
            begun = self.records("start")[starts - 1 :]
            saved = begun and any(save["time"] > begun[-1]["time"] for save in self.records("checkpoint"))
            return begun[-1] if saved else None

        return self.until(found, f"start {starts}")

    def stopped(self):
        """What it has told, after a wish to stop."""
        request_stop(self.run)
        _, errors = self.process.communicate(timeout=PATIENCE_SECONDS)
        assert self.process.returncode == 75, errors
        return errors

    def close(self):
        if self.process.poll() is None:
            self.process.kill()


def test_a_run_outlives_a_machine_cut_off_and_a_machine_killed(cluster, tmp_path):
    content = small_config(
        write_small(tmp_path / "data"),
        tmp_path / "runs",
        training={
            "epochs": 100_000,
            "checkpoint_every_steps": 3,
            "evaluate_every": 100_000,
            "timeout_seconds": 20,
        },
        workers={"min": 1, "max": 2, "device": "cpu", "max_failures": 3},
        tracking={"enabled": True, "every_steps": 1},
    )
    run = tmp_path / "runs" / "run"
    for number in (0, 1, 2):
        cluster.start(number)
    command = Watched(cluster, write_config(tmp_path / "config.yaml", content), run)
    try:
        assert command.trained(1)["world_size"] == 2
        cluster.network.unplug(1)  # in the middle of an epoch: nobody says goodbye
        alone = command.trained(2)
        assert alone["world_size"] == 1
        cluster.start(3)
        cluster.kill(2)
        other = command.trained(3)
        assert other["world_size"] == 1
        errors = command.stopped()
    finally:
        command.close()
    # a machine that is killed may be known to Ray before its worker is missed; that costs no failure
    told = [line for line in errors.splitlines() if "restarting from the newest checkpoint" in line]
    assert len(told) == 2, errors
    assert told[0].endswith("failure 1 of 3")

    done = 0
    for record in read_metrics(run):  # each start goes on from a save, and no step is left out
        if record["kind"] == "start":
            assert done - 6 <= record["step"] <= done
            assert record["step"] > 0 or done == 0
            done = record["step"]
        elif record["kind"] == "train":
            done += 1
            assert record["step"] == done
    assert done == preempted_at(run)
    assert only_mlflow_run(run).info.status == "KILLED"


def told_to(run):
    path = warnings_log(run)
    return path.read_text() if path.exists() else ""


def test_a_run_waits_for_the_machines_that_a_cluster_has_yet_to_start(cluster, tmp_path):
    content = small_config(
        write_small(tmp_path / "data"),
        tmp_path / "runs",
        training={"epochs": 100_000, "checkpoint_every_steps": 3, "evaluate_every": 100_000},
        workers={"count": 2, "device": "cpu", "wait_minutes": 10},
        tracking={"enabled": False, "every_steps": 1},
    )
    config, run = write_config(tmp_path / "config.yaml", content), tmp_path / "runs" / "run"
    cluster.start(0)
    command = Watched(cluster, config, run)
    try:
        command.until(lambda: "waiting for room for 2 workers" in told_to(run), "wait")
        cluster.start(1)
        cluster.start(2)
        assert command.trained(1)["world_size"] == 2
        command.stopped()
    finally:
        command.close()

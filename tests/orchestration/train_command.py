"""`coe-dist train`, the real command, in a network of its own: started, watched and asked about what it wrote."""

import os
import signal
import subprocess
import sys

import psutil
from namespaces import clean_environment, private_network_command
from waiting import PATIENCE_SECONDS, until

from coe_dist.tracking import read_metrics
from coe_dist.tracking.store import connect

COMMAND = [sys.executable, "-c", "from coe_dist.cli import main; main()", "train"]


class Command:
    """`coe-dist train` in a network of its own."""

    def __init__(self, config, run, *overrides):
        self.run = run
        self.process = subprocess.Popen(
            private_network_command([*COMMAND, str(config), *overrides]),
            env=clean_environment(XDG_STATE_HOME=str(run.parents[1] / "state")),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def until(self, found, what):
        return until(found, what, process=self.process, every=0.002)

    def records(self, kind):
        return [record for record in read_metrics(self.run) if record["kind"] == kind]

    def workers(self):
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.name().startswith("ray::RayTrainWo"):
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: process.create_time())

    def step_after(self, when):
        """The first training record of a moment later than `when`, in unix seconds."""
        return self.until(lambda: next((r for r in self.records("train") if r["time"] > when), None), "a step")

    def started(self, times):
        """Waits until the given number of starts was made, and the last one has trained and saved; its first step."""
        self.until(lambda: len(self.records("start")) >= times, f"start {times}")
        began = self.records("start")[-1]["time"]
        step = self.step_after(began)
        self.until(lambda: any(save["time"] > began for save in self.records("checkpoint")), "a save")
        return step

    def end(self, seconds=PATIENCE_SECONDS):
        output, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, output, errors

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


def only_mlflow_run(run):
    client = connect(f"sqlite:///{run.parent / 'mlflow.db'}")
    (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return found

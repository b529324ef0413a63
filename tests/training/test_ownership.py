"""Two starts of one run at once, as after a machine was cut off: the earlier one ends and writes nothing more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from training.test_resume import job_file
from training.test_training_job import lines_of
from waiting import until


def steps_of(run: Path, kind: str) -> list[int]:
    return [line["step"] for line in lines_of(run, kind)] if (run / "metrics.jsonl").exists() else []


def test_the_earlier_start_ends_and_the_later_one_goes_on(small_data: Path, tmp_path: Path) -> None:
    job, run = job_file(tmp_path, small_data, "run", epochs=100_000, evaluate_every=100_000, checkpoint_every_steps=5)
    command = [sys.executable, "-m", "coe_dist.training.worker", str(job)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        try:
            until(lambda: len(steps_of(run, "checkpoint")) > 1, "saves", process=first)
            with subprocess.Popen(command) as second:
                try:
                    until(lambda: len(steps_of(run, "start")) == 2, "a second start", process=second)
                    _, errors = first.communicate(timeout=200)
                    assert first.returncode == 1
                    assert errors.splitlines()[-1] == (
                        f"coe-dist: {run}: a later start of this run has taken over; this one ends without writing more"
                    )
                    saved = len(steps_of(run, "checkpoint"))
                    until(lambda: len(steps_of(run, "checkpoint")) > saved + 1, "more saves", process=second)
                finally:
                    second.kill()
        finally:
            first.kill()
    (begun,) = [line["step"] for line in lines_of(run, "start")][1:]
    lines = lines_of(run)
    since = [line["kind"] for line in lines].index("start", 1)
    trained = [line["step"] for line in lines[since:] if line["kind"] == "train"]
    assert trained == list(range(begun + 1, begun + 1 + len(trained)))  # nothing of the first start among them

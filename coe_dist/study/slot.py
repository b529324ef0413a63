"""A process that trains one job after another, and the studying process's handle on it.

Started as `python -m coe_dist.study.slot DESCRIPTOR PARENT`, it imports torch and FFCV once for all its trainings. It
reads jobs from a pair of sockets and answers each with seconds or with the reason why it failed, and ends when its
parent closes the pair or is gone. What it prints goes to its log file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from coe_dist.children import ending, search_path
from coe_dist.errors import InputError, TrainingError
from coe_dist.leaving import leave
from coe_dist.training.job import Job

_LOOK_SECONDS = 1.0  # how often it looks for its parent


class Trained(NamedTuple):
    """What became of a job: seconds of the training and CPU seconds of its process, or the reason why it failed."""

    seconds: float
    cpu_seconds: float
    problem: str | None


class Slot:
    """One such process. It starts at once, takes one job at a time, and is killed by `close`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "coe_dist.study.slot", str(theirs.fileno()), str(os.getpid())]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(),
            )
        theirs.close()

    def submit(self, job: Job) -> None:
        with suppress(OSError):  # the process is gone, as result() will say
            self.connection.send(job.model_dump_json())

    def result(self) -> Trained:
        """The answer to the job. Raises TrainingError when the process is gone."""
        try:
            answer: Trained = Trained(*self.connection.recv())
        except (EOFError, OSError):
            end = ending(self._process)
            raise TrainingError(f"a training process ended: {end}; its output is in {self.log}") from None
        return answer

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()  # what it was training is begun anew
        self._process.wait()
        self.connection.close()


def _environment() -> dict[str, str]:
    """A process of its own, without torchrun's environment, on one core, with the package of this process."""
    distributed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in distributed} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": search_path(),
    }


def serve(connection: Connection) -> None:
    """The process's work, until its parent is gone."""
    from coe_dist.training.worker import run_worker

    while True:
        job = Job.model_validate_json(connection.recv())
        print(f"{job.config.name} begins", flush=True)
        problem, started, cpu = None, time.perf_counter(), time.process_time()
        try:
            if not run_worker(job):
                problem = "it was asked to stop"
        except (InputError, TrainingError) as error:
            problem = str(error)
        except Exception as error:  # one training's trouble must not end the others of the study
            import traceback

            traceback.print_exc()
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        connection.send((time.perf_counter() - started, time.process_time() - cpu, problem))


def _watch(parent: int) -> None:
    """Ends the process when its parent is gone, also in the middle of a training."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    leave(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides
    threading.Thread(target=_watch, args=(int(sys.argv[2]),), daemon=True).start()
    with suppress(EOFError, ConnectionError):  # the parent is gone
        serve(Connection(int(sys.argv[1])))
    leave()

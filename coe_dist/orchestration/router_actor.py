"""The router process as a Ray actor, and rank 0's Channel to it (see parallel/process_solver.py).

The actor is owned by rank 0's process: Ray ends it with that process, however that ends. It asks for no CPU of the
cluster, because a machine whose cores all belong to workers could not place it otherwise, and prefers rank 0's node,
where requests travel through shared memory (our own rules).
"""

from __future__ import annotations

import os
import time
from typing import Any

from coe_dist.errors import TrainingError
from coe_dist.parallel.process_solver import Array, answer
from coe_dist.parallel.solvers import Problems
from coe_dist.training.job import Job


def run_worker_with_actor(job: Job) -> None:
    """The worker function under Ray: `router.where: process` is an actor."""
    from coe_dist.training.worker import run_worker

    run_worker(job, ActorChannel)  # what it returns is known from the run folder (see training/stopping.py)


class RouterActor:
    """What runs in the actor's process."""

    def __init__(self, problems: Problems) -> None:
        import torch

        from coe_dist.coe.warm_up import warm_up

        torch.set_num_threads(1)
        warm_up()
        self.problems = problems

    def pid(self) -> int:
        return os.getpid()

    def solve(self, kind: str, *arrays: Array) -> Array:
        return answer(self.problems, kind, arrays)


class ActorChannel:
    """A Channel to a new actor. Starting does not wait for it."""

    def __init__(self, problems: Problems) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        remote: Any = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(RouterActor)
        self._actor = remote.remote(problems)
        self._pid_ticket = self._actor.pid.remote()
        self._pid: int | None = None

    @property
    def pid(self) -> int:
        """Waits for the actor to start."""
        import ray

        if self._pid is None:
            self._pid = int(ray.get(self._pid_ticket))
        return self._pid

    def submit(self, kind: str, arrays: tuple[Array, ...]) -> Any:
        return self._actor.solve.remote(kind, *arrays)

    def result(self, ticket: Any, timeout_seconds: float) -> Array:
        import ray

        before = time.monotonic()
        try:
            if self._pid is None:
                self._pid = int(ray.get(self._pid_ticket, timeout=timeout_seconds))
            solved: Array = ray.get(ticket, timeout=max(0.1, timeout_seconds - (time.monotonic() - before)))
        except ray.exceptions.GetTimeoutError:
            raise TrainingError(f"{self._name()} gave no answer in {timeout_seconds:g} s") from None
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            line = " ".join(f"{type(cause).__name__}: {cause}".split())
            raise TrainingError(f"{self._name()} failed: {line}") from None
        except ray.exceptions.RayError as error:
            raise TrainingError(f"{self._name()} ended: {_reason(error)}") from None
        return solved

    def close(self) -> None:
        import ray

        ray.kill(self._actor)

    def _name(self) -> str:
        return f"router process (pid {'unknown' if self._pid is None else self._pid})"


def _reason(error: Exception) -> str:
    """The telling line of Ray's report on a dead actor, without the actor's names and general advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "memory" in line.lower() or "exit" in line.lower()]
    return (told or lines or [type(error).__name__])[0].partition(" Some common causes")[0]

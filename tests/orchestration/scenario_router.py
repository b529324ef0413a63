"""Run by test_router_actor.py in a process of its own: the router process as a Ray actor, on two workers that hold all
CPUs of a local Ray; prints what came of each run as JSON."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from coe_dist.config import parse_config
from coe_dist.errors import TrainingError
from coe_dist.orchestration.ray_session import local_ray
from coe_dist.orchestration.ray_train import run_under_ray
from coe_dist.orchestration.router_actor import ActorChannel
from coe_dist.parallel.groups import create_groups
from coe_dist.parallel.process_solver import ProcessSolver
from coe_dist.parallel.solvers import Problems, ReplicatedSolver
from coe_dist.training.job import Job

EXPERTS, SAMPLES = 4, 60_000  # more than 100 KB: Ray then sends arrays through its store
TIMEOUT_SECONDS = 300.0  # the default; half of it is what the router process may take to start on a busy machine


def open_solver(rule):
    groups = create_groups(EXPERTS, timeout_seconds=TIMEOUT_SECONDS)
    channel = ActorChannel(Problems(EXPERTS, rule, 1.0)) if groups.rank == 0 else None
    return channel, ProcessSolver(channel, groups.world, timeout_seconds=TIMEOUT_SECONDS)


def given():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, EXPERTS, generator=generator), torch.arange(SAMPLES), [SAMPLES // 2, SAMPLES // 2]


def agree(job):
    channel, solver = open_solver("balanced")
    replicated = ReplicatedSolver(Problems(EXPERTS, "balanced", 1.0))
    selection_NE, ids_N, sizes = given()
    experts_NE = torch.arange(EXPERTS).expand(SAMPLES, EXPERTS).contiguous()
    same = []
    for _ in range(2):
        same.append(torch.equal(solver.assign(*given()), replicated.assign(*given())))
        finish = solver.start_labels(-selection_NE, experts_NE, ids_N, sizes)
        same.append(torch.equal(finish(), replicated.start_labels(-selection_NE, experts_NE, ids_N, sizes)()))
    found = {"same": same, "worker": os.getpid(), "router": channel.pid if channel else None}
    solver.close()
    if channel is not None:
        deadline = time.monotonic() + 30
        while os.path.exists(f"/proc/{channel.pid}") and time.monotonic() < deadline:
            time.sleep(0.1)
        found["router remains"] = os.path.exists(f"/proc/{channel.pid}")
    Path(job.run_dir, f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))


def kill(job):
    channel, solver = open_solver("balanced")
    solver.assign(*given())
    before = time.monotonic()
    if channel is not None:
        os.kill(channel.pid, signal.SIGKILL)
    try:
        solver.assign(*given())
    except TrainingError as error:
        told = {"message": str(error), "seconds": time.monotonic() - before}
        Path(job.run_dir, f"rank-{dist.get_rank()}.json").write_text(json.dumps(told))
        raise


def refuse(job):
    _, solver = open_solver("no such rule")
    selection_NE, ids_N, sizes = given()
    solver.start_labels(-selection_NE, selection_NE.long(), ids_N, sizes)()


def outcome(worker_fn, session):
    run_dir = Path.cwd() / worker_fn.__name__
    run_dir.mkdir()
    config = parse_config(
        {
            "name": worker_fn.__name__,
            "workers": {"device": "cpu", "count": max(2, int(session.cpus)), "oversubscribe": True},
        }
    )
    try:
        run_under_ray(worker_fn, Job(task="train", config=config, run_dir=str(run_dir)), session=session)
    except TrainingError as error:
        return str(error)
    return None


if __name__ == "__main__":
    with local_ray(parse_config({"name": "session", "workers": {"device": "cpu"}})) as session:
        told = {worker_fn.__name__: outcome(worker_fn, session) for worker_fn in (agree, kill, refuse)}
    json.dump(told, sys.stderr)

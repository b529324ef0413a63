"""Run by test_ray_train.py in a process of its own: several runs in one Ray session; prints what came of each as JSON.

The worker functions live here because a script's own functions travel to the workers by value.
"""

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from heard import Heard

from coe_dist.config import parse_config
from coe_dist.errors import InputError, TrainingError
from coe_dist.orchestration.ray_session import local_ray
from coe_dist.orchestration.ray_train import run_under_ray
from coe_dist.training.job import Job

NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "OMP_NUM_THREADS",
    "NUMBA_THREADING_LAYER",
    "GLOO_SOCKET_IFNAME",
)


def add_up(job):
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    print("printed by the worker")
    os.system("echo printed by its child")
    logging.getLogger("coe_dist.scenario").warning("logged by rank %d", dist.get_rank())
    seen = {name: os.environ.get(name) for name in NAMES}
    seen |= {"total": total.item(), "directory": os.getcwd(), "threads": torch.get_num_threads()}
    Path(job.run_dir, f"rank-{dist.get_rank()}.json").write_text(json.dumps(seen))


def break_on_rank_1(job):
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.all_reduce(torch.ones(1))  # fails a moment later, because rank 1 is gone


def refuse_input(job):
    attempts = Path(job.run_dir, f"attempts-{dist.get_rank()}")
    attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
    if dist.get_rank() == 1:
        raise InputError("data.folder: nowhere is not allowed; give a folder")
    dist.all_reduce(torch.ones(1))


def die_on_rank_1(job):
    dist.barrier()
    time.sleep(2)
    if dist.get_rank() == 1:
        os._exit(3)
    dist.all_reduce(torch.ones(1))


def outcome(worker_fn, session, folder, **workers):
    config = parse_config(
        {"name": folder, "workers": {"device": "cpu", **workers}, "training": {"timeout_seconds": 60}}
    )
    run_dir = Path.cwd() / folder
    run_dir.mkdir()
    try:
        run_under_ray(worker_fn, Job(task="train", config=config, run_dir=str(run_dir)), session=session)
    except (InputError, TrainingError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    heard, both = Heard(), {"count": 2, "oversubscribe": True}
    logging.getLogger("coe_dist.worker").addHandler(heard)
    config = parse_config({"name": "session", "workers": {"device": "cpu"}})
    found = {}
    with local_ray(config):
        pass  # the second session in a process must not trip over what the first one left
    with local_ray(config) as session:
        found["session"] = {"address": session.address, "local": session.local, "cpus": session.cpus}
        found["add_up"] = outcome(add_up, session, "add_up", count=2, oversubscribe=True, threads=2)
        found["break"] = outcome(break_on_rank_1, session, "break", **both)
        found["refuse"] = outcome(refuse_input, session, "refuse", max_failures=1, **both)
        found["die"] = outcome(die_on_rank_1, session, "die", **both)
        found["too_many"] = outcome(add_up, session, "too_many", count=int(session.cpus) + 1)
        found["gpu"] = outcome(add_up, session, "gpu", count=1, device="gpu")
    found["heard"] = heard.lines
    json.dump(found, sys.stderr)

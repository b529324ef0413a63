"""Run by test_interrupts.py: workers that never end by themselves. The argument is the run folder."""

import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from coe_dist.config import parse_config
from coe_dist.orchestration.ray_train import run_under_ray
from coe_dist.training.job import Job


def wait_for_ever(job):
    Path(job.run_dir, f"started-{dist.get_rank()}").touch()
    if dist.get_rank() == 1:
        time.sleep(10_000)
    dist.all_reduce(torch.ones(1))  # in a collective nobody else enters


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits it as ignored
    config = parse_config({"name": "interrupted", "workers": {"device": "cpu", "count": 2, "oversubscribe": True}})
    job = Job(task="train", config=config, run_dir=sys.argv[1])
    try:
        run_under_ray(wait_for_ever, job)
    except BaseException as error:
        print(type(error).__name__, flush=True)
        raise

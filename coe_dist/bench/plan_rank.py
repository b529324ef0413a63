"""What each process of the planner's benchmark does: `python -m coe_dist.bench.plan_rank FOLDER`, see ranks.py."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch.distributed as dist

from coe_dist.bench.plan_rates import measure_rates
from coe_dist.bench.ranks import serve
from coe_dist.bench.record import Record
from coe_dist.config import RunConfig, parse_config
from coe_dist.data.sidecar import read_sidecar
from coe_dist.tracking.journal import read_metrics
from coe_dist.training.job import Job
from coe_dist.training.worker import run_worker


def measure(request: Record) -> Record:
    """For each configuration: the rates of this machine, then a training; "seconds" of one of its steps."""
    answers = []
    for content in request["configs"]:
        config = parse_config(content)
        info = read_sidecar(Path(config.data.folder) / "train.beton")
        figures = measure_rates(config, info, dist.get_world_size())
        if dist.get_rank() == 0:
            config.run_dir.mkdir(parents=True)
        dist.barrier()
        run_worker(Job(task="train", config=config, run_dir=str(config.run_dir)))
        dist.barrier()
        seconds = step_seconds(config) if dist.get_rank() == 0 else 0.0
        answers.append({"figures": figures, "seconds": seconds})
    return {"answers": answers}


def step_seconds(config: RunConfig) -> float:
    """Median over the records of training, without the first of each epoch."""
    taken: list[float] = []
    epoch = -1
    for record in read_metrics(config.run_dir):
        if record["kind"] != "train":
            continue
        if record["epoch"] == epoch:
            taken.append(config.training.global_batch / record["metrics"]["train/images_per_second"])
        epoch = record["epoch"]
    return statistics.median(taken)


if __name__ == "__main__":
    serve(measure)

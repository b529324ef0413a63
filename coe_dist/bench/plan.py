"""The planner's predicted seconds of a step against those of real training, for runs that differ in every dimension.

Each case is a run of Fashion-MNIST by the workers' own function (loader, engines, router, exchange, the loop with its
records), one thread a worker. Right before it, in the same processes, its rates are measured (plan_rates.py), and the
step is predicted from them: what is judged is how the planner puts pieces together. "seconds" are those of training,
the median of its records without the first of an epoch, which waits for the loader to start; "error" is predicted /
measured - 1. On a machine with other work both sides are noise. "parts" are the predicted ones.

Three workers on fewer cores take turns; that case has replicas, whose gradients are reduced.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coe_dist.bench.plan_rates import rates_of
from coe_dist.bench.planning import data_of, facts_of
from coe_dist.bench.ranks import measure_in_ranks
from coe_dist.bench.record import Record, case, machine, versions
from coe_dist.config import RunConfig, parse_config
from coe_dist.planner.run import Run
from coe_dist.resources import usable_cores

STEPS, EPOCHS = 18, 2  # steps of an epoch
RECORDED = 6  # steps between two records: a record costs time too, and training usually writes one in 20 steps


@dataclass(frozen=True)
class Case:
    workers: int
    engine: str
    experts: int
    per_sample: int
    batch: int
    width: float  # of the experts; 1.0 is 240 thousand MACs
    optimizer: str = "sgd"
    ema: bool = False


CASES = [
    Case(1, "torch", 4, 2, 256, 0.25),
    Case(1, "deepspeed", 8, 2, 256, 1.0),
    Case(2, "deepspeed", 4, 4, 256, 0.25),
    Case(2, "torch", 4, 2, 512, 1.0),
    Case(2, "deepspeed", 8, 2, 512, 0.5),
    Case(2, "torch", 3, 2, 384, 1.0),
    Case(2, "deepspeed", 16, 2, 1024, 0.25, "adamw", ema=True),
    Case(3, "torch", 2, 2, 384, 0.5),
]
QUICK = [Case(2, "torch", 3, 2, 64, 0.1)]


def run_plan_bench(*, quick: bool = False) -> Record:
    """Measures all cases; quick: one small one. record.py has the answer's form; beside it "worst_error" and
    "median_error", without their signs."""
    from coe_dist.data.beton import write_dataset

    cases, measured = QUICK if quick else CASES, []
    with tempfile.TemporaryDirectory(prefix="coe-dist-bench-") as folder:
        data = Path(folder) / "data"
        write_dataset("fashion-mnist", data, limit=STEPS * max(one.batch for one in cases))
        for workers in sorted({one.workers for one in cases}):
            group = [one for one in cases if one.workers == workers]
            configs = [configuration(one, index, Path(folder)) for index, one in enumerate(group)]
            request = {"configs": [config.model_dump(mode="json") for config in configs]}
            answers = measure_in_ranks("coe_dist.bench.plan_rank", workers, request, timeout_seconds=900)["answers"]
            measured += [
                case(vars(one), compared(config, workers, answer), {})
                for one, config, answer in zip(group, configs, answers, strict=True)
            ]
    errors = [abs(one["ours"]["error"]) for one in measured]
    return {
        "name": "plan",
        "machine": machine(),
        "versions": versions("coe-dist", "torch", "deepspeed", "ffcv"),
        "cases": measured,
        "worst_error": max(errors),
        "median_error": statistics.median(errors),
    }


def configuration(one: Case, index: int, folder: Path) -> RunConfig:
    """Its run folder is new, so that nothing is resumed."""
    return parse_config(
        {
            "name": f"workers{one.workers}-{index}",
            "runs_dir": str(folder / "runs"),
            "data": {"folder": str(folder / "data"), "limit": STEPS * one.batch},
            "delegator": {"options": {"width": 0.25}},
            "experts": {"count": one.experts, "per_sample": one.per_sample, "options": {"width": one.width}},
            "training": {
                "epochs": EPOCHS,
                "global_batch": one.batch,
                "engine": one.engine,
                "evaluate_every": EPOCHS,
                "checkpoint_every": EPOCHS,
                "optimizer": {"name": one.optimizer, "learning_rate": 0.001},
                "ema_decay": 0.999 if one.ema else None,
            },
            "workers": {"count": one.workers, "device": "cpu", "oversubscribe": True},
            "tracking": {"enabled": False, "every_steps": RECORDED},
        }
    )


def compared(config: RunConfig, workers: int, answer: Record) -> dict[str, Any]:
    """What training took and what the planner says from the rates of the same processes."""
    info, validation, _ = data_of(config)
    rates = rates_of(answer["figures"], cores=usable_cores(), per_node=workers, network=None)
    run = Run(config, *facts_of(config, info), info.channels, info.count, validation, rates)
    predicted = run.step(workers)
    seconds = answer["seconds"]
    return {
        "seconds": seconds,
        "predicted_seconds": predicted.seconds,
        "error": predicted.seconds / seconds - 1,
        "parts": predicted.parts,
    }

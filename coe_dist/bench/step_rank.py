"""What each process of the step's benchmark does: `python -m coe_dist.bench.step_rank FOLDER`, see ranks.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
import torch.distributed as dist
from torch import nn

from coe_dist.bench.ranks import alternate, serve, summary
from coe_dist.bench.record import Record
from coe_dist.bench.step_parts import parts_of
from coe_dist.bench.step_peers import PlainBatch, PlainLoop, RecordingRouter, plain_batch
from coe_dist.bench.step_system import build_step, configuration, global_batch, network_builder, rank_share
from coe_dist.coe.warm_up import warm_up
from coe_dist.config import RunConfig
from coe_dist.parallel.groups import create_groups
from coe_dist.training.step import CollaborationStep, MicroBatch, StepSums

BATCHES = 4  # different global batches, used in turn
TOLERANCE = 1e-5  # of a parameter after one step, relative to its tensor's largest value


def measure(request: Record) -> Record:
    """One answer per {"experts", "engine"} of request["systems"]; with the plain loop at world size 1."""
    warm_up()
    torch.manual_seed(0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batches = [rank_share(global_batch(request["samples"], seed), rank, world_size) for seed in range(BATCHES)]
    works: dict[str, Callable[[], object]] = {}
    steps: dict[int, CollaborationStep] = {}
    equal: dict[int, bool] = {}
    for index, system in enumerate(request["systems"]):
        config = configuration(per_sample=request["experts_per_sample"], batch=request["samples"], **system)
        step = build_step(config, create_groups(system["experts"], timeout_seconds=60))
        if world_size == 1:
            plain, batch, equal[index] = _peer(config, step, batches[0])
            works[f"plain {index}"] = partial(plain.step, batch)
        works[f"ours {index}"] = partial(_next_step, step, cycle(batches))
        steps[index] = step
    torch.set_num_threads(1)  # DeepSpeed changes it
    alternate(works, 2)  # warm up
    taken = {name: summary(seconds) for name, seconds in alternate(works, request["repeats"]).items()}
    answers = []
    for index, step in steps.items():
        ours = taken[f"ours {index}"]
        ours["images_per_second"] = request["samples"] / ours["seconds"]
        ours["parts"] = parts_of(step, batches[0], max(1, request["repeats"] // 2))
        peers = {}
        if world_size == 1:
            peers["plain_loop"] = {**taken[f"plain {index}"], "equal": equal[index]}
        answers.append({"ours": ours, "peers": peers})
    return {"answers": answers}


def _next_step(step: CollaborationStep, batches: Iterator[MicroBatch]) -> None:
    _one_step(step, next(batches))


def _one_step(step: CollaborationStep, batch: MicroBatch) -> None:
    assert step.step([batch], StepSums()), "a gradient was not finite"


def _peer(config: RunConfig, step: CollaborationStep, batch: MicroBatch) -> tuple[PlainLoop, PlainBatch, bool]:
    """The plain loop, its batch, and whether one step of it gave the parameters that ours gave."""
    builder = network_builder(config)
    plain = PlainLoop(
        builder.delegator(), [builder.expert(e) for e in range(config.experts.count)], config.training.optimizer
    )
    original, recorder = step.router, RecordingRouter(step.router)
    step.router = recorder
    _one_step(step, batch)
    step.router = original
    recorded = plain_batch(batch, recorder)
    plain.step(recorded)
    ours = [step.delegator.network, *(step.experts[e].network for e in sorted(step.experts))]
    return plain, recorded, all(map(_equal, ours, plain.networks))


def _equal(ours: nn.Module, plain: nn.Module) -> bool:
    """Parameters and running statistics, tensor by tensor."""
    pairs = zip(ours.state_dict().values(), plain.state_dict().values(), strict=True)
    return all(float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max()) for a, b in pairs)


if __name__ == "__main__":
    serve(measure)

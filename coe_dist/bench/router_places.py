"""What the router costs a training process, by the place where its problems are solved (`router.where`).

A step here is, on each of two ranks with one thread: assign a global batch (the ranks have its logits already), submit
the losses for labels (k = 2, balanced), do WORK_SECONDS of matrix products in place of the experts' backward pass,
all-reduce one number as that pass would, and take the labels. All figures are per step, from bursts of BURST steps that
alternate with bursts of the same steps without the router:

    seconds        time in calls of the router (assign, submit, take), in which training waits: the slowest rank's of
                   each step, median; spread = (upper - lower quartile) / median
    added_seconds  what the router adds to the whole burst, so also what a router process slows the ranks' other work
                   down where it has no core of its own: the fastest burst with it less the fastest without (the least
                   disturbed of each; a small or negative number means: not measurable, the machine is not quiet)
    cpu_seconds    what it adds to the processor time of the training processes together (median; a router process
                   spends its own besides)

Prices are warm from the second step on. The router process is a child process here. `python -m` of this module is what
each rank runs (see ranks.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from coe_dist.bench.ranks import Seconds, alternate, measure_in_ranks, serve
from coe_dist.bench.record import Record, case

if TYPE_CHECKING:
    from coe_dist.parallel.solvers import Solver

SIZES = [(256, 4), (1024, 16), (4096, 16)]
PLACES = ("replicated", "rank0", "process")
WORLD_SIZE = 2
WORK_SECONDS = 0.02
BURST = 2  # steps timed together


def place_cases(quick: bool) -> list[Record]:
    """One case per size and place; they have no peers but each other."""
    sizes = SIZES[:1] if quick else SIZES
    request = {"sizes": sizes, "rounds": 2 if quick else 40}
    answer = measure_in_ranks("coe_dist.bench.router_places", WORLD_SIZE, request, timeout_seconds=500)
    return [
        case({"where": where, "samples": samples, "experts": experts, "world_size": WORLD_SIZE}, ours[where], {})
        for (samples, experts), ours in zip(sizes, answer["sizes"], strict=True)
        for where in PLACES
    ]


def measure(request: Record) -> Record:
    """Runs on every rank: {"sizes": [{place: figures}]}."""
    from coe_dist.coe.warm_up import warm_up

    warm_up()
    work = _work()
    return {
        "sizes": [_measure_size(samples, experts, work, request["rounds"]) for samples, experts in request["sizes"]]
    }


def _measure_size(samples: int, experts: int, work: Callable[[], None], rounds: int) -> Record:
    from coe_dist.parallel.groups import create_groups
    from coe_dist.parallel.process_solver import ProcessSolver
    from coe_dist.parallel.router_process import ChildChannel
    from coe_dist.parallel.solvers import Problems, RankZeroSolver, ReplicatedSolver

    groups = create_groups(experts, timeout_seconds=60)
    channel = ChildChannel(Problems(experts, "balanced", 1.0)) if groups.rank == 0 else None
    solvers: dict[str, Solver] = {
        "replicated": ReplicatedSolver(Problems(experts, "balanced", 1.0)),
        "rank0": RankZeroSolver(Problems(experts, "balanced", 1.0), groups.world, groups.rank),
        "process": ProcessSolver(channel, groups.world, timeout_seconds=60),
    }
    waited: dict[str, list[float]] = {where: [] for where in solvers}
    works = {"alone": _step(None, samples, experts, work, [])}
    works |= {where: _step(solver, samples, experts, work, waited[where]) for where, solver in solvers.items()}
    try:
        alternate(works, 2)  # starts the router process, and warms the prices
        for seconds in waited.values():
            seconds.clear()
        taken = alternate(works, rounds)
    finally:
        solvers["process"].close()
    return {where: _waiting(waited[where]) | _added(taken[where], taken["alone"]) for where in PLACES}


def _waiting(seconds: list[float]) -> Record:
    import torch
    import torch.distributed as dist

    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    lower, median, upper = statistics.quantiles(slowest.tolist(), n=4)
    return {"seconds": median, "spread": (upper - lower) / median}


def _added(whole: list[Seconds], alone: list[Seconds]) -> Record:
    fastest, fastest_alone = (min(wall for wall, _ in taken) for taken in (whole, alone))
    cpu, cpu_alone = (statistics.median(cpu for _, cpu in taken) for taken in (whole, alone))
    return {
        "added_seconds": (fastest - fastest_alone) / BURST,
        "cpu_seconds": (cpu - cpu_alone) / BURST,
    }


def _step(
    solver: Solver | None, samples: int, experts: int, work: Callable[[], None], waited: list[float]
) -> Callable[[], None]:
    """BURST steps with a solver, or without; `waited` gets the seconds of each in the solver."""
    import torch
    import torch.distributed as dist

    from coe_dist.bench.router import scores_of
    from coe_dist.coe import modules

    ids_N = torch.arange(samples)
    sizes = [samples // WORLD_SIZE] * WORLD_SIZE
    batches = []
    for seed in range(4):
        selection_NE = torch.from_numpy(scores_of("trained", samples, experts, seed))
        assigned_N = torch.from_numpy(modules.route(selection_NE, ids_N).expert_N)
        permutation = modules.step_permutation(0, seed, experts)
        experts_Nk = modules.dispatch_sets(assigned_N, permutation, experts=experts, per_sample=2)
        noise_NE = torch.from_numpy(np.random.default_rng(seed).standard_normal((samples, experts), np.float32))
        losses_Nk = (noise_NE - selection_NE).abs().gather(1, experts_Nk)
        batches.append((selection_NE, losses_Nk, experts_Nk))
    turn = cycle(batches)

    def burst() -> None:
        for _ in range(BURST):
            selection_NE, losses_Nk, experts_Nk = next(turn)
            if solver is None:
                work()
                dist.all_reduce(torch.ones(1))
                continue
            start = time.perf_counter()
            solver.assign(selection_NE, ids_N, sizes)
            finish = solver.start_labels(losses_Nk, experts_Nk, ids_N, sizes)
            seconds = time.perf_counter() - start
            work()
            dist.all_reduce(torch.ones(1))
            start = time.perf_counter()
            finish()
            waited.append(seconds + time.perf_counter() - start)

    return burst


def _work() -> Callable[[], None]:
    """About WORK_SECONDS of matrix products, the same number of them on every rank."""
    import torch
    import torch.distributed as dist

    matrix = torch.randn(192, 192)
    _ = matrix @ matrix
    start = time.process_time()  # not disturbed by what else the machine does
    for _ in range(200):
        _ = matrix @ matrix
    count = torch.tensor([WORK_SECONDS / ((time.process_time() - start) / 200)])
    dist.all_reduce(count, op=dist.ReduceOp.MAX)

    def work() -> None:
        for _ in range(int(count)):
            _ = matrix @ matrix

    return work


if __name__ == "__main__":
    serve(measure)

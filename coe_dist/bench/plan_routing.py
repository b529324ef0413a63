"""What the router, the exchange and the reduction of a configuration take on this machine (see plan_rates.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import cycle

import torch

from coe_dist.bench.plan_networks import Setting, affine
from coe_dist.bench.record import Record
from coe_dist.bench.router import scores_of
from coe_dist.coe import modules
from coe_dist.parallel.exchange import combine, dispatch, plan_exchange
from coe_dist.parallel.placement import ExpertPlacement
from coe_dist.parallel.solvers import Problems
from coe_dist.planner.layout import all_reduce_bytes
from coe_dist.planner.rates import Link, collective_rounds
from coe_dist.planner.step import EXPERT_OPERATIONS, PEER_OPERATIONS

ROUTER_ROWS = 65_536  # at most
_MORE_RANKS = 64  # by which the plan's cost for a rank is found
LOOPBACK = Link(1e-4, 1e9)  # where one worker is measured and several are planned (assumed)


def measure_router(setting: Setting) -> Record:
    """Its own work for the planned number of ranks, which needs none of them: all of it is arithmetic. Collective."""
    config, world = setting.config, setting.planned
    large = max(config.experts.count, 16, min(config.micro_batch, ROUTER_ROWS))
    small = max(config.experts.count, large // 4)
    taken = {
        samples: {name: setting.seconds(work) for name, work in _router_works(setting, samples, world).items()}
        for samples in (small, large)
    }
    costs = {name: affine((small, taken[small][name]), (large, taken[large][name])) for name in taken[large]}
    figures: Record = {name: asdict(cost) for name, cost in costs.items()}
    more = setting.seconds(_router_works(setting, large, world + _MORE_RANKS)["plan"])
    figures["plan_peer"] = max(0.0, (more - taken[large]["plan"]) / _MORE_RANKS)
    figures["plan"]["fixed"] = max(0.0, costs["plan"].fixed - figures["plan_peer"] * world)
    return figures


def _router_works(setting: Setting, samples: int, ranks: int) -> dict[str, Callable[[], object]]:
    """assign, labels and plan, each on the next of four batches; the prices are warm, as in training."""
    config, experts, k = setting.config, setting.config.experts.count, setting.config.experts_per_sample
    problems = Problems(experts, config.router.labels, config.router.label_temperature)
    ids_N = torch.arange(samples)
    batches = []
    for seed in range(4):
        selection_NE = torch.from_numpy(scores_of("trained", samples, experts, seed))
        permutation = modules.step_permutation(0, seed, experts)
        assigned_N = problems.assign(selection_NE, ids_N)
        sets_Nk = modules.dispatch_sets(assigned_N, permutation, experts=experts, per_sample=k)
        noise_Nk = torch.rand(samples, k, generator=torch.Generator().manual_seed(seed))
        batches.append((selection_NE, permutation, sets_Nk, noise_Nk - selection_NE.gather(1, sets_Nk)))
    assigning, labelling, planning = cycle(batches), cycle(batches), cycle(batches)
    layout = setting.layout(samples, ranks)
    sizes, placement = [int(rows) for rows in layout.images], ExpertPlacement(experts, ranks)

    def assign() -> None:
        selection_NE, permutation, _, _ = next(assigning)
        bool(torch.isfinite(selection_NE).all())
        assigned_N = problems.assign(selection_NE, ids_N)
        modules.dispatch_sets(assigned_N, permutation, experts=experts, per_sample=k)

    def labels() -> None:
        _, _, sets_Nk, losses_Nk = next(labelling)
        bool(torch.isfinite(losses_Nk).all())
        problems.labels(losses_Nk, sets_Nk, ids_N)
        modules.variance_weights(losses_Nk)

    def plan() -> None:
        plan_exchange(next(planning)[2], sizes, placement, 0)

    return {"assign": assign, "labels": labels, "plan": plan}


def measure_exchange(setting: Setting, gradient_bytes: int) -> Record:
    """dispatch() and combine() of one image an expert, and of a whole micro-batch, between the workers that there are.
    Collective."""
    batch, world = setting.config.micro_batch, setting.groups.world.size
    images = _images(setting, max(1, batch // world))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(setting.device)
    copy = images.numel() / setting.seconds(lambda: images.index_select(0, order))
    full = max(batch, setting.config.experts.count)
    tiny_seconds = setting.seconds(_exchange_work(setting, setting.config.experts.count))
    full_seconds = setting.seconds(_exchange_work(setting, full))
    layout = setting.layout(full, world)
    operations = PEER_OPERATIONS * (world - 1) + EXPERT_OPERATIONS * float(layout.hosted.max())
    inside = sums = LOOPBACK
    latencies = 0.0
    if world > 1:
        sums = _sums(setting, gradient_bytes)
        latency = min(sums.latency, tiny_seconds / 4)
        latencies = 2 * latency
        travelling = full_seconds - tiny_seconds - float(layout.bytes_copied.max()) / copy
        inside = Link(latency, float(layout.bytes_sent.max()) / max(travelling, full_seconds / 100))
    return {
        "inside": asdict(inside),
        "inside_sums": asdict(sums),
        "copy_bytes_per_second": copy,
        "small_operation": (tiny_seconds - latencies) / operations,
    }


def _images(setting: Setting, rows: int) -> torch.Tensor:
    side = setting.config.data.resolution
    return torch.zeros(rows, setting.info.channels, side, side, dtype=torch.uint8, device=setting.device)


def _exchange_work(setting: Setting, samples: int) -> Callable[[], None]:
    config, groups = setting.config, setting.groups
    experts, k = config.experts.count, config.experts_per_sample
    assigned_N = torch.randperm(samples, generator=torch.Generator().manual_seed(0)) % experts
    permutation = modules.step_permutation(0, 0, experts)
    sets_Nk = modules.dispatch_sets(assigned_N, permutation, experts=experts, per_sample=k)
    sizes = [int(rows) for rows in setting.layout(samples, groups.world.size).images]
    plan = plan_exchange(sets_Nk, sizes, groups.placement, groups.rank)
    rows = sizes[groups.rank]
    images, labels = _images(setting, rows), torch.zeros(rows, dtype=torch.int64, device=setting.device)
    weights = torch.ones(rows, k, device=setting.device)

    def work() -> None:
        received = dispatch(plan, images, labels, weights, groups.world)
        combine(plan, {expert: batch.weights for expert, batch in received.items()}, groups.world)()

    return work


def _sums(setting: Setting, size: int) -> Link:
    """Of all-reduce, from a few numbers and from as many bytes as the gradients."""
    world = setting.groups.world
    few = torch.zeros(4, device=setting.device)
    many = torch.zeros(max(size, 2**20) // 4, device=setting.device)
    short = setting.seconds(lambda: world.all_reduce_sum(few))
    long = setting.seconds(lambda: world.all_reduce_sum(many))
    moved = all_reduce_bytes(many.numel() * 4, world.size)
    return Link(short / (2 * collective_rounds(world.size)), moved / max(long - short, long / 100))

"""Measures this machine for the planner: the very pieces of a step, on real engines, in some seconds.

Starts as many processes as are planned (at most one per core or GPU), all working at the same time, because workers of
one machine share its memory and caches, and each piece after some other work, because in a step it finds the caches
full of that: alone in a loop, small networks take little more than half as long. Each figure is the median of the
slowest rank's seconds.

    networks   forward, loss and backward of the delegator and of one expert, at two numbers of rows; the engines' step
    router     assign, labels and plan at two sizes of batch, on scores like those of a trained delegator
    exchange   dispatch() and combine() of a tiny and of a real batch; all-reduce of a few numbers and of the gradients
    loader     processor time of reading where the data set is there, else the table's figure
"""

from __future__ import annotations

import os
from dataclasses import replace

from coe_dist.bench.ranks import measure_in_ranks, serve
from coe_dist.bench.record import Record
from coe_dist.config import RunConfig, parse_config
from coe_dist.data.sidecar import SplitInfo
from coe_dist.planner.devices import NETWORK_LATENCY, default_network
from coe_dist.planner.rates import Cost, Link, Rates, RouterRates
from coe_dist.resources import usable_cores, usable_memory


def measure_here(
    config: RunConfig, info: SplitInfo, workers: int, *, network: float | None, per_node: int | None
) -> Rates:
    """Rates of this machine for this configuration; network in bytes per second, per_node workers on a machine (by
    default as many as it has cores or GPUs, or all that are planned where the configuration oversubscribes). Raises
    TrainingError when a process fails."""
    cores = usable_cores()
    measured = min(workers, _places(config, cores))
    request = {"config": config.model_dump(mode="json"), "info": info.model_dump(mode="json"), "planned": workers}
    figures = measure_in_ranks("coe_dist.bench.plan_rates", measured, request, timeout_seconds=300)
    if per_node is None:
        per_node = workers if config.workers.oversubscribe else measured
    return rates_of(figures, cores=cores, per_node=per_node, network=network)


def _places(config: RunConfig, cores: int) -> int:
    import torch

    on_gpu = config.workers.device != "cpu" and torch.cuda.is_available()
    return torch.cuda.device_count() if on_gpu else max(1, cores // config.workers.threads)


def rates_of(figures: Record, *, cores: int, per_node: int, network: float | None) -> Rates:
    """From what measure_rates returned."""
    costs = {name: Cost(**figures[name]) for name in ("delegator", "expert", "assign", "labels", "plan")}
    return Rates(
        source=f"measured: {figures['measured']} workers at once on this machine",
        device="here",
        delegator=costs["delegator"],
        expert=costs["expert"],
        teacher=Cost(**figures["teacher"]) if "teacher" in figures else None,
        delegator_step=figures["delegator_step"],
        expert_step=figures["expert_step"],
        router=RouterRates(costs["assign"], costs["labels"], costs["plan"], figures["plan_peer"]),
        inside=Link(**figures["inside"]),
        inside_sums=Link(**figures["inside_sums"]),
        between=Link(NETWORK_LATENCY, network or default_network("here")),
        copy_bytes_per_second=figures["copy_bytes_per_second"],
        small_operation=figures["small_operation"],
        loader_seconds_per_image=figures["loader_seconds_per_image"],
        cores_per_worker=cores / per_node,
        # a GPU is a worker's own, the memory of processors is shared by those of a machine
        memory_bytes=figures["memory_bytes"] / (1 if figures["own_memory"] else per_node),
        framework_bytes=figures["framework_bytes"],
        per_node=per_node,
    )


def measure_rates(config: RunConfig, info: SplitInfo, planned: int) -> Record:
    """The figures of one configuration, the same on all ranks. Collective, inside a process group."""
    import psutil
    import torch

    from coe_dist.bench.plan_networks import Setting, build_engines, measure_loader, measure_networks, passes
    from coe_dist.bench.plan_routing import measure_exchange, measure_router
    from coe_dist.coe.warm_up import warm_up
    from coe_dist.parallel.groups import create_groups

    device = torch.device("cpu")
    if config.workers.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.set_num_threads(config.workers.threads)
    warm_up()
    groups = create_groups(config.experts.count, timeout_seconds=120)
    setting = Setting(config, info, groups, device, planned)
    engines = build_engines(setting)
    figures = measure_networks(setting, engines)
    figures["measured"] = groups.world.size
    figures["framework_bytes"] = float(psutil.Process().memory_info().rss)
    figures["own_memory"] = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if figures["own_memory"] else usable_memory()
    figures["memory_bytes"] = float(memory)
    busy = replace(setting, between=passes(setting, [*engines.experts, engines.delegator], 8))
    figures |= measure_router(busy) | measure_exchange(busy, figures["delegator_bytes"])
    return figures | measure_loader(setting)


def measure(request: Record) -> Record:
    """What every process runs: `python -m coe_dist.bench.plan_rates FOLDER`, see ranks.py."""
    return measure_rates(parse_config(request["config"]), SplitInfo.model_validate(request["info"]), request["planned"])


if __name__ == "__main__":
    serve(measure)

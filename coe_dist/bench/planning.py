"""A plan for a configuration: counts its networks, takes tabulated rates or measures this machine, and plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from coe_dist.bench.plan_rates import measure_here
from coe_dist.coe import pwlu
from coe_dist.config import RunConfig
from coe_dist.data.sidecar import SplitInfo
from coe_dist.errors import InputError
from coe_dist.planner.devices import BANDWIDTH, COMPUTE, default_network, find_device, parse_bandwidth, tabulated
from coe_dist.planner.facts import ForwardFacts, NetworkFacts, count_forward, count_network
from coe_dist.planner.plan import check_world, make_plan
from coe_dist.planner.rates import Rates
from coe_dist.planner.run import Run
from coe_dist.storage.datasets import is_written, sidecar_of
from coe_dist.training.networks import NetworkBuilder
from coe_dist.training.teacher import unlearned_teacher

MEASURE = "measure"
Counted = tuple[NetworkFacts, NetworkFacts, ForwardFacts | None]
# images of train and of validation, channels, classes; ImageNet's, of which `coe-dist data write` cuts validation off
_USUAL = {"fashion-mnist": (55_000, 5_000, 1, 10), "imagefolder": (1_231_167, 50_000, 3, 1000)}


def plan_run(
    config: RunConfig, *, gpus: int | None, gpu: str, network: str | None = None, gpus_per_machine: int | None = None
) -> dict[str, Any]:
    """The plan as make_plan describes it, and "assumptions".

    gpus: workers; without it as many as the configuration has at most. gpu: a device of the table, or "measure", which
    starts processes on this machine. Raises InputError naming the option or field that is not allowed.
    """
    gpus = check_world(config.workers.most if gpus is None else gpus)
    if gpu != MEASURE:
        find_device(gpu)
    if gpus_per_machine is not None and gpus_per_machine < 1:
        raise InputError(f"--gpus-per-machine: {gpus_per_machine} is not allowed; give a whole number of at least 1")
    bandwidth = None if network is None else parse_bandwidth(network)
    info, validation, assumed = data_of(config)

    def rates(settings: RunConfig, counted: Counted) -> Rates:
        if gpu == MEASURE:
            return measure_here(settings, info, gpus, network=bandwidth, per_node=gpus_per_machine)
        return tabulated(gpu, settings, *counted, network=bandwidth, per_node=gpus_per_machine)

    run = run_of(config, info, validation, rates)
    plan = make_plan(run, gpus)
    return {**plan, "assumptions": [*assumed, *_assumptions(run, plan, given=bandwidth is not None)]}


def data_of(config: RunConfig) -> tuple[SplitInfo, int, list[str]]:
    """The train split's side-car, the number of validation images, and what is assumed where there are no files yet."""
    if is_written(config.data, "train"):
        return sidecar_of(config.data, "train"), sidecar_of(config.data, "validation").count, []
    train, validation, channels, classes = _USUAL[config.data.source]
    name = "Fashion-MNIST" if config.data.source == "fashion-mnist" else "ImageNet"
    info = SplitInfo(
        source=config.data.source,
        split="train",
        classes=tuple(map(str, range(classes))),
        count=train,
        counts_per_class=(train - classes + 1, *(1,) * (classes - 1)),
        channels=channels,  # type: ignore[arg-type]
        shape=(28, 28) if channels == 1 else None,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        bytes=0,
        sha256="",
    )
    return info, validation, [
        f"no data in {config.data.folder}: {name}'s {train:,} images for training and {validation:,} for validation, "
        f"{classes:,} classes"
    ]  # fmt: skip


def run_of(config: RunConfig, info: SplitInfo, validation: int, rates_of: Callable[[RunConfig, Counted], Rates]) -> Run:
    """rates_of: for images of a configuration's data.resolution, asked also for those with which training begins."""
    counted, smallest, growing = counted_of(config, info), None, config.data.progressive
    if growing is not None:
        data = config.data.model_copy(update={"resolution": growing.start, "progressive": None})
        small = config.model_copy(update={"data": data})
        smallest = rates_of(small, counted_of(small, info))
    delegator, expert, teacher = counted
    return Run(
        config,
        delegator,
        expert,
        info.channels,
        info.count,
        validation,
        rates_of(config, counted),
        smallest,
        teacher,
        len(info.classes),
    )


def counted_of(config: RunConfig, info: SplitInfo) -> Counted:
    """Delegator, expert and teacher; see facts_of and teacher_of."""
    return *facts_of(config, info), teacher_of(config, info)


def teacher_of(config: RunConfig, info: SplitInfo) -> ForwardFacts | None:
    """The teacher's facts for images of data.resolution; its file need not be there. Raises InputError for a network
    that there is not."""
    if config.distillation is None:
        return None
    with torch.device("meta"):
        network = unlearned_teacher(config, info).network
    side, precision = config.data.resolution, config.training.precision
    return count_forward("teacher", network, channels=info.channels, resolution=side, precision=precision)


def facts_of(config: RunConfig, info: SplitInfo) -> tuple[NetworkFacts, NetworkFacts]:
    """The delegator's and an expert's, without memory or computing; piecewise linear units as in their second phase.
    Raises InputError for a network that does not take images of data.resolution."""
    builder = NetworkBuilder(config, info)
    with torch.device("meta"):
        delegator, expert = builder.delegator(), builder.expert(0)
    return _facts(config, info, "delegator", delegator), _facts(config, info, "expert", expert)


def _facts(config: RunConfig, info: SplitInfo, name: str, network: torch.nn.Module) -> NetworkFacts:
    for unit in pwlu.units(network):
        unit.learned = True
    side, precision = config.data.resolution, config.training.precision
    try:
        return count_network(name, network, channels=info.channels, resolution=side, precision=precision)
    except (RuntimeError, ValueError, AssertionError) as error:  # networks refuse sizes in ways of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"data.resolution: {side} is not allowed; the {name} refuses it: {reason}") from error


def _assumptions(run: Run, plan: dict[str, Any], *, given: bool) -> list[str]:
    rates = run.rates
    if rates.device == "here":
        line = (
            f"{rates.per_node} workers a machine with {rates.cores_per_worker * rates.per_node:g} cores; what finds no "
            "free core (decoding, more workers than cores) is added to the step"
        )
    else:
        line = (
            f"networks reach at most {COMPUTE:.0%} of the device's peak FLOP/s and {BANDWIDTH:.0%} of its memory "
            f"bandwidth, {rates.small_operation * 1e6:g} us to launch an operation: our figures, not measured on this "
            "device (coe_dist/planner/devices.py)"
        )
    lines = [
        line,
        f"{1 / rates.loader_seconds_per_image:,.0f} images/s read by a core, {run.config.data.loader_threads} loader "
        f"threads and {rates.cores_per_worker:g} cores a worker",
    ]
    if plan["nodes"] > 1 and not given:
        lines.append(f"{default_network(rates.device) / 1e9:g} GB/s for each worker between machines (--network)")
    if run.smallest is not None:
        lines.append(
            f"rates for images between {min(run.stages)} and {max(run.stages)} pixels a side on a straight line in the "
            "number of pixels"
        )
    lines.append("start-up, checkpoints and restarts take no time")
    return lines

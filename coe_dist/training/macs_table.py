"""What a configuration's networks cost, before any of its data exist (`coe-dist macs`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from coe_dist.coe import backbones
from coe_dist.coe.macs import average_macs, count_macs, count_pwlu_macs, exit_rate_for_budget
from coe_dist.config import NetworkConfig, RunConfig
from coe_dist.errors import InputError
from coe_dist.storage.datasets import is_written, place_of, sidecar_of

_OF_SOURCE = {"fashion-mnist": (1, 10), "imagefolder": (3, 1000)}  # channels and classes, the latter as in ImageNet


def macs_table(config: RunConfig, *, channels: int | None = None, classes: int | None = None) -> dict[str, Any]:
    """Multiply-adds of one image of data.resolution, the exit rate that early_exit.macs_budget needs, and parameters.

    channels and classes not given come from the data set's side-car or, where it is not written yet, from its source:
    1 and 10 of fashion-mnist, 3 and 1000 of imagefolder; "shape_from" says which. Keys: delegator_macs, expert_macs (a
    list of E), budget_macs and exit_rate_needed (none without a budget), average_macs (of a run that exits so often),
    pwlu_macs (pointwise, of delegator and expert, in no other figure), parameters (delegator, per_expert, total).

    Nothing is computed: the networks are built without memory. Raises InputError for networks or options that do not
    exist, a broken side-car, or a budget that does not pay the delegator.
    """
    found = _shape(config, channels, classes)
    delegator = _build("delegator", config.delegator, found, experts=config.experts.count)
    expert = _build("experts", config.experts, found)
    size = {"channels": found["channels"], "resolution": config.data.resolution}
    costs = [_counted(name, network, size) for name, network in (("delegator", delegator), ("experts", expert))]
    budget = config.early_exit.macs_budget
    try:
        rate = None if budget is None else exit_rate_for_budget(budget, *costs)
    except ValueError as error:
        raise InputError(f"early_exit.macs_{error}") from error
    parameters = [sum(parameter.numel() for parameter in network.parameters()) for network in (delegator, expert)]
    return {
        "delegator_macs": costs[0],
        "expert_macs": [costs[1]] * config.experts.count,
        "budget_macs": budget,
        "exit_rate_needed": rate,
        "average_macs": average_macs(costs[0], costs[1], rate or 0.0),
        "pwlu_macs": {
            "delegator": count_pwlu_macs(delegator, **size),
            "expert": count_pwlu_macs(expert, **size),
        },
        "parameters": {
            "delegator": parameters[0],
            "per_expert": parameters[1],
            "total": parameters[0] + config.experts.count * parameters[1],
        },
        "resolution": config.data.resolution,
        **found,
    }


def _shape(config: RunConfig, channels: int | None, classes: int | None) -> dict[str, Any]:
    if channels not in (None, 1, 3):
        raise InputError(f"--channels: {channels} is not allowed; give 1 or 3")
    if classes is not None and classes < 1:
        raise InputError(f"--classes: {classes} is not allowed; give a whole number from 1")
    if is_written(config.data, "train"):
        info = sidecar_of(config.data, "train")
        known: tuple[int, int] = (info.channels, len(info.classes))
        origin = place_of(config.data, "train")
    else:
        known, origin = _OF_SOURCE[config.data.source], f"data.source {config.data.source}"
    return {
        "channels": channels or known[0],
        "classes": classes or known[1],
        "shape_from": origin if channels is None or classes is None else "options",
    }


def _build(field: str, section: NetworkConfig, found: dict[str, Any], experts: int | None = None) -> nn.Module:
    channels = found["channels"]
    shape: dict[str, Any] = {
        "channels": channels,
        "classes": found["classes"],
        "mean": [0.0] * channels,
        "std": [1.0] * channels,
        "seed": 0,
    }
    try:
        with torch.device("meta"):
            if experts is None:
                return backbones.build_classifier(section.network, section.options, **shape)
            return backbones.build_delegator(section.network, section.options, experts=experts, **shape)
    except ValueError as error:
        raise InputError(f"{field}.{error}") from error


def _counted(field: str, network: nn.Module, size: dict[str, int]) -> int:
    try:
        return count_macs(network, **size)
    except (RuntimeError, ValueError, AssertionError) as error:  # networks refuse sizes in ways of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"data.resolution: {size['resolution']} is not allowed; {field}.network refuses it: {reason}"
        ) from error


def show_macs(table: dict[str, Any]) -> None:
    """Prints macs_table's answer."""
    from rich.table import Table

    from coe_dist.console import table_console

    rows = Table(title=f"MACs (the paper's FLOPs) of an image of {table['resolution']} pixels")
    for heading in ("network", "MACs", "PWLU, pointwise", "parameters"):
        rows.add_column(heading, justify="left" if heading == "network" else "right")
    count, parameters, pointwise = len(table["expert_macs"]), table["parameters"], table["pwlu_macs"]
    for name, *counts in (
        ("delegator", table["delegator_macs"], pointwise["delegator"], parameters["delegator"]),
        (f"each of {count} experts", table["expert_macs"][0], pointwise["expert"], parameters["per_expert"]),
    ):
        rows.add_row(name, *map(_short, counts))
    rows.add_row("one image, at most", _short(table["delegator_macs"] + table["expert_macs"][0]), "", "")
    rows.add_row("all", "", "", _short(parameters["total"]))
    console = table_console()
    console.print(rows)
    if table["budget_macs"] is not None:
        console.print(
            f"budget {_short(table['budget_macs'])} on average: {table['exit_rate_needed']:.1%} of the images "
            "have to exit early"
        )
    console.print(
        f"channels {table['channels']}, classes {table['classes']}, from {table['shape_from']}; "
        "MACs are those of convolutions and linear layers, by convention without activations",
        soft_wrap=True,
    )


def _short(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:g}"

"""The plan as a page for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from coe_dist.console import table_console

_EXPLAINED = {
    "loader": "waiting for images (decoding overlaps the rest while cores are free)",
    "delegator": "forward and backward",
    "route": "gather logits and losses, balanced assignment, labels, plan",
    "teacher": "forward, on the worker that has read the image",
    "exchange": "images to their experts and losses back",
    "experts": "forward and backward, slowest rank",
    "reduce": "gradients over replicas",
    "optimizer": "clip and update, all networks of a rank",
}


def show_plan(plan: dict[str, Any]) -> None:
    """Prints what make_plan returned."""
    console = table_console()
    placement, rows, memory, sent = plan["placement"], plan["rows"], plan["memory"], plan["bytes_per_step"]
    console.print(f"{plan['name']} on {plan['gpus']} x {plan['gpu']}, {_counted(plan['nodes'], 'machine')}")
    console.print(
        f"experts per worker {_range(placement['experts_per_rank'])}, "
        f"replicas of an expert {_range(placement['replicas_per_expert'])}, "
        f"busiest worker {placement['imbalance']:.2f} times the mean; "
        f"images per worker and micro-batch {_range(rows['images_per_rank'])}, "
        f"samples per expert {rows['pairs_per_expert']:g}",
        soft_wrap=True,
    )
    console.print(_parts(plan["step"], mean=len(plan["stages"]) > 1))
    if len(plan["stages"]) > 1:
        console.print(_stages(plan["stages"]))
    console.print(_memory(memory))
    console.print(
        f"bytes per step: {_bytes(sent['exchange'])} of images and headers between workers "
        f"({_bytes(sent['exchange_between_nodes'])} between machines), {_bytes(sent['returned'])} of losses back, "
        f"{_bytes(sent['gradients'])} of gradients",
        soft_wrap=True,
    )
    console.print(_scaling(plan))
    console.print(
        f"{plan['images_per_second']:,.0f} images/s, {plan['steps']:,} steps: {_hours(plan['hours'])}, "
        f"{plan['gpu_hours']:,.2f} {'worker' if plan['gpu'] in ('cpu', 'here') else 'GPU'}-hours "
        f"({_hours(plan['evaluation_seconds'] / 3600)} of it evaluation)",
        soft_wrap=True,
    )
    console.print(f"bottleneck: {plan['advice']}", soft_wrap=True)
    console.print(f"rates {plan['rates']['source']}", soft_wrap=True)
    for line in plan["assumptions"]:
        console.print(f"assumed: {line}", soft_wrap=True)


def _parts(step: dict[str, Any], *, mean: bool) -> Table:
    table = Table(title=f"One step{', mean over all epochs' if mean else ''}: {_seconds(step['seconds'])}")
    for heading in ("part", "time", "share", "what"):
        table.add_column(heading, justify="right" if heading in ("time", "share") else "left")
    for part, seconds in step["parts"].items():
        if part == "teacher" and seconds == 0.0:
            continue  # there is none
        table.add_row(part, _seconds(seconds), f"{seconds / step['seconds']:.0%}", _EXPLAINED[part])
    return table


def _stages(stages: list[dict[str, Any]]) -> Table:
    table = Table(title="Training images grow")
    shown = ("loader", "delegator", "teacher", "experts")
    parts = [name for name in shown if any(stage["parts"][name] for stage in stages)]
    for heading in ("pixels", "epochs", "a step", *parts, "images/s"):
        table.add_column(heading, justify="right")
    for stage in stages:
        table.add_row(
            f"{stage['resolution']}",
            f"{stage['epochs']}",
            _seconds(stage["seconds"]),
            *(_seconds(stage["parts"][name]) for name in parts),
            f"{stage['images_per_second']:,.0f}",
        )
    return table


def _memory(memory: dict[str, Any]) -> Table:
    fits = "fits" if memory["fits"] else "DOES NOT FIT"
    table = Table(
        title=f"Memory of the fullest worker: {_bytes(memory['total'])} of {_bytes(memory['available'])}, {fits}"
    )
    parts = ("weights", "gradients", "optimizer", "averages", "activations", "images", "framework")
    for part in parts:
        table.add_column(part, justify="right", overflow="fold")
    table.add_row(*(_bytes(memory[part]) for part in parts))
    return table


def _scaling(plan: dict[str, Any]) -> Table:
    table = Table(title="Other numbers of workers")
    for heading in ("workers", "images/s", "efficiency", "images/s, batch grows", "efficiency"):
        table.add_column(heading, justify="right")
    for row in plan["scaling"]:
        table.add_row(
            f"{row['workers']}" + (" *" if row["workers"] == plan["gpus"] else ""),
            f"{row['images_per_second']:,.0f}",
            f"{row['efficiency']:.0%}",
            f"{row['weak_images_per_second']:,.0f}",
            f"{row['weak_efficiency']:.0%}",
        )
    return table


def _range(pair: list[float]) -> str:
    low, high = pair
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} TB"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"

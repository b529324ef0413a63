"""Finds a benchmark by name, runs it, prints its record as a table."""

from __future__ import annotations

import importlib
from typing import Any

from rich.table import Table

from coe_dist.console import table_console
from coe_dist.errors import InputError

BENCHES = ("router", "exchange", "step", "pwlu", "inference", "loader", "plan")


def run_bench(name: str, *, quick: bool = False) -> dict[str, Any]:
    """The record {name, machine, versions, cases}. Raises InputError for another name."""
    if name not in BENCHES:
        raise InputError(f"bench: {name!r} is not allowed; give one of {', '.join(BENCHES)}")
    module = importlib.import_module(f"coe_dist.bench.{name}")
    record: dict[str, Any] = getattr(module, f"run_{name}_bench")(quick=quick)
    return record


def show(record: dict[str, Any]) -> None:
    """One row per case: its fields, our figures, and each peer's ratio (above 1: ours is better)."""
    table = Table(title=f"{record['name']}: ratio = peer / ours, above 1 ours is better")
    peers = sorted({peer for case in record["cases"] for peer in case["peers"]})
    for heading in ("case", "ours", *peers):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in record["cases"]:
        fields = " ".join(f"{key}={value}" for key, value in case["case"].items())
        ours = " ".join(f"{key} {_short(value)}" for key, value in case["ours"].items())
        table.add_row(fields, ours, *(_ratio(case["peers"].get(peer)) for peer in peers))
    console = table_console()
    console.print(table)
    console.print(f"machine: {record['machine']}\nversions: {record['versions']}", soft_wrap=True)


def _ratio(peer: dict[str, Any] | None) -> str:
    if peer is None or peer.get("ratio") is None:
        return ""
    return f"{peer['ratio']:.2f}x" + (f" ({peer['cpu_ratio']:.2f}x in CPU time)" if "cpu_ratio" in peer else "")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""The doctor's findings as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

_SMALL_SHARED_MEMORY = 2**30  # Docker's default of 64 MiB makes Ray fall back to the disk


def show(findings: dict[str, Any], console: Console) -> None:
    """Prints what `doctor.collect` found."""
    machine = findings["machine"]
    table = Table(title="This machine", show_header=False)
    table.add_row("system", machine["system"])
    table.add_row("cores", f"{machine['cores']} usable of {machine['cores_present']}")
    table.add_row("memory", f"{_gib(machine['memory_available_bytes'])} free of {_gib(machine['memory_bytes'])}")
    table.add_row("disk here", f"{_gib(machine['disk_free_bytes'])} free")
    small = machine["shared_memory_bytes"] < _SMALL_SHARED_MEMORY
    table.add_row(
        "shared memory", _gib(machine["shared_memory_bytes"]) + (" (small; docker run --shm-size=2g)" if small else "")
    )
    table.add_row("GPUs", ", ".join(machine["gpus"]) or "none")
    table.add_row("torch.distributed", ", ".join(machine["distributed_backends"]) or "unknown")
    console.print(table)
    table = Table(title="Versions", show_header=False)
    for name, version in findings["versions"].items():
        table.add_row(name, version or Text("missing", style="red"))
    console.print(table)
    table = Table(title="Does it work?")
    for heading in ("component", "", "seconds", "problem and what to do"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for probe in findings["probes"]:
        verdict = Text("works", style="green") if probe["ok"] else Text("fails", style="red")
        told = "" if probe["ok"] else f"{probe['problem']}\n-> {probe['advice']}"
        table.add_row(probe["name"], verdict, f"{probe['seconds']:.1f}", Text(told))
    console.print(table)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"

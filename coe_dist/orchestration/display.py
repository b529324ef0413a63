"""The tables a user sees at the end of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from coe_dist.console import table_console
from coe_dist.orchestration.progress_state import percent


def show_evaluation(result: dict[str, Any], run_dir: Path) -> None:
    """Prints the figures of one evaluation."""
    from coe_dist.training.chosen import Networks
    from coe_dist.training.thresholds import threshold_of

    console, top1 = table_console(), result["top1"]
    networks, threshold = Networks(result["step"], result["weights"]), threshold_of(result)
    table = Table(title=f"{run_dir}: {result['split']} split, {result['images']:,} images")
    table.add_column("system")
    table.add_column("top-1", justify="right")
    table.add_column("average MACs (the paper's FLOPs)", justify="right")
    macs = result["macs"]
    table.add_row("collaboration of experts", percent(top1["coe"]), f"{result['average_macs']:,}")
    table.add_row("delegator alone", percent(top1["delegator"]), f"{macs['delegator']:,}")
    table.add_row("oracle (any expert right)", percent(top1["oracle"]), "")
    for expert, value in enumerate(top1["experts"]):
        table.add_row(
            f"expert {expert} alone (chosen for {percent(result['load'][expert])})",
            percent(value),
            f"{macs['experts'][expert]:,}",
        )
    console.print(table)
    rule = "no threshold is set" if threshold.value is None else f"from confidence {threshold.value:.4f} on"
    console.print(f"early exit: {percent(result['exit_rate'])} of the images, {rule}")
    console.print(f"networks: {networks}")
    for doubt in threshold.doubts(networks):
        console.print(doubt, soft_wrap=True)
    if not result["stored"]:
        console.print("a question: nothing of it is kept with the run")


def show_summary(summary: dict[str, Any], run_dir: Path) -> None:
    """Prints the demonstration's comparison and where everything lies."""
    console = table_console()
    table = Table(title="Same recipe, same epochs, test split")
    for heading in ("system", "top-1", "MACs per image", "expert samples seen per image"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    seen = summary["expert_samples_per_image"]
    rows = (
        ("collaboration of experts", "coe", "average_macs"),
        ("one expert network alone", "single", "macs"),
        ("one network of the same MACs", "single_same_macs", "macs"),
    )
    for label, name, macs in rows:
        table.add_row(label, percent(summary[name]["top1"]), f"{summary[name][macs]:,}", f"{seen[name]:g}")
    console.print(table)
    console.print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items()))
    console.print(f"report:  {run_dir / 'report.html'}\nMLflow:  coe-dist ui {run_dir.parent}", soft_wrap=True)

"""What `coe-dist data write` tells a person."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from coe_dist.console import table_console


def show_written(report: dict[str, Any]) -> None:
    """One row a file, then one line for each list of images that were left out, and for each warning."""
    table = Table()
    for heading in ("file", "images", "left out", "MB", "seconds", ""):
        table.add_column(heading, justify="left" if heading in ("file", "") else "right", overflow="fold")
    for part in report["splits"].values():
        figures = (f"{part['count']:,}", f"{part['quarantined']:,}", f"{part['bytes'] / 1e6:,.1f}")
        table.add_row(part["file"], *figures, f"{part['seconds']:.1f}", part["status"])
    console = table_console(highlight=False)
    console.print(table)
    for part in report["splits"].values():
        if part["quarantined"]:
            text = f"{part['quarantined']:,} files that cannot be read were left out of {part['file']}, "
            console.print(f"{text}listed in {part['quarantine']}", soft_wrap=True, markup=False)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)

"""`coe-dist data staged`: what this machine holds of data sets that lie elsewhere."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coe_dist.config import StagingConfig
from coe_dist.storage import staging
from coe_dist.storage.download import told


def listed(folder: Path | None, *, clean: bool) -> dict[str, Any]:
    """{"folder", "copies", "removed"}, the latter two lists of {"file", "source", "bytes", "used", "in_use"}; `clean`
    removes what nobody reads."""
    place = staging.staging_folder(StagingConfig(folder=None if folder is None else str(folder)))
    removed = staging.clean(place) if clean else []
    rows = [[{**asdict(copy), "file": str(copy.file)} for copy in found] for found in (staging.copies(place), removed)]
    return {"folder": str(place), "copies": rows[0], "removed": rows[1]}


def show_listed(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    for title, rows in (("copies", result["copies"]), ("removed", result["removed"])):
        if not rows:
            continue
        table = Table("file", "size", "last used", "in use", "copied from", title=f"{title} in {result['folder']}")
        for row in rows:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["used"]))
            name = str(Path(row["file"]).relative_to(result["folder"]))
            table.add_row(name, told(row["bytes"]), when, "yes" if row["in_use"] else "no", row["source"])
        console.print(table)
    total = sum(row["bytes"] for row in result["copies"])
    console.print(f"{result['folder']}: {len(result['copies'])} copies, {told(total)}")

"""What `coe-dist study` prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from coe_dist.console import table_console
from coe_dist.errors import InputError
from coe_dist.study.comparison import percent, without_empty_columns


def parse_seeds(text: str | None) -> list[int] | None:
    """Raises InputError for what is no list of whole numbers such as 0,1,2."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < 2**32 for part in parts) or len(set(parts)) < len(parts):
        raise InputError(f"--seeds: {text!r} is not allowed; give whole numbers from 0, each once, such as 0,1,2")
    return [int(part) for part in parts]


def say_to_stderr(line: str) -> None:
    """Progress, beside which standard output stays one table or one JSON object."""
    print(line, file=sys.stderr, flush=True)


def show_study(summary: Mapping[str, Any]) -> None:
    """Prints run_study's answer."""
    baseline = summary["baseline"]
    table = Table(title=f"study {summary['study']}: {summary['finished']} of {summary['trainings']} trainings")
    heads = ["curve/point", "seeds", "MACs", "val top-1", "test top-1", "all: test", "oracle"]
    rows = [heads + ([f"less {baseline}"] if baseline else [])]
    for point in summary["points"]:
        cells = [percent(point[name]) for name in ("val_top1", "test_top1", "full_test_top1", "oracle_top1")]
        macs, seeds = f"{point['macs']['mean']:,.0f}", str(len(point["seeds"]))
        last = [percent(point["difference"], sign=True)] if baseline else []
        rows.append([f"{point['curve']}/{point['point']}", seeds, macs, *cells, *last])
    heads, *lines = without_empty_columns(rows)
    for column, heading in enumerate(heads):
        table.add_column(heading, justify="right" if column else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console = table_console()
    console.print(table)
    if summary["frontier"] is not None:
        saving = summary["frontier"]["macs_saving"]
        console.print(
            f"saving in MACs at equal accuracy: {saving['mean']:.2f}x ({saving['low']:.2f} to {saving['high']:.2f}), "
            f"by {saving['curve']}/{saving['point']}, chosen on validation",
            soft_wrap=True,
            highlight=False,
        )
    for path in summary["files"]:
        console.print(path, soft_wrap=True, highlight=False)

"""What `coe-dist study` prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from coe_dist.console import table_console
from coe_dist.errors import InputError
from coe_dist.study.comparison import percent, without_empty_columns

_LESS_NEEDED = ("oracle", "seeds", "val top-1")  # the first first
_ANY_WIDTH = 10_000


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
    heads = ["curve/point", "seeds", "MACs", "val top-1", "test top-1", "all: test", "oracle"]
    rows = [heads + ([f"less {baseline}"] if baseline else [])]
    for point in summary["points"]:
        cells = [percent(point[name]) for name in ("val_top1", "test_top1", "full_test_top1", "oracle_top1")]
        macs, seeds = f"{point['macs']['mean']:,.0f}", str(len(point["seeds"]))
        last = [percent(point["difference"], sign=True)] if baseline else []
        rows.append([f"{point['curve']}/{point['point']}", seeds, macs, *cells, *last])
    console = table_console()
    title = f"study {summary['study']}: {summary['finished']} of {summary['trainings']} trainings"
    table, left_out = _fitting(without_empty_columns(rows), title, console)
    console.print(table)
    if left_out:
        console.print(f"left out, for the terminal is narrow: {', '.join(left_out)}", soft_wrap=True, highlight=False)
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


def _fitting(rows: Sequence[Sequence[str]], title: str, console: Console) -> tuple[Table, list[str]]:
    """The table with whole names and figures, and the headings of the columns for which there is no room."""
    table, left_out = _table(rows, title), []
    for heading in _LESS_NEEDED:
        if Measurement.get(console, console.options.update_width(_ANY_WIDTH), table).minimum <= console.width:
            break
        if heading in rows[0]:
            column = list(rows[0]).index(heading)
            rows = [[*row[:column], *row[column + 1 :]] for row in rows]
            left_out.append(heading)
            table = _table(rows, title)
    return table, left_out


def _table(rows: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(title=title)
    for column, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if column else "left", no_wrap=column == 0)
    for line in rows[1:]:
        table.add_row(*line)
    return table

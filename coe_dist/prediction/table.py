"""Rows of predictions -> a CSV file that appears whole or not at all, the object that --json prints, or a table."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from coe_dist.console import table_console
from coe_dist.errors import InputError
from coe_dist.printable import printable

if TYPE_CHECKING:  # torch takes seconds, which a refusal should not
    from coe_dist.prediction.answers import Prediction

EARLY_EXIT = "early exit"


def expert_name(expert: int | None) -> int | str:
    return EARLY_EXIT if expert is None else expert


def columns(top: int) -> list[str]:
    """file, class, probability, expert (its number, or "early exit"), macs, then class and probability of rank 2, 3,
    ... top."""
    further = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("class", "probability")]
    return ["file", "class", "probability", "expert", "macs", *further]


def cells(row: Prediction) -> list[str]:
    values = [f"{value:.6f}" for value in row.probabilities]
    further = [cell for pair in zip(row.classes[1:], values[1:], strict=True) for cell in pair]
    return [row.file, row.classes[0], values[0], str(expert_name(row.expert)), str(row.macs), *further]


def as_object(row: Prediction) -> dict[str, Any]:
    top = [{"class": name, "probability": value} for name, value in zip(row.classes, row.probabilities, strict=True)]
    return {"file": row.file, **top[0], "expert": expert_name(row.expert), "macs": row.macs, "top": top}


def check_csv(path: Path, *, overwrite: bool) -> None:
    """Raises InputError when the CSV file must not or cannot be written."""
    if path.exists() and (not path.is_file() or not overwrite):
        what = "exists; give another name, or --overwrite" if path.is_file() else "is not a file"
        raise InputError(f"--csv: {path} is not allowed; it {what}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"--csv: {path} is not allowed; {path.parent} is not a folder that can be written to")


class CsvTable:
    """A CSV file being written: UTF-8, a header line, one line a prediction."""

    def __init__(self, file: TextIO, top: int) -> None:
        self._writer = csv.writer(file, lineterminator="\n")
        self._writer.writerow(columns(top))
        self.rows = 0

    def add(self, rows: Sequence[Prediction]) -> None:
        self._writer.writerows(cells(row) for row in rows)
        self.rows += len(rows)


@contextmanager
def csv_table(path: Path | None, top: int) -> Iterator[CsvTable | None]:
    """Writes beside `path` and gives the file its name when the block ends well and has added a row; for path None
    there is no table. Names that are not UTF-8 keep their bytes."""
    if path is None:
        yield None
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            table = CsvTable(file, top)
            yield table
            file.flush()
            os.fsync(file.fileno())
        if table.rows:
            partial.replace(path)
    except OSError as error:
        raise InputError(f"--csv: {path} is not allowed; it cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)


def show_predictions(result: dict[str, Any]) -> None:
    """Prints what orchestration.predict.predict returns."""
    from rich.table import Table
    from rich.text import Text

    console = table_console(soft_wrap=True)
    if result["csv"] is None:
        table = Table()
        others = ["then"] if result["top"] > 1 else []  # one column, for a terminal is narrow
        for heading in (*columns(1), *others):
            table.add_column(heading, justify="left" if heading in ("file", "class", "then") else "right")
        for row in result["predictions"]:
            then = ", ".join(f"{other['class']} {other['probability']:.4f}" for other in row["top"][1:])
            line = [row["file"], row["class"], f"{row['probability']:.4f}", str(row["expert"]), f"{row['macs']:,}"]
            table.add_row(*(Text(printable(cell), overflow="fold") for cell in (*line, then)[: len(table.columns)]))
        console.print(table)
    console.print(
        f"{result['images']:,} images, early exit: {100 * result['exit_rate']:.2f}% of them, "
        f"average MACs (the paper's FLOPs): {result['average_macs']:,}"
        + (f"; {len(result['broken']):,} could not be read" if result["broken"] else "")
    )
    if result["csv"] is not None:
        console.print(Text(printable(result["csv"])))

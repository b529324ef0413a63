"""docs/results/NAME.csv, a row per finished training, and NAME-curves.csv, the early-exit curve of each collaboration.

Both are rewritten by atomic rename after each training, the curves first: a row exists only when its curve does.
Rows of trainings that are no longer in the study stay in the file and out of the tables.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from coe_dist.errors import InputError


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Line):
    """A finished training. Top-1s are fractions of a split's images, MACs averages per image.

    macs, val_top1 and test_top1 are those at `threshold`, the cheapest one of the curve that costs no accuracy on
    validation (outcome.py); full_*: nobody exits early. macs, oracle_top1, delegator_top1 and least_load are the test
    split's, or validation's where `test` is no. expert_samples: times that a training image is shown to an expert (or
    to the single network) over the epochs, the mean over images. cpu_seconds: of the whole training process.
    """

    study: str
    curve: str
    point: str
    seed: int
    config: str  # digest of the configuration, the seed included
    overrides: str = ""
    macs: float
    val_top1: float
    test_top1: float | None = None
    threshold: float | None = None
    full_macs: float
    full_val_top1: float
    full_test_top1: float | None = None
    oracle_top1: float | None = None
    delegator_top1: float | None = None
    least_load: float | None = None  # smallest fraction of images that selection gives to an expert
    experts: int
    expert_samples: int
    seconds: float
    cpu_seconds: float
    revision: str

    @property
    def label(self) -> str:
        return f"{self.curve}/{self.point}"


class CurveRow(_Line):
    """A collaboration at one exit threshold: average MACs and top-1 on validation, and on test where it was tested."""

    config: str
    threshold: float
    val_macs: float
    val_top1: float
    test_macs: float | None = None
    test_top1: float | None = None


Line = TypeVar("Line", bound=_Line)


class Results:
    """The two files of a study in `folder`. Reading raises InputError naming the file and line that is damaged."""

    def __init__(self, folder: Path, study: str) -> None:
        self.rows_path, self.curves_path = folder / f"{study}.csv", folder / f"{study}-curves.csv"
        self.rows = read_csv(self.rows_path, Row)
        known = {row.config for row in self.rows}
        self.curves = [line for line in read_csv(self.curves_path, CurveRow) if line.config in known]

    def row_of(self, digest: str, *, test: bool) -> Row | None:
        """The finished training of this configuration; with `test`, one that was tested."""
        return next((r for r in self.rows if r.config == digest and (r.test_top1 is not None or not test)), None)

    def curve_of(self, digest: str) -> list[CurveRow]:
        return [line for line in self.curves if line.config == digest]

    def add(self, row: Row, curve: Iterable[CurveRow]) -> None:
        """Appends a training, in place of an untested one of the same configuration. Raises OSError."""
        curves = [line for line in self.curves if line.config != row.config] + list(curve)
        rows = [old for old in self.rows if old.config != row.config] + [row]
        write_csv(self.curves_path, CurveRow, curves)
        write_csv(self.rows_path, Row, rows)
        self.rows, self.curves = rows, curves


def read_csv(path: Path, kind: type[Line]) -> list[Line]:
    """The lines of a file, none where it is missing."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(kind.model_fields):
            raise InputError(f"{path}: its columns are {reader.fieldnames}; give {', '.join(kind.model_fields)}")
        lines = []
        for content in reader:
            try:
                lines.append(kind.model_validate({name: text for name, text in content.items() if text != ""}))
            except ValidationError as error:
                first = error.errors()[0]
                column = ".".join(map(str, first["loc"])) or "columns"
                raise InputError(
                    f"{path}: line {reader.line_num}: {column}: {first['input']!r} is not allowed"
                ) from None
        return lines


def write_csv(path: Path, kind: type[Line], lines: Iterable[Line]) -> None:
    """Atomically. Raises OSError."""
    text = StringIO()
    writer = csv.DictWriter(text, list(kind.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_cells(line.model_dump()) for line in lines)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """By atomic rename; makes the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _cells(content: Mapping[str, Any]) -> dict[str, str]:
    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.10g}" if isinstance(value, float) else str(value)

    return {name: cell(value) for name, value in content.items()}

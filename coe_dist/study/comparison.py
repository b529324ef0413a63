"""Every point of a study as a table's line: figures over seeds, and differences from the baseline, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coe_dist.study.frontier import Point
from coe_dist.study.results import Row
from coe_dist.study.statistics import Spread, paired_difference, spread

FIGURES = ("macs", "val_top1", "test_top1", "full_macs", "full_val_top1", "full_test_top1", "oracle_top1")
OTHERS = ("delegator_top1", "least_load", "expert_samples", "seconds")


def summarised(points: Mapping[str, Point], baseline: str | None) -> list[dict[str, Any]]:
    """One line per point: curve, point, experts, seeds, each figure of results.Row as {mean, sd, seeds} (None where no
    row has it), and `difference`: of full_test_top1 (full_val_top1 where untested) from the baseline's, in the same
    form; None for the baseline, without one, and without a common seed."""
    other = points.get(baseline) if baseline is not None else None
    lines = []
    for label, point in points.items():
        rows = [row for _, row in sorted(point.rows.items())]
        line: dict[str, Any] = {
            "curve": point.curve,
            "point": point.point,
            "experts": rows[0].experts,
            "overrides": rows[0].overrides,
            "seeds": sorted(point.rows),
        }
        for name in (*FIGURES, *OTHERS):
            values = [getattr(row, name) for row in rows]
            known = [float(value) for value in values if value is not None]
            line[name] = spread(known)._asdict() if known else None
        difference = None
        if other is not None and label != baseline:
            difference = paired_difference(_accuracy(point.rows), _accuracy(other.rows))
        line["difference"] = None if difference is None else difference._asdict()
        lines.append(line)
    return lines


def accuracy_of(row: Row) -> float:
    """Top-1 when nobody exits, on test, or on validation where it was not tested."""
    return row.full_val_top1 if row.full_test_top1 is None else row.full_test_top1


def _accuracy(rows: Mapping[int, Row]) -> dict[int, float]:
    return {seed: accuracy_of(row) for seed, row in rows.items()}


def percent(value: Mapping[str, Any] | Spread | None, *, sign: bool = False) -> str:
    """`86.82 ± 0.35`, a fraction in percent with its standard deviation; "" for nothing."""
    if value is None:
        return ""
    mean, sd = (value["mean"], value["sd"]) if isinstance(value, Mapping) else value[:2]
    text = f"{100 * mean:+.2f}" if sign else f"{100 * mean:.2f}"
    return text if sd is None else f"{text} ± {100 * sd:.2f}"


def without_empty_columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """A table, its headings first, without the columns that no point fills, such as test figures of a search. The first
    three, which all points fill, stay where there is none."""
    kept = [column for column in range(len(rows[0])) if column < 3 or any(row[column] for row in rows[1:])]
    return [[row[column] for column in kept] for row in rows]

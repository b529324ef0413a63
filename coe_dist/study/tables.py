"""docs/results/NAME.md and NAME.json: what a study has found so far."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coe_dist.study.comparison import percent, without_empty_columns
from coe_dist.study.results import write_text


def write_tables(folder: Path, name: str, summary: Mapping[str, Any]) -> list[Path]:
    """Writes both files and returns them. Raises OSError."""
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    found = summary["frontier"] if summary["frontier"] is not None else {"study": name, "points": summary["points"]}
    write_text(paths[0], json.dumps(found, indent=1) + "\n")
    write_text(paths[1], markdown(name, summary))
    return paths


def markdown(name: str, summary: Mapping[str, Any]) -> str:
    """The tables; summary as command.py makes it: {finished, trainings, points, frontier, baseline}."""
    parts = [
        f"# Study {name}",
        f"Made by `coe-dist study {name}`; {summary['finished']} of {summary['trainings']} trainings are finished. "
        "Accuracies are top-1 in percent, mean ± standard deviation over seeds. "
        "MACs are averages per image at the exit threshold that costs nothing on validation; "
        "'all' means that no image exits early.",
    ]
    if summary["frontier"] is not None:
        parts += _frontier(summary["frontier"])
    curves = dict.fromkeys(point["curve"] for point in summary["points"])
    for curve in curves:
        parts += [f"## {curve}", _points([p for p in summary["points"] if p["curve"] == curve], summary["baseline"])]
    return "\n\n".join(parts) + "\n"


def _frontier(found: Mapping[str, Any]) -> list[str]:
    saving = found["macs_saving"]
    sentence = (
        f"{saving['curve']}/{saving['point']}, chosen on validation, reaches {100 * saving['top1']:.2f} on test at "
        f"{saving['macs']:,.0f} average MACs; single networks need {_bounded(saving)} MACs: **a saving of "
        f"{saving['mean']:.2f}x** ({saving['low']:.2f} to {saving['high']:.2f}, 95% bootstrap over seeds)."
    )
    singles = ", ".join(f"{one['curve']}/{one['point']} ({percent(one['top1'])})" for one in found["single"])
    recipes = f"Single networks, of each size the recipe that is best on validation, with test top-1: {singles}."
    rows = [["curve", "point", "E", "threshold", "MACs", "test top-1", "single networks need", "saving", "95%"]]
    for point in found["collaborations"]:
        rows.append(
            [
                point["curve"],
                point["point"],
                str(point["experts"]),
                f"{point['threshold']:g}",
                f"{point['macs']:,.0f}",
                percent(point["top1"]),
                _bounded(point),
                f"{point['saving']['mean']:.2f}x",
                f"{point['saving']['low']:.2f} to {point['saving']['high']:.2f}",
            ]
        )
    return ["## Saving in MACs at equal accuracy", sentence, recipes, _table(rows, left=2)]


def _bounded(point: Mapping[str, Any]) -> str:
    words = {"exact": "", "at least": "at least ", "at most": "at most "}
    return f"{words[point['bound']]}{point['single_macs']:,.0f}"


def _points(points: Sequence[Mapping[str, Any]], baseline: str | None) -> str:
    heads = ["point", "E", "seeds", "MACs", "val", "test", "all: MACs", "all: val", "all: test"]
    heads += ["oracle", "delegator", "least load", "expert samples", "seconds"]
    rows = [heads + ([f"all: less {baseline}"] if baseline else [])]
    for point in points:
        cells = [
            point["point"],
            str(point["experts"]),
            str(len(point["seeds"])),
            _whole(point["macs"]),
            percent(point["val_top1"]),
            percent(point["test_top1"]),
            _whole(point["full_macs"]),
            percent(point["full_val_top1"]),
            percent(point["full_test_top1"]),
            percent(point["oracle_top1"]),
            percent(point["delegator_top1"]),
            "" if point["least_load"] is None else f"{point['least_load']['mean']:.3f}",
            _whole(point["expert_samples"]),
            _whole(point["seconds"]),
        ]
        rows.append(cells + ([percent(point["difference"], sign=True)] if baseline else []))
    return _table(without_empty_columns(rows), left=1)


def _whole(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else f"{value['mean']:,.0f}"


def _table(rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Markdown; the first `left` columns are aligned to the left."""
    rule = ["---" if column < left else "---:" for column in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:]))

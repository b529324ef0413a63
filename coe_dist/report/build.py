"""Builds the report: one HTML file without scripts, without anything to load."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from coe_dist.errors import InputError
from coe_dist.report.folder import Details, Evaluation, Run, Summary, System, read_run
from coe_dist.tracking.store import redact

SHOWN_CLASSES, SHOWN_EXPERTS = 40, 16
_LOSSES = [
    ("train/loss", "loss"),
    ("train/loss_experts", "experts"),
    ("train/loss_delegator", "delegator"),
    ("train/loss_selection", "selection"),
]
_TOP1 = [("val/top1", "CoE"), ("val/top1_delegator", "delegator alone"), ("val/top1_oracle", "oracle")]


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the report of these run folders and returns its path (default: report.html in the first folder).

    What a folder does not hold is left out with a sentence. Raises InputError for a folder that is no run folder.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    runs = [read_run(folder) for folder in run_dirs]
    if not runs:
        raise ValueError("run_dirs: empty; give at least one run folder")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": percent, "macs": macs, "duration": duration}
    keys = count()
    page = environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        runs=[_section(run, f"r{next(keys)}", Markup) for run in runs],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    target = Path(out) if out is not None else runs[0].folder / "report.html"
    if target.is_dir():
        raise InputError(f"--out: {target} is a folder; give a file, for instance {target / 'report.html'}")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(target)
    return target


def _section(run: Run, key: str, markup: Any) -> dict[str, Any]:
    from coe_dist.report import plots

    evaluation, summary = run.evaluation, run.summary
    baseline = run.start.get("task") == "baseline"
    top1 = [("val/top1", "validation top-1")] if baseline else _TOP1
    losses = _LOSSES[:1] if baseline else _LOSSES
    return {
        "key": key,
        "run": run,
        "baseline": baseline,
        "top1": evaluation.top1.coe if evaluation else summary.coe.top1 if summary else run.last("val/top1"),
        "headline": _headline(evaluation, summary),
        "evaluation": evaluation,
        "summary": summary,
        "curve": markup(plots.curve_svg(evaluation, summary, key)) if evaluation and evaluation.curve else "",
        "losses": markup(plots.lines_svg(run, losses, "loss", False, f"{key}-losses")),
        "accuracy": markup(plots.lines_svg(run, top1, "top-1 (%)", True, f"{key}-top1")),
        "load": "" if baseline else markup(plots.load_svg(run, key)),
        "bars": markup(plots.bars_svg(evaluation, key)) if evaluation else "",
        "experts": _experts(evaluation) if evaluation else [],
        "heat": _heat(run.details) if run.details else None,
        "config": redact(run.config),
    }


def _headline(evaluation: Evaluation | None, summary: Summary | None) -> list[dict[str, Any]]:
    """Rows of the first table: system, top-1 (fraction), MACs of an image, expert samples per image and epoch."""
    samples = summary.expert_samples_per_image if summary else {}
    if summary is not None:
        systems: list[tuple[str, str, System | None]] = [
            ("coe", "Collaboration of Experts", summary.coe),
            ("single", "one expert network alone", summary.single),
            ("single_same_macs", "one network of the same MACs", summary.single_same_macs),
        ]
        return [
            _row(name, system.top1, system.average_macs or system.macs, samples.get(key), summary.coe.top1)
            for key, name, system in systems
            if system is not None
        ]
    if evaluation is None:
        return []
    rows = [
        _row("Collaboration of Experts", evaluation.top1.coe, evaluation.average_macs, None, evaluation.top1.coe),
        _row("delegator alone", evaluation.top1.delegator, evaluation.macs.delegator, None, evaluation.top1.coe),
    ]
    alone = [(t, m) for t, m in zip(evaluation.top1.experts, evaluation.macs.experts, strict=False) if t is not None]
    if alone:
        rows.append(_row("best of its experts alone", *max(alone), None, evaluation.top1.coe))
    return rows


def _row(name: str, top1: float, cost: float | None, samples: float | None, coe: float) -> dict[str, Any]:
    return {"name": name, "top1": top1, "macs": cost, "samples": samples, "difference": top1 - coe}


def _experts(evaluation: Evaluation) -> list[dict[str, Any]]:
    def at(values: Sequence[float | None], index: int) -> float | None:
        return values[index] if index < len(values) else None

    return [
        {
            "load": load,
            "selected": at(evaluation.expert_accuracy, j),
            "alone": at(evaluation.top1.experts, j),
            "macs": at(evaluation.macs.experts, j),
        }
        for j, load in enumerate(evaluation.load)
    ]


def _heat(details: Details) -> dict[str, Any]:
    """The class x expert table, cut to the classes that lean most on one expert and to the most used experts."""
    share = [[n / max(1, sum(row)) for n in row] for row in details.selected]
    experts = len(share[0]) if share else 0
    totals = [sum(row[j] for row in details.selected) for j in range(experts)]
    columns = sorted(sorted(range(experts), key=lambda j: -totals[j])[:SHOWN_EXPERTS])
    lines = sorted(sorted(range(len(share)), key=lambda c: -max(share[c], default=0))[:SHOWN_CLASSES])
    rows = [
        {
            "name": details.classes[c],
            "images": details.images_per_class[c],
            "cells": [
                {
                    "share": share[c][j],
                    "count": details.selected[c][j],
                    "accuracy": details.correct[c][j] / details.selected[c][j] if details.selected[c][j] else None,
                }
                for j in columns
            ],
        }
        for c in lines
    ]
    return {"columns": columns, "rows": rows, "classes": len(share), "experts": experts}


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def macs(value: float | None) -> str:
    """Multiply-adds with three digits: 222k, 1.93M."""
    if value is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            digits = max(0, 2 - len(str(int(value / size))) + 1)
            return f"{value / size:.{digits}f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

"""What the page says of one run: figures, tables and pictures, ready for run.html."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from coe_dist.config import DataConfig, parse
from coe_dist.errors import InputError
from coe_dist.report import plots
from coe_dist.report.comparison import tree_of
from coe_dist.report.folder import Evaluation, Run, Summary
from coe_dist.report.galleries import Pictures, early_galleries, expert_galleries
from coe_dist.report.heat import heat_map
from coe_dist.report.quality import confusion, reliabilities, skill, standings
from coe_dist.report.words import macs, percent
from coe_dist.storage.datasets import copied_beton
from coe_dist.tracking.per_image import PerImage
from coe_dist.tracking.store import redact

SHOWN_CONFUSED, SHOWN_MISTAKES = 20, 12
_LOSSES = [
    ("train/loss", "loss"),
    ("train/loss_experts", "experts"),
    ("train/loss_delegator", "delegator"),
    ("train/loss_selection", "selection"),
]
_TOP1 = [("val/top1", "CoE"), ("val/top1_delegator", "delegator alone"), ("val/top1_oracle", "oracle")]


def section(run: Run, key: str, markup: Callable[[str], Any]) -> dict[str, Any]:
    """key: a prefix for the section's ids; markup: marks text that is HTML already."""
    evaluation, summary = run.evaluation, run.summary
    top1 = [("val/top1", "validation top-1")] if run.baseline else _TOP1
    losses = _LOSSES[:1] if run.baseline else _LOSSES
    own = evaluation.top1.coe if evaluation else summary.coe.top1 if summary else None
    found = standings(evaluation, run.rows) if evaluation else []
    return {
        "key": key,
        "run": run,
        "top1": own if own is not None else run.single.top1 if run.single else run.last("val/top1"),
        "headline": _headline(run, evaluation, summary),
        "before": _before(evaluation, summary),
        "evaluation": evaluation,
        "summary": summary,
        "curve": _curve(evaluation, summary, key, markup) if evaluation and evaluation.curve else None,
        "losses": markup(plots.lines_svg(run, losses, "loss", False, f"{key}-losses")),
        "accuracy": markup(plots.lines_svg(run, top1, "top-1 (%)", True, f"{key}-top1")),
        "training": _training(run, [*losses, *top1]),
        "loads": markup(plots.experts_svg(run, "val_load", "share of images (%)", f"{key}-loads", even=True)),
        "expert_top1": markup(plots.experts_svg(run, "accuracy", "top-1 where chosen (%)", f"{key}-experts")),
        "over_time": _experts_over_time(run),
        "portions": _portions(run),
        "standings": found,
        "skill": skill(found),
        "bars": markup(plots.bars_svg(found, f"{key}-bars")) if found else "",
        "experts": _experts(evaluation) if evaluation else [],
        "heat": heat_map(run.details) if run.details else None,
        **_of_images(run, key, markup),
        "config": redact(run.config),
    }


def _headline(run: Run, evaluation: Evaluation | None, summary: Summary | None) -> list[dict[str, Any]]:
    """Rows of the first table: system, top-1 (fraction), MACs of an image, expert samples per image and epoch."""
    if run.single is not None:
        return [_row("one network alone", run.single.top1, run.single.macs, None, run.single.top1)]
    samples = summary.expert_samples_per_image if summary else {}
    cost: float | None
    if evaluation is not None:
        own, cost, split = evaluation.top1.coe, evaluation.average_macs, evaluation.split
    elif summary is not None:
        own, cost, split = summary.coe.top1, summary.coe.average_macs, summary.coe.split
    else:
        return []
    rows = [_row("Collaboration of Experts", own, cost, samples.get("coe"), own)]
    singles = summary.singles(split) if summary else []
    rows += [_row(name, system.top1, system.macs, samples.get(key), own) for key, name, system in singles]
    if singles or evaluation is None:
        return rows
    rows.append(_row("delegator alone", evaluation.top1.delegator, evaluation.macs.delegator, None, own))
    alone = [(t, m) for t, m in zip(evaluation.top1.experts, evaluation.macs.experts, strict=False) if t is not None]
    if alone:
        rows.append(_row("best of its experts alone", *max(alone), None, own))
    return rows


def _before(evaluation: Evaluation | None, summary: Summary | None) -> str:
    """What the collaboration had beside the single networks when training ended; "" where it still has it."""
    if evaluation is None or summary is None or not summary.singles(evaluation.split):
        return ""
    then, now = [
        f"{percent(top1)}% at {macs(cost)} MACs"
        for top1, cost in (
            (summary.coe.top1, summary.coe.average_macs),
            (evaluation.top1.coe, evaluation.average_macs),
        )
    ]
    return "" if then == now else then


def _row(name: str, top1: float, cost: float | None, samples: float | None, coe: float) -> dict[str, Any]:
    return {"name": name, "top1": top1, "macs": cost, "samples": samples, "difference": top1 - coe}


def _curve(evaluation: Evaluation, summary: Summary | None, key: str, markup: Callable[[str], Any]) -> dict[str, Any]:
    """The figure, and for its slider each point's place and what it says."""
    picture, places = plots.curve_svg(evaluation, summary, key)
    points, own = [], 0
    for number, (point, (x, y)) in enumerate(zip(evaluation.points, places, strict=True)):
        chosen = point.average_macs == evaluation.average_macs and point.top1 == evaluation.top1.coe
        own = number if chosen else own
        exits = point.threshold is not None and point.threshold <= 1
        said = f"threshold {point.threshold:.3g}" if exits else "no early exit"
        said += f": {percent(point.exit_rate)}% answered early, {macs(point.average_macs)} MACs, "
        said += f"top-1 {percent(point.top1)}%"
        difference = 100 * (point.top1 - evaluation.top1.coe)
        said += " (in use)" if chosen else f" ({difference:+.1f} points against the threshold in use)"
        points.append({"x": x, "y": y, "text": said})
    return {"svg": markup(picture), "points": json.dumps(points), "last": len(points) - 1, "own": own,
            "said": points[own]["text"], "table": evaluation.points}  # fmt: skip


def _training(run: Run, names: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The newest value of every series in each epoch, as far as recorded."""
    steps = run.start.get("steps_per_epoch")
    if not isinstance(steps, int) or steps < 1:
        return {"names": [], "rows": []}
    shown = [(name, title) for name, title in names if run.series.get(name)]
    epochs = sorted({-(-step // steps) for name, _ in shown for step in run.series[name]})
    rows = [(epoch, [_newest(run, name, epoch * steps, steps) for name, _ in shown]) for epoch in epochs]
    kinds = [(title, name.startswith("val/")) for name, title in shown]
    return {"names": kinds, "rows": rows}


def _newest(run: Run, name: str, until: int, steps: int) -> float | None:
    values = [(step, value) for step, value in run.series[name].items() if until - steps < step <= until]
    return max(values)[1] if values else None


def _experts_over_time(run: Run) -> dict[str, Any]:
    """Of each validation: epoch, then every expert's share and top-1 where it is chosen."""
    names = sorted(name for name in run.series if re.fullmatch(r"expert/\d+/val_load", name))
    experts = [int(name.split("/")[1]) for name in names]
    steps = run.start.get("steps_per_epoch")
    rows = []
    for step in sorted(set().union(*(run.series[name] for name in names))):
        cells = [
            (run.series[name].get(step), run.series.get(name.replace("val_load", "accuracy"), {}).get(step))
            for name in names
        ]
        rows.append((round(step / steps, 2) if isinstance(steps, int) and steps else step, cells))
    return {"experts": experts, "rows": rows}


def _portions(run: Run) -> tuple[float, float] | None:
    """The smallest and the largest portion of training images that an expert ever got between two records."""
    names = [name for name in run.series if re.fullmatch(r"expert/\d+/load", name)]
    values = [value for name in names for value in run.series[name].values()]
    return (min(values), max(values)) if values else None


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


def _of_images(run: Run, key: str, markup: Callable[[str], Any]) -> dict[str, Any]:
    """What needs the rows of single images: confusion, calibration, galleries."""
    nothing: dict[str, Any] = {"confusion": None, "reliability": [], "reliability_svg": "", "galleries": None}
    if run.evaluation is None or run.rows is None or run.details is None or not len(run.rows):
        return nothing
    threshold, classes = run.evaluation.threshold, run.details.classes
    diagrams = reliabilities(run.rows, threshold)
    return {
        "confusion": _confusion(run.rows, threshold, classes),
        "reliability": diagrams,
        "reliability_svg": markup(plots.reliability_svg(diagrams, f"{key}-reliability")),
        "galleries": _galleries(run, threshold, classes),
    }


def _confusion(rows: PerImage, threshold: float | None, classes: list[str]) -> dict[str, Any]:
    table = confusion(rows, threshold, len(classes))
    shown = table.shown(SHOWN_CONFUSED)
    images = table.counts_CC.sum(1)
    lines = []
    for i in shown:
        cells = [{"count": int(table.counts_CC[i, j]), "right": i == j,
                  "share": float(table.counts_CC[i, j] / max(1, images[i]))} for j in shown]  # fmt: skip
        lines.append({"name": classes[i], "images": int(images[i]), "cells": cells})
    mistakes = [(classes[i], classes[j], n, n / images[i]) for i, j, n in table.mistakes(SHOWN_MISTAKES)]
    return {"columns": [classes[j] for j in shown], "rows": lines, "classes": len(classes), "mistakes": mistakes}


def _galleries(run: Run, threshold: float | None, classes: list[str]) -> dict[str, Any]:
    """`missing`: why there are none."""
    data = tree_of(run.config).get("data")
    if run.validation is None or not len(run.validation) or not isinstance(data, dict) or "folder" not in data:
        return {"missing": "images-validation.npz or the configuration is missing"}
    try:
        place = parse(DataConfig, {key: data[key] for key in ("folder", "staging") if key in data})
        pictures = Pictures(copied_beton(place, "validation"), run.validation)
        experts = expert_galleries(run.validation, threshold, classes, pictures)
        exits = run.evaluation is not None and run.evaluation.exits and threshold is not None
        early = early_galleries(run.validation, threshold, classes, pictures) if exits and threshold else []
    except (InputError, ValueError) as error:
        return {"missing": str(error)}
    return {"missing": "", "experts": experts, "early": early, "count": run.validation.right_NE.shape[1]}

"""The model card of a run: one page of Markdown that travels with the model (Mitchell et al., "Model Cards for Model
Reporting", 2019): what it is, its data, its figures and their cost, and its limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from coe_dist.report.comparison import tree_of
from coe_dist.report.folder import Run
from coe_dist.report.in_use import run_in_use
from coe_dist.report.words import macs, percent
from coe_dist.tracking.store import redact, write_bytes

CARD = "model-card.md"
SHOWN_CLASSES = 20


def write_card(run_dir: str | Path) -> Path:
    """Writes model-card.md into a run folder and returns its path. Raises InputError for a folder that is no run
    folder, and OSError."""
    run = run_in_use(run_dir)
    path = run.folder / CARD
    write_bytes(path, card(run).encode())
    return path


def card(run: Run) -> str:
    settings = tree_of(run.config)
    parts = [("What it is", _what(run, settings)), ("Data", _data(run, settings)), ("Figures", _figures(run))]
    parts += [("Training", _training(run, settings)), ("Limits", _limits(run))]
    text = "\n\n".join(f"## {title}\n\n" + "\n".join(lines) for title, lines in parts if lines)
    return f"# {plain(run.name)}\n\n{text}\n"


def plain(text: object) -> str:
    """Text as Markdown shows it: one line, every mark of Markdown's and HTML's escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~])", r"\\\1", " ".join(redact(str(text)).split()))


def _network(settings: dict[str, Any], name: str) -> str:
    section = settings.get(name)
    return plain(section.get("network", "?")) if isinstance(section, dict) else "?"


def _what(run: Run, settings: dict[str, Any]) -> list[str]:
    if run.baseline:
        # the configuration's networks are those of a collaboration
        said = "its network is not recorded" if run.network is None else plain(run.network)
        return [f"A single image classifier (`coe-dist`, baseline): {said}."]
    return [
        "An image classifier: a Collaboration of Experts trained with `coe-dist`. A light delegator",
        f"({_network(settings, 'delegator')}) sees every image; it answers itself or chooses one of",
        f"{plain(run.start.get('experts', '?'))} experts ({_network(settings, 'experts')}), which then answers.",
        "The framework is that of Zhang, Chen and Zhong (arXiv 2107.03815); the training rules are this project's own.",
    ]


def _data(run: Run, settings: dict[str, Any]) -> list[str]:
    data = settings.get("data")
    data = data if isinstance(data, dict) else {}
    source, folder = str(data.get("source", "?")), Path(str(data.get("folder", "?"))).name
    lines = [f"- source: {plain(source)}"]
    if folder != source:
        lines.append(f"- folder of the data set: {plain(folder)}")
    lines.append(f"- training images: {plain(run.start.get('images', '?'))}")
    if data.get("limit"):
        lines.append(f"- only the first {plain(data['limit'])} images of each split were used")
    lines.append(f"- side of the square that the networks see: {plain(data.get('resolution', '?'))} pixels")
    if run.details is not None:
        names = ", ".join(plain(name) for name in run.details.classes[:SHOWN_CLASSES])
        more = len(run.details.classes) - SHOWN_CLASSES
        lines.append(f"- {len(run.details.classes)} classes: {names}{f' and {more} more' if more > 0 else ''}")
    return lines


def _figures(run: Run) -> list[str]:
    table = ["| system | top-1 (%) | MACs per image |", "|---|---|---|"]
    if run.single is not None:
        return [*table, f"| one network alone | {percent(run.single.top1)} | {macs(run.single.macs)} |"]
    evaluation = run.evaluation
    if evaluation is None:
        return ["Not evaluated yet."]
    experts = [value for value in evaluation.top1.experts if value is not None]
    table += [
        f"| collaboration | {percent(evaluation.top1.coe)} | {macs(evaluation.average_macs)} on average |",
        f"| delegator alone | {percent(evaluation.top1.delegator)} | {macs(evaluation.macs.delegator)} |",
        f"| best single expert | {percent(max(experts, default=None))} | {macs(max(evaluation.macs.experts))} |",
        f"| oracle (any expert right) | {percent(evaluation.top1.oracle)} | |",
        "",
        f"On {evaluation.images} {plain(evaluation.split)} images. MACs are multiply-adds (the paper's FLOPs).",
    ]
    if evaluation.exits:
        table.append(
            f"The delegator answers {percent(evaluation.exit_rate)}% of them itself, from confidence "
            f"{evaluation.threshold:.4f} on; that threshold belongs to the model."
        )
    error = {name: value for name, value in evaluation.ece.items() if value is not None}
    if error:
        said = ", ".join(f"{plain(name)} {percent(value)}%" for name, value in sorted(error.items()))
        table.append(f"Expected calibration error: {said}.")
    return table


def _training(run: Run, settings: dict[str, Any]) -> list[str]:
    training = settings.get("training")
    training = training if isinstance(training, dict) else {}
    rows = {
        "epochs": run.start.get("epochs"),
        "images per step": training.get("global_batch"),
        "experts that see each image": None if run.baseline else run.start.get("experts_per_sample"),
        "workers": run.start.get("world_size"),
        "precision": training.get("precision"),
        "seed": settings.get("seed"),
        "seconds": None if run.seconds is None else round(run.seconds),
    }
    return [f"- {name}: {plain(value)}" for name, value in rows.items() if value is not None]


def _limits(run: Run) -> list[str]:
    lines = [
        "- One training with one seed; how far another seed would differ was not measured.",
        "- It knows only the classes above and always answers one of them, also for images that show none.",
        "- Figures hold for images like those of the data set; nothing was measured on others, nor on how errors fall",
        "  on groups of people.",
    ]
    details = run.details
    if details is not None and run.rows is not None and run.evaluation is not None:
        from coe_dist.report.quality import confusion

        counts_CC = confusion(run.rows, run.evaluation.threshold, len(details.classes)).counts_CC
        known = [(counts_CC[c, c] / counts_CC[c].sum(), c) for c in range(len(counts_CC)) if counts_CC[c].sum()]
        worst = ", ".join(f"{plain(details.classes[c])} {percent(float(share))}%" for share, c in sorted(known)[:3])
        lines.append(f"- Hardest classes: {worst}.")
    return lines

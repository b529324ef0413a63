"""Figures of the report as inline SVG.

Matplotlib draws with placeholder colours; they become CSS variables of the page, so one figure serves light and dark.
Lines differ in colour and in stroke, so colours are never the only difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

from coe_dist.report.folder import Evaluation, Run, Summary

POINTS = 400  # a longer curve is drawn as the means of so many equal pieces
NAMED_EXPERTS = 8  # more are drawn as a band
_INK, _FAINT = "#0a0b01", "#0a0b02"
_SERIES = ["#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14"]
_VARIABLES = {_INK: "--ink", _FAINT: "--faint"} | {c: f"--series-{i + 1}" for i, c in enumerate(_SERIES)}
_STROKES: list[Any] = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


def curve_svg(evaluation: Evaluation, summary: Summary | None, key: str) -> str:
    """Top-1 over average MACs as the threshold moves, the chosen point, and single networks for comparison."""
    points = sorted(evaluation.curve, key=lambda p: p.average_macs)
    unit, scale = _unit(max([evaluation.average_macs, *evaluation.macs.experts, *(p.average_macs for p in points)]))
    with _figure() as figure:
        axes = figure.add_subplot()
        x, y = [p.average_macs / scale for p in points], [100 * p.top1 for p in points]
        axes.plot(x, y, color=_SERIES[0], label="CoE, all thresholds")
        chosen = "CoE, no early exit" if evaluation.threshold is None else f"CoE, threshold {evaluation.threshold:.3g}"
        x, y = [evaluation.average_macs / scale], [100 * evaluation.top1.coe]
        axes.plot(x, y, "o", ms=10, mec=_SERIES[0], mfc="none", mew=2, label=chosen)
        for system, name, marker in _singles(summary):
            x, y = [(system.macs or 0) / scale], [100 * system.top1]
            axes.plot(x, y, marker, ms=7, color=_SERIES[1], label=name)
        axes.margins(0.08)
        axes.set_xlabel(f"average MACs per image{unit}")
        axes.set_ylabel("top-1 (%)")
        figure.legend(loc="outside upper left", ncols=2, handlelength=2)
        return _svg(figure, f"{key}-curve")


def lines_svg(run: Run, names: Sequence[tuple[str, str]], label: str, percent: bool, key: str) -> str:
    """Metrics over epochs (over steps where the run does not say how many make an epoch); "" where none is recorded."""
    with _figure() as figure:
        axes = figure.add_subplot()
        for number, (name, title) in enumerate(n for n in names if n[0] in run.series):
            x, y = _points(run, name)
            y = [100 * v for v in y] if percent else y
            marker = "o" if len(x) <= 20 else None
            axes.plot(x, y, color=_SERIES[number % 4], ls=_STROKES[number % 4], marker=marker, ms=3.5, label=title)
        return _finish(figure, axes, run, label, key)


def load_svg(run: Run, key: str) -> str:
    """The fraction of images every expert gets during training; above 8 experts the range and the middle half."""
    names = sorted(name for name in run.series if re.fullmatch(r"expert/\d+/load", name))
    with _figure() as figure:
        axes = figure.add_subplot()
        if names:
            axes.axhline(100 / len(names), color=_INK, lw=0.8, ls=":")
        if len(names) <= NAMED_EXPERTS:
            for number, name in enumerate(names):
                x, y = _points(run, name)
                style = {"color": _SERIES[number % 4], "ls": _STROKES[(number + number // 4) % 4]}
                axes.plot(x, [100 * v for v in y], label=f"expert {int(name.split('/')[1])}", **style)
        else:
            import numpy as np

            steps = sorted(set.intersection(*(set(run.series[name]) for name in names)))
            loads = 100 * np.array([[run.series[name][step] for step in steps] for name in names])
            x = [step * _per_step(run) for step in steps]
            if steps:
                low, first, middle, third, high = np.percentile(loads, [0, 25, 50, 75, 100], axis=0)
                axes.fill_between(x, low, high, color=_SERIES[0], alpha=0.18, lw=0, label="all experts")
                axes.fill_between(x, first, third, color=_SERIES[0], alpha=0.4, lw=0, label="middle half")
                axes.plot(x, middle, color=_SERIES[0], label="median")
        axes.set_ylim(bottom=0)
        return _finish(figure, axes, run, "share of images (%)", f"{key}-load")


def bars_svg(evaluation: Evaluation, key: str) -> str:
    """Top-1 of the delegator alone, of the best single expert, of CoE, and of the best expert for every image."""
    top1 = evaluation.top1
    experts = [value for value in top1.experts if value is not None]
    rows = [("delegator alone", top1.delegator, _FAINT), ("best expert alone", max(experts, default=math.nan), _FAINT)]
    rows += [("CoE", top1.coe, _SERIES[0]), ("oracle", top1.oracle, _FAINT)]
    rows = [row for row in rows if math.isfinite(row[1])]
    with _figure(height=2.3) as figure:
        axes = figure.add_subplot()
        bars = axes.barh([r[0] for r in rows], [100 * r[1] for r in rows], color=[row[2] for row in rows], height=0.62)
        axes.bar_label(bars, fmt="%.1f", padding=4)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_xlim(0, 112)
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.tick_params(length=0, labelbottom=False)
        return _svg(figure, f"{key}-bars")


def _singles(summary: Summary | None) -> list[tuple[Any, str, str]]:
    if summary is None:
        return []
    found = [(summary.single, "one expert network", "s"), (summary.single_same_macs, "one network, same MACs", "D")]
    return [row for row in found if row[0] is not None and row[0].macs]


def _finish(figure: Any, axes: Any, run: Run, label: str, key: str) -> str:
    handles = axes.get_legend_handles_labels()[0]
    if not handles:
        return ""
    axes.set_xlabel("epoch" if _per_step(run) != 1 else "step")
    axes.set_ylabel(label)
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    figure.legend(loc="outside upper left", ncols=2 if len(handles) <= 4 else 3, handlelength=2.6)
    return _svg(figure, key)


def _per_step(run: Run) -> float:
    steps = run.start.get("steps_per_epoch")
    return 1 / steps if isinstance(steps, int) and steps > 0 else 1


def _points(run: Run, name: str) -> tuple[list[float], list[float]]:
    pairs = sorted(run.series[name].items())
    width = math.ceil(len(pairs) / POINTS)
    pieces = [pairs[i : i + width] for i in range(0, len(pairs), width)]
    x = [sum(step for step, _ in piece) / len(piece) * _per_step(run) for piece in pieces]
    return x, [sum(value for _, value in piece) / len(piece) for piece in pieces]


def _unit(largest: float) -> tuple[str, float]:
    return next(((f" ({n})", s) for n, s in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if largest >= s), ("", 1.0))


class _figure:  # noqa: N801  reads as a function at its uses
    """A figure under this module's settings; no pyplot, so nothing global stays behind."""

    def __init__(self, height: float = 3.3) -> None:
        self._height = height

    def __enter__(self) -> Any:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        self._context = mpl.rc_context(SETTINGS)
        self._context.__enter__()
        return Figure(figsize=(5.4, self._height), layout="constrained", facecolor="none")

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _svg(figure: Any, key: str) -> str:
    """The figure as an <svg> element that can share a page with others: own ids, no foreign addresses, page colours."""
    for axes in figure.axes:
        axes.set_facecolor("none")
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # Its <style> would apply to the whole page; page.html says the same for figures only.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{key}-", text)
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()

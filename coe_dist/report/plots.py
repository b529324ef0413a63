"""The figures of the report: curves, lines over epochs, bars, reliability. See figure.py for how they become SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from coe_dist.report.figure import FAINT, INK, MARKS, SERIES, STROKES, figure, places, svg, unit
from coe_dist.report.folder import Evaluation, Run, Summary
from coe_dist.report.quality import Reliability, Standing
from coe_dist.report.words import macs

POINTS = 400  # a longer curve is drawn as the means of so many equal pieces
_SINGLES = {"single": ("one expert network", "s"), "single_same_macs": ("one network of {} MACs", "D")}
NAMED_EXPERTS = 8  # more are drawn as a band

Points = list[tuple[float, float]]


def curve_svg(evaluation: Evaluation, summary: Summary | None, key: str) -> tuple[str, Points]:
    """Top-1 over average MACs as the threshold moves, the chosen point, and single networks for comparison.

    Also gives the place of each point of the curve (by rising threshold) in the SVG, for the mark `<key>-mark`.
    """
    points = evaluation.points
    label, scale = unit(max([evaluation.average_macs, *evaluation.macs.experts, *(p.average_macs for p in points)]))
    with figure() as drawn:
        axes = drawn.add_subplot()
        x, y = [p.average_macs / scale for p in points], [100 * p.top1 for p in points]
        axes.plot(x, y, color=SERIES[0], label="CoE, all thresholds")
        chosen = "CoE, no early exit" if not evaluation.exits else f"CoE, threshold {evaluation.threshold:.3g}"
        own = [evaluation.average_macs / scale], [100 * evaluation.top1.coe]
        axes.plot(*own, "o", ms=10, mec=SERIES[0], mfc="none", mew=2, label=chosen)
        for key_of, _, system in summary.singles(evaluation.split) if summary else []:
            if system.macs:
                name, marker = _SINGLES[key_of]
                at = [system.macs / scale], [100 * system.top1]
                axes.plot(*at, marker, ms=7, color=SERIES[1], label=name.format(macs(system.macs)))
        axes.margins(0.08)
        axes.set_xlabel(f"average MACs per image{label}")
        axes.set_ylabel("top-1 (%)")
        drawn.legend(loc="outside upper left", ncols=2, handlelength=2)
        where = places(drawn, axes, x, y)
        start = places(drawn, axes, *own)[0]
        mark = f'<g id="{key}-mark" class="mark" transform="translate({start[0]} {start[1]})"><circle r="4.5"/></g>'
        return svg(drawn, f"{key}-curve", mark), where


def curves_svg(runs: Sequence[Run], key: str) -> str:
    """The curves of several runs in one figure, each with a mark at its own threshold; single networks are marks."""
    largest = [e.average_macs for run in runs if (e := run.evaluation)]
    largest += [run.single.macs for run in runs if run.single and run.single.macs]
    if not largest:
        return ""
    label, scale = unit(max(largest))
    with figure(height=3.4, width=4.7) as drawn:
        axes = drawn.add_subplot()
        for number, run in enumerate(runs):
            style = {"color": SERIES[number % 6], "marker": MARKS[number % 6]}
            if run.evaluation is not None:
                points, own = run.evaluation.points, run.evaluation
                x, y = [p.average_macs / scale for p in points], [100 * p.top1 for p in points]
                stroke = STROKES[(number + number // 6) % 6]
                axes.plot(x, y, color=style["color"], ls=stroke)
                axes.plot([own.average_macs / scale], [100 * own.top1.coe], **style, ls=stroke, ms=7, label=run.name)
            elif run.single is not None and run.single.macs:
                x, y = [run.single.macs / scale], [100 * run.single.top1]
                axes.plot(x, y, **style, ls="", ms=7, label=run.name)
        axes.margins(0.08)
        axes.set_xlabel(f"average MACs per image{label}")
        axes.set_ylabel("top-1 (%)")
        drawn.legend(loc="outside upper left", ncols=2, handlelength=2.6)
        return svg(drawn, key)


def lines_svg(run: Run, names: Sequence[tuple[str, str]], label: str, percent: bool, key: str) -> str:
    """Metrics over epochs (over steps where the run does not say how many make an epoch); "" where none is recorded."""
    with figure() as drawn:
        axes = drawn.add_subplot()
        for number, (name, title) in enumerate(n for n in names if n[0] in run.series):
            x, y = _points(run, name)
            y = [100 * v for v in y] if percent else y
            marker = "o" if len(x) <= 20 else None
            axes.plot(x, y, color=SERIES[number % 6], ls=STROKES[number % 6], marker=marker, ms=3.5, label=title)
        return _finish(drawn, axes, run, label, key)


def experts_svg(run: Run, kind: str, label: str, key: str, *, even: bool = False) -> str:
    """A figure of each expert over epochs, `expert/NN/<kind>`; above 8 experts the range and the middle half.

    even: draws the equal share of all experts.
    """
    names = sorted(name for name in run.series if re.fullmatch(rf"expert/\d+/{kind}", name))
    with figure() as drawn:
        axes = drawn.add_subplot()
        if names and even:
            axes.axhline(100 / len(names), color=INK, lw=0.8, ls=":")
        if len(names) <= NAMED_EXPERTS:
            for number, name in enumerate(names):
                x, y = _points(run, name)
                style = {"color": SERIES[number % 6], "ls": STROKES[(number + number // 6) % 6]}
                marker = MARKS[number % 6] if len(x) <= 20 else None
                title = f"expert {int(name.split('/')[1])}"
                axes.plot(x, [100 * v for v in y], label=title, marker=marker, ms=4, **style)
        else:
            _band(axes, run, names)
        if even:
            axes.set_ylim(bottom=0)
        return _finish(drawn, axes, run, label, key)


def _band(axes: Any, run: Run, names: list[str]) -> None:
    import numpy as np

    steps = sorted(set.union(*(set(run.series[name]) for name in names)))
    values = 100 * np.array([[run.series[name].get(step, math.nan) for step in steps] for name in names])
    x = [step * _per_step(run) for step in steps]
    low, first, middle, third, high = np.nanpercentile(values, [0, 25, 50, 75, 100], axis=0)
    axes.fill_between(x, low, high, color=SERIES[0], alpha=0.18, lw=0, label="all experts")
    axes.fill_between(x, first, third, color=SERIES[0], alpha=0.4, lw=0, label="middle half")
    axes.plot(x, middle, color=SERIES[0], label="median", marker="o" if len(x) <= 20 else None, ms=3.5)


def bars_svg(standings: Sequence[Standing], key: str) -> str:
    """Top-1 of ways to choose the expert, one bar each; the one in use is coloured."""
    with figure(height=0.7 + 0.3 * len(standings)) as drawn:
        axes = drawn.add_subplot()
        colours = [SERIES[0] if standing.used else FAINT for standing in standings]
        names, values = [s.name for s in standings], [100 * s.top1 for s in standings]
        bars = axes.barh(names, values, color=colours, height=0.62)
        axes.bar_label(bars, fmt="%.1f", padding=4)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_xlim(0, 112)
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.tick_params(length=0, labelbottom=False)
        return svg(drawn, key)


def reliability_svg(diagrams: Sequence[Reliability], key: str) -> str:
    """Accuracy over stated probability; the size of a mark grows with its bin's share of the images."""
    with figure(height=3.7) as drawn:
        axes = drawn.add_subplot()
        axes.plot([0, 100], [0, 100], color=INK, lw=0.8, ls=":", label="as right as it says")
        for number, diagram in enumerate(diagrams):
            x, y = [100 * b.confidence for b in diagram.bins], [100 * b.accuracy for b in diagram.bins]
            images = sum(b.images for b in diagram.bins)
            sizes = [12 + 190 * b.images / images for b in diagram.bins]
            title = f"{diagram.name}, ECE {100 * diagram.ece:.1f}%"
            axes.plot(x, y, color=SERIES[number], ls=STROKES[number], lw=1.2)
            axes.scatter(x, y, s=sizes, color=SERIES[number], marker=MARKS[number], alpha=0.8, label=title)
        axes.set_xlim(0, 103)
        axes.set_ylim(0, 103)
        axes.set_xlabel("stated probability (%)")
        axes.set_ylabel("right (%)")
        legend = drawn.legend(loc="outside upper left", ncols=2, handlelength=2)
        for handle in legend.legend_handles[1:]:
            handle.set_sizes([40])
        return svg(drawn, key)


def _finish(drawn: Any, axes: Any, run: Run, label: str, key: str) -> str:
    handles = axes.get_legend_handles_labels()[0]
    if not handles:
        return ""
    axes.set_xlabel("epoch" if _per_step(run) != 1 else "step")
    axes.set_ylabel(label)
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    drawn.legend(loc="outside upper left", ncols=2 if len(handles) <= 4 else 3, handlelength=2.6)
    return svg(drawn, key)


def _per_step(run: Run) -> float:
    steps = run.start.get("steps_per_epoch")
    return 1 / steps if isinstance(steps, int) and steps > 0 else 1


def _points(run: Run, name: str) -> tuple[list[float], list[float]]:
    pairs = sorted(run.series[name].items())
    width = math.ceil(len(pairs) / POINTS)
    pieces = [pairs[i : i + width] for i in range(0, len(pairs), width)]
    x = [sum(step for step, _ in piece) / len(piece) * _per_step(run) for piece in pieces]
    return x, [sum(value for _, value in piece) / len(piece) for piece in pieces]

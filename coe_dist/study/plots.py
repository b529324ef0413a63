"""docs/results/NAME.svg: the frontier, or the differences from the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from coe_dist.report.figure import SETTINGS

_COLOURS = ["#1f6fb2", "#c4541c", "#3a8f4d", "#8a4fa3", "#a8890c", "#5b6770"]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X"]  # one more than colours, so that no two curves look the same
_INK = "#333333"


def frontier_svg(found: Mapping[str, Any]) -> str:
    """Test top-1 over average MACs (logarithmic): single networks, and each collaboration at its chosen threshold and
    without early exit; bars are standard deviations over seeds."""
    with _Figure(6.4, 4.2) as (figure, axes):
        singles = found["single"]
        _dots(axes, singles, "macs", "top1", label="single networks", colour=_INK, marker="x", line="-")
        curves = dict.fromkeys(point["curve"] for point in found["collaborations"])
        for number, curve in enumerate(curves):
            points = sorted((p for p in found["collaborations"] if p["curve"] == curve), key=lambda p: float(p["macs"]))
            style: dict[str, Any] = {
                "colour": _COLOURS[number % len(_COLOURS)],
                "marker": _MARKERS[number % len(_MARKERS)],
            }
            _dots(axes, points, "macs", "top1", label=curve, line="-", **style)
            _dots(axes, points, "full_macs", "full_top1", label=None, line=":", hollow=True, **style)
        axes.set_xscale("log")
        axes.set_xlabel("average MACs per image (hollow: nobody exits early)")
        axes.set_ylabel("test top-1 (%)")
        axes.legend(loc="lower right")
        return _svg(figure)


def differences_svg(points: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """Difference of top-1 from the baseline in points, all images at an expert, mean and standard deviation."""
    shown = [point for point in points if point["difference"] is not None]
    with _Figure(6.4, 1.2 + 0.26 * len(shown)) as (figure, axes):
        names = [f"{point['curve']}/{point['point']}" for point in shown]
        means = [100 * point["difference"]["mean"] for point in shown]
        deviations = [100 * (point["difference"]["sd"] or 0.0) for point in shown]
        axes.axvline(0, color=_INK, lw=0.8)
        axes.errorbar(means, range(len(shown)), xerr=deviations, fmt="o", color=_COLOURS[0], capsize=3)
        axes.set_yticks(range(len(shown)), names)
        axes.invert_yaxis()
        axes.set_xlabel(f"top-1 less that of {baseline} (points), no early exit")
        return _svg(figure)


def _dots(
    axes: Any,
    points: Sequence[Mapping[str, Any]],
    x: str,
    y: str,
    *,
    label: str | None,
    colour: str,
    marker: str,
    line: str,
    hollow: bool = False,
) -> None:
    axes.errorbar(
        [point[x] for point in points],
        [100 * point[y]["mean"] for point in points],
        yerr=[100 * (point[y]["sd"] or 0.0) for point in points],
        label=label,
        color=colour,
        marker=marker,
        mfc="none" if hollow else colour,
        ls=line,
        ms=5,
        lw=1.2,
        capsize=2,
    )


class _Figure:
    """A figure on white under the report's settings, with fixed ids, so that equal results are equal files."""

    def __init__(self, width: float, height: float) -> None:
        self._size = (width, height)

    def __enter__(self) -> tuple[Any, Any]:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        colours = {name: _INK for name, value in SETTINGS.items() if str(value).startswith("#")}
        self._context = mpl.rc_context({**SETTINGS, **colours, "svg.hashsalt": "coe-dist"})
        self._context.__enter__()
        figure = Figure(figsize=self._size, layout="constrained", facecolor="white")
        return figure, figure.add_subplot()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _svg(figure: Any) -> str:
    file = StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"

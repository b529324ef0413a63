"""Matplotlib figures as inline SVG that take their colours from the page.

Placeholder colours become CSS variables, so one figure serves light and dark. Series have the hues of Okabe and Ito's
palette for colour-blind readers ("Color Universal Design", 2008), and a stroke or a mark of their own as well.
"""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

INK, FAINT, PAPER = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = ["#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14", "#0a0b15", "#0a0b16"]
_VARIABLES = {INK: "--ink", FAINT: "--faint", PAPER: "--card"} | {c: f"--series-{i + 1}" for i, c in enumerate(SERIES)}
STROKES: list[Any] = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1))]
MARKS = "osD^vP"
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


class figure:  # noqa: N801  reads as a function at its uses
    """A figure under this module's settings; no pyplot, so nothing global stays behind."""

    def __init__(self, height: float = 3.0, width: float = 4.7) -> None:
        self._size = (width, height)

    def __enter__(self) -> Any:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        self._context = mpl.rc_context(SETTINGS)
        self._context.__enter__()
        return Figure(figsize=self._size, layout="constrained", facecolor="none")

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def svg(drawn: Any, key: str, inside: str = "") -> str:
    """The figure as an <svg> element that can share a page with others: own ids, no foreign addresses, page colours.

    inside: elements to put last into it.
    """
    for axes in drawn.axes:
        axes.set_facecolor("none")
    file = StringIO()
    drawn.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # Its <style> would apply to the whole page; style.css says the same for figures only.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{key}-", text)
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip().removesuffix("</svg>") + inside + "</svg>"


def places(drawn: Any, axes: Any, x: list[float], y: list[float]) -> list[tuple[float, float]]:
    """Where these points of `axes` lie in the figure's SVG, in its own units; after everything is drawn."""
    drawn.draw_without_rendering()
    height, scale = drawn.bbox.height, 72 / drawn.dpi
    return [
        (round(px * scale, 1), round((height - py) * scale, 1))
        for px, py in axes.transData.transform(list(zip(x, y, strict=True)))
    ]


def unit(largest: float) -> tuple[str, float]:
    """(" (k)", 1e3) and the like, for an axis of MACs."""
    return next(((f" ({n})", s) for n, s in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if largest >= s), ("", 1.0))

"""Numbers as words of the report."""

from __future__ import annotations


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

"""Test cases over several axes: the whole grid, or few cases in which every pair of values of two axes occurs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from typing import Any

Axes = dict[str, list[Any]]
Case = dict[str, Any]


def grid(axes: Axes, allowed: Callable[[Case], bool]) -> list[Case]:
    cases = (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))
    return [case for case in cases if allowed(case)]


def pairs_of(case: Case) -> set[tuple[Any, ...]]:
    return {(a, case[a], b, case[b]) for a, b in combinations(case, 2)}


def covering(axes: Axes, allowed: Callable[[Case], bool]) -> list[Case]:
    """Greedy: always the case with the most pairs not seen yet."""
    candidates = [(case, pairs_of(case)) for case in grid(axes, allowed)]
    open_pairs = set().union(*(pairs for _, pairs in candidates))
    chosen = []
    while open_pairs:
        case, pairs = max(candidates, key=lambda candidate: len(candidate[1] & open_pairs))
        chosen.append(case)
        open_pairs -= pairs
    return chosen

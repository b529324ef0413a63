"""Which of several works that give the same answer is the fastest here, in few calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coe_dist.bench.record import timed

HOPELESS = 1.5  # times the fastest work's second call
CALLS = 3  # of those that are near it


def fastest(works: Mapping[str, Callable[[], object]]) -> str:
    """The name of the work with the shortest best call. The first call of each, which may prepare things, does not
    count; those that are HOPELESS in their second are not called again, the others take turns."""
    if len(works) == 1:
        return next(iter(works))
    for work in works.values():
        work()
    seconds = {name: timed(work, 1)[0] for name, work in works.items()}
    near = [name for name in works if seconds[name] <= HOPELESS * min(seconds.values())]
    for _ in range(CALLS if len(near) > 1 else 0):
        for name in near:
            seconds[name] = min(seconds[name], timed(works[name], 1)[0])
    return min(near, key=lambda name: seconds[name])

"""Where the time of a training step goes: the step's moves, timed one by one from outside (wall seconds of a rank)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from coe_dist.parallel.exchange import combine, dispatch
from coe_dist.training import step as moves
from coe_dist.training.step import CollaborationStep, MicroBatch, StepSums

PARTS = ("delegate", "route", "dispatch", "experts", "combine", "labels", "delegator_backward", "optimizer")


class Clock:
    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def timing(self, part: str, work: Callable[..., Any], *, result: bool = False) -> Callable[..., Any]:
        """`work`, timed; with `result` the function that it returns is timed too."""

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                answer = work(*arguments, **named)
            finally:
                self.seconds[part] += time.perf_counter() - start
            return self.timing(part, answer) if result else answer

        return timed


class _TimedEngine:
    """Stands in for an engine of the step; what is not timed is the engine's own."""

    def __init__(self, engine: Any, clock: Clock, forward: str | None, backward: str) -> None:
        self._engine = engine
        self._call = engine if forward is None else clock.timing(forward, engine)
        self.backward = clock.timing(backward, engine.backward)
        self.step = clock.timing("optimizer", engine.step)

    def __call__(self, images: Any) -> Any:
        return self._call(images)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def parts_of(step: CollaborationStep, batch: MicroBatch, repeats: int) -> dict[str, float]:
    """Median seconds of each part over `repeats` steps. `experts` holds their forward pass, losses and backward pass.
    Collective."""
    clock = Clock()
    router = step.router
    # the experts' forward pass is timed as a whole, with their losses
    experts = {expert: _TimedEngine(engine, clock, None, "experts") for expert, engine in step.experts.items()}
    with (
        _replaced(step, delegator=_TimedEngine(step.delegator, clock, "delegate", "delegator_backward")),
        _replaced(step, experts=experts, _expert_losses=clock.timing("experts", step._expert_losses)),
        _replaced(
            moves,
            dispatch=clock.timing("dispatch", dispatch),
            combine=clock.timing("combine", combine, result=True),
        ),
        _replaced(
            router,
            route=clock.timing("route", router.route),
            start_labels=clock.timing("labels", router.start_labels, result=True),
        ),
    ):
        taken = []
        for _ in range(repeats):
            clock.seconds = dict.fromkeys(PARTS, 0.0)
            step.step([batch], StepSums())
            taken.append(clock.seconds)
    return {part: statistics.median(seconds[part] for seconds in taken) for part in PARTS}

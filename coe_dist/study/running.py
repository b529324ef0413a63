"""Runs the trainings of a study that are left, one on each slot at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from coe_dist.errors import TrainingError
from coe_dist.study.slot import Slot, Trained
from coe_dist.study.trainings import Training
from coe_dist.training.job import Job


def run_all(
    trainings: Sequence[Training],
    *,
    slots: int,
    logs: Path,
    begin: Callable[[Training], Job],
    finish: Callable[[Training, Trained], None],
    seconds_of: Callable[[Training], float],
    max_seconds: float | None = None,
) -> int:
    """Trains them in order and returns how many were begun.

    begin: makes the run folder and the job, called before each; finish: called with what became of it, in the order in
    which they end. With `max_seconds` none is begun that by `seconds_of` would end later, but the first always is. A
    process that dies fails its training and is replaced. Leaving by an exception kills what is being trained.
    """
    started, begun = time.monotonic(), 0
    waiting = list(trainings)
    free: list[Slot] = []
    busy: dict[Connection, tuple[Slot, Training, float]] = {}
    number = 0
    try:
        while waiting or busy:
            while waiting and len(busy) < slots:
                elapsed = time.monotonic() - started
                training = _next(waiting, [one for _, one, _ in busy.values()])
                if training is None:
                    break
                if max_seconds is not None and begun >= slots and elapsed + seconds_of(training) > max_seconds:
                    waiting = []
                    break
                waiting.remove(training)
                try:
                    job = begin(training)
                except TrainingError as error:
                    finish(training, Trained(0.0, 0.0, str(error)))
                    continue
                if not free:
                    free.append(Slot(logs / f"slot-{number}.log"))
                    number += 1
                slot = free.pop()
                slot.submit(job)
                busy[slot.connection] = (slot, training, time.monotonic())
                begun += 1
            for connection in wait(list(busy)) if busy else ():
                assert isinstance(connection, Connection)
                slot, training, since = busy.pop(connection)
                try:
                    trained = slot.result()
                    free.append(slot)
                except TrainingError as error:
                    slot.close()
                    trained = Trained(time.monotonic() - since, 0.0, str(error))
                finish(training, trained)
    finally:
        for slot in [*free, *(slot for slot, _, _ in busy.values())]:
            slot.close()
    return begun


def _next(waiting: Sequence[Training], running: Sequence[Training]) -> Training | None:
    """The first that is ready and starts from none that is still running; None: to be asked again when one has ended.
    Where none runs, the first, ready or not."""
    for training in waiting:
        if training.ready and not any(start in running for _, start in training.starts):
            return training
    return None if running else waiting[0]

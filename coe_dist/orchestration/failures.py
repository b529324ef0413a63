"""From the failures of several workers to one line for the user and a full account in <run_dir>/error.txt.

Failures are kept by rank; -1 stands for one that Ray could not assign to a rank.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from coe_dist.errors import InputError, TrainingError


class WorkerFailed(Exception):  # noqa: N818  it is what happened, the error it becomes is raised by the driver
    """A worker's exception as text: the original may not survive pickling or may need modules the driver lacks.

    `kind` is "input", "training" or "other"; `when` unix seconds, to tell the first failure from those it caused.
    """

    def __init__(self, rank: int, kind: str, message: str, account: str, when: float) -> None:
        super().__init__(rank, kind, message, account, when)  # all of them: pickle calls the class with `args`
        self.rank, self.kind, self.message, self.account, self.when = rank, kind, message, account, when

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.message}"


def describe_failure(error: BaseException, rank: int) -> WorkerFailed:
    """What a worker hands to the driver in place of its exception."""
    kind = "input" if isinstance(error, InputError) else "training" if isinstance(error, TrainingError) else "other"
    message = _first_line(error) if kind != "other" else f"{type(error).__name__}: {_first_line(error)}"
    return WorkerFailed(rank, kind, message, "".join(traceback.format_exception(error)), time.time())


def root_cause(failures: Mapping[int, BaseException]) -> InputError | TrainingError:
    """The error to raise for the failures by rank: bad input first, then a worker that died, then the earliest.

    When one rank fails the others' collectives fail a moment later; those say nothing about the cause.
    """
    told = [failure for failure in failures.values() if isinstance(failure, WorkerFailed)]
    dead = {rank: failure for rank, failure in failures.items() if not isinstance(failure, WorkerFailed)}
    for failure in sorted(told, key=lambda failure: failure.when):
        if failure.kind == "input":
            return InputError(failure.message)
    if dead:
        rank = min(dead)
        who = f"the process of rank {rank}" if rank >= 0 else "a worker's process"
        return TrainingError(f"{who} ended unexpectedly: {_reason_of_death(dead[rank])}")
    first = min(told, key=lambda failure: failure.when)
    return TrainingError(first.message if first.kind == "training" else str(first))


def write_account(run_dir: Path, failures: Mapping[int, BaseException]) -> Path:
    """Writes every rank's traceback to <run_dir>/error.txt, earliest first; returns its path."""
    path = run_dir / "error.txt"
    parts = []
    for rank, failure in sorted(failures.items(), key=lambda item: getattr(item[1], "when", 0.0)):
        account = failure.account if isinstance(failure, WorkerFailed) else f"{type(failure).__name__}: {failure}\n"
        parts.append(f"==== {f'rank {rank}' if rank >= 0 else 'Ray'} ====\n{account}")
    path.write_text("\n".join(parts))
    return path


def _reason_of_death(failure: BaseException) -> str:
    """The telling line of Ray's report on a dead actor."""
    inner = getattr(failure, "health_check_failure", failure)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    for line in lines:
        if "memory" in line.lower() and "killed" in line.lower():
            return line
    return lines[0] if lines else type(inner).__name__


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

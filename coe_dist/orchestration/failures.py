"""From the failures of several workers to one line for the user and a full account in <run_dir>/error.txt.

Failures are kept by rank; -1 stands for one that Ray could not assign to a rank.
"""

from __future__ import annotations

import logging
import re
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from coe_dist.errors import InputError, TrainingError

_log = logging.getLogger("coe_dist.failures")

# gloo writes its own paths into its messages; the router process's end is told to all ranks as text
_LOST = re.compile(r"\bgloo/|router process \(pid \w+\) ended")


class WorkerFailed(Exception):  # noqa: N818  it is what happened, the error it becomes is raised by the driver
    """A worker's exception as text: the original may not survive pickling or may need modules the driver lacks.

    `kind` is "input", "training", "lost" (another process is gone or does not answer) or "other"; `when` unix seconds,
    to tell the first failure from those it caused.
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
    if kind != "input" and tells_of_a_loss(error):
        kind, message = "lost", message if kind == "training" else f"rank {rank}: {message}"
    return WorkerFailed(rank, kind, message, "".join(traceback.format_exception(error)), time.time())


def tells_of_a_loss(error: BaseException | None) -> bool:
    """Whether an error says that another process is gone or does not answer: a failed collective, or the end of the
    router process. The error itself or one it was raised from, as engines and groups wrap what they get."""
    while error is not None:
        # torch's DistError and its kinds (NCCL, the store) by name: the driver need not import torch.distributed
        if any(kind.__name__ == "DistError" for kind in type(error).__mro__) or _LOST.search(str(error)):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def restartable(failures: Mapping[int, BaseException]) -> bool:
    """Whether a restart can mend these failures by rank: a process died, or nobody tells of more than a loss.

    A node's end is known to Ray only after some seconds, when all others have failed in a collective already.
    """
    told = [failure for failure in failures.values() if isinstance(failure, WorkerFailed)]
    if any(failure.kind == "input" for failure in told):
        return False
    return len(told) < len(failures) or (bool(told) and all(failure.kind == "lost" for failure in told))


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
    return TrainingError(str(first) if first.kind == "other" else first.message)


def write_account(run_dir: Path, failures: Mapping[int, BaseException]) -> Path:
    """Writes every rank's traceback to <run_dir>/error.txt, earliest first; returns its path.

    Never raises: a full disk costs a warning and the account, not the line that names the cause.
    """
    path = run_dir / "error.txt"
    parts = []
    for rank, failure in sorted(failures.items(), key=lambda item: getattr(item[1], "when", 0.0)):
        account = failure.account if isinstance(failure, WorkerFailed) else f"{type(failure).__name__}: {failure}\n"
        parts.append(f"==== {f'rank {rank}' if rank >= 0 else 'Ray'} ====\n{account}")
    try:
        path.write_text("\n".join(parts))
    except OSError as error:
        _log.warning("%s could not be written: %s", path, error.strerror)
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

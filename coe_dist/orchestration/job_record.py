"""Which of a cluster's jobs are ours: a run is known by its name, and each launch of it is an attempt.

The submission id of attempt n of run NAME is coe-NAME~n ('~' cannot be part of a name). Ray refuses an id it has seen,
so two launches at the same moment cannot both start the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coe_dist.errors import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, InputError
from coe_dist.orchestration.job_cluster import JobCluster

_RUN, _ATTEMPT, _SETTINGS = "coe_dist.run", "coe_dist.attempt", "coe_dist.settings"


@dataclass(frozen=True)
class Attempt:
    """One launch of a run, as the cluster knows it; times in milliseconds since 1970."""

    run: str
    number: int
    settings: str  # digest of what was launched
    submission_id: str
    status: str  # Ray's PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    started: int | None
    ended: int | None
    exit_code: int | None
    message: str

    @property
    def active(self) -> bool:
        return self.status in ("PENDING", "RUNNING")


def submission_id(run: str, attempt: int) -> str:
    return f"coe-{run}~{attempt}"


def metadata(run: str, attempt: int, settings: str) -> dict[str, str]:
    return {_RUN: run, _ATTEMPT: str(attempt), _SETTINGS: settings}


def attempts(cluster: JobCluster) -> list[Attempt]:
    """Every launch the cluster remembers, the oldest first."""
    with cluster.asking():
        jobs = cluster.client.list_jobs()
    found = [attempt for job in jobs if (attempt := _attempt(job)) is not None]
    return sorted(found, key=lambda attempt: (attempt.started or 0, attempt.number))


def newest_attempt(cluster: JobCluster, run: str) -> Attempt:
    """The newest launch of a run. Raises InputError naming the known runs when there is none."""
    known = attempts(cluster)
    own = [attempt for attempt in known if attempt.run == run]
    if own:
        return max(own, key=lambda attempt: attempt.number)
    names = ", ".join(sorted({attempt.run for attempt in known})) or "none"
    raise InputError(f"name: no run {run!r} was launched on {cluster.address}; launched there: {names}")


def exit_code_of(details: Any) -> int:
    """What `coe-dist train` ended with on the cluster; 75 where the job was stopped, 1 where it did not start."""
    status = str(details.status)
    if status == "SUCCEEDED":
        return EXIT_OK
    if status == "STOPPED":
        return EXIT_PREEMPTED
    code = details.driver_exit_code
    if code is None:
        return EXIT_FAILED
    return int(code) if code >= 0 else 128 - int(code)  # a signal, as shells count it


def _attempt(job: Any) -> Attempt | None:
    marks = job.metadata or {}
    if _RUN not in marks or job.submission_id is None:
        return None
    return Attempt(
        run=marks[_RUN],
        number=int(marks[_ATTEMPT]),
        settings=marks.get(_SETTINGS, ""),
        submission_id=job.submission_id,
        status=str(job.status),
        started=job.start_time,
        ended=job.end_time or None,
        exit_code=job.driver_exit_code,
        message=job.message or "",
    )

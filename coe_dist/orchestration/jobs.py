"""`coe-dist jobs`, `stop` and the table of launched runs."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from rich.table import Table

from coe_dist.console import table_console
from coe_dist.errors import TrainingError
from coe_dist.orchestration.job_cluster import JobCluster, job_cluster
from coe_dist.orchestration.job_record import Attempt, attempts, newest_attempt
from coe_dist.orchestration.progress_state import clock

STOP_SECONDS = 900.0  # a worker group ends within training.timeout_seconds (300 by default)


def launched(address: str | None = None) -> list[dict[str, Any]]:
    """What was launched on a cluster: run, attempt, status, times in seconds since 1970, exit code."""
    return [_row(attempt) for attempt in attempts(job_cluster(address))]


def stop(run: str, *, address: str | None = None, cluster: JobCluster | None = None) -> str:
    """Asks the newest launch of `run` to save and end, waits until it has, and says what came of it in one line."""
    cluster = cluster or job_cluster(address)
    attempt = newest_attempt(cluster, run)
    if not attempt.active:
        return f"{run} does not run (attempt {attempt.number} {attempt.status.lower()})"
    with cluster.asking():
        cluster.client.stop_job(attempt.submission_id)
    deadline = time.monotonic() + STOP_SECONDS
    while newest_attempt(cluster, run).active:
        if time.monotonic() > deadline:
            raise TrainingError(f"{run} did not end within {STOP_SECONDS:g} s; see coe-dist logs {run}")
        time.sleep(0.5)
    return f"{run} is stopped; the same coe-dist launch resumes it"


def show_launched(rows: list[dict[str, Any]]) -> None:
    if not rows:
        print("nothing was launched there yet")
        return
    table = Table()
    for name in ("run", "attempt", "status", "exit code", "started", "took"):
        table.add_column(name, justify="right" if name in ("attempt", "exit code") else "left")
    for row in rows:
        started = row["started"]
        began = "" if started is None else f"{datetime.fromtimestamp(started):%Y-%m-%d %H:%M:%S}"
        took = "" if started is None else clock((row["ended"] or time.time()) - started)
        code = "" if row["exit_code"] is None else str(row["exit_code"])
        table.add_row(row["run"], str(row["attempt"]), row["status"].lower(), code, began, took)
    table_console().print(table)


def _row(attempt: Attempt) -> dict[str, Any]:
    return {
        "run": attempt.run,
        "attempt": attempt.number,
        "status": attempt.status,
        "exit_code": attempt.exit_code,
        "started": None if attempt.started is None else attempt.started / 1000,
        "ended": None if attempt.ended is None else attempt.ended / 1000,
        "job": attempt.submission_id,
    }

"""Carries metrics.jsonl to MLflow, from the last sent position on (our own rule).

The file itself is the queue: nothing is held in memory, and a run whose server was down is sent later by the same
code. What was sent is a byte position in <run>/mlflow-sync.json, moved after every accepted batch. A value arrives
once per (metric, step): a process that dies between the batch and the position sends that batch again, and MLflow's
database drops rows equal in name, step, time and value. A step that a resumed run records a second time is not sent.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from coe_dist.tracking.journal import METRICS_FILE, parse_line
from coe_dist.tracking.store import connect, legal_name, read_json, write_json

SYNC_FILE = "mlflow-sync.json"
BATCH = 1000  # metrics in one request; MLflow refuses more


class Sender:
    """Sends one run's metrics; not thread-safe. `offset` is the number of bytes of metrics.jsonl that MLflow has."""

    def __init__(self, run_dir: Path, uri: str, run_id: str) -> None:
        self._metrics, self._position = run_dir / METRICS_FILE, run_dir / SYNC_FILE
        self._uri, self._run_id = uri, run_id
        self._client: Any = None
        self._last_step: dict[str, int] = {}  # newest step sent of every metric
        self.offset = 0
        position = read_json(self._position)
        if position.get("run_id") == run_id and self._metrics.is_file():
            offset = int(position.get("offset", 0))
            if offset <= self._metrics.stat().st_size:
                self._resume_at(offset)

    def pending(self) -> bool:
        return self._metrics.is_file() and self._metrics.stat().st_size > self.offset

    def client(self) -> Any:
        """The MLflow client, made (and MLflow imported) at the first call."""
        if self._client is None:
            self._client = connect(self._uri)
        return self._client

    def send(self, deadline: float | None = None) -> int:
        """Sends whole lines up to the end of the file, or until time.monotonic() passes `deadline`.

        Returns the number of values sent; raises whatever MLflow raises, with the position at the last accepted batch.
        """
        if not self.pending():
            return 0
        sent, end = 0, self.offset
        waiting: list[tuple[str, float, int, int]] = []
        steps: dict[str, int] = {}  # newest step in `waiting` of every metric
        with self._metrics.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                for name, value, moment, step in _values(line):
                    if step > max(self._last_step.get(name, -1), steps.get(name, -1)):
                        waiting.append((name, value, moment, step))
                        steps[name] = step
                end += len(line)
                if len(waiting) >= BATCH:
                    sent += self._deliver(waiting, steps, end)
                    waiting, steps = [], {}
                    if deadline is not None and time.monotonic() > deadline:
                        return sent
        if end > self.offset:
            sent += self._deliver(waiting, steps, end)
        return sent

    def _deliver(self, values: list[tuple[str, float, int, int]], steps: dict[str, int], end: int) -> int:
        for start in range(0, len(values), BATCH):
            client = self.client()
            from mlflow.entities import Metric

            batch = [Metric(legal_name(n), v, moment, step) for n, v, moment, step in values[start : start + BATCH]]
            client.log_batch(self._run_id, metrics=batch, synchronous=True)
        self._last_step |= steps
        self.offset = end
        write_json(self._position, {"run_id": self._run_id, "offset": end})
        return len(values)

    def _resume_at(self, offset: int) -> None:
        with self._metrics.open("rb") as file:
            while file.tell() < offset and (line := file.readline()):
                for name, _, _, step in _values(line):
                    self._last_step[name] = max(step, self._last_step.get(name, -1))
        self.offset = offset


def _values(line: bytes) -> list[tuple[str, float, int, int]]:
    """(name, value, milliseconds since 1970, step) of every metric in a line; empty for other and for torn lines."""
    record = parse_line(line)
    if record is None or not isinstance(record.get("metrics"), dict):
        return []
    try:
        moment, step = int(float(record["time"]) * 1000), int(record["step"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return []
    return [(name, value, moment, step) for name, value in record["metrics"].items()]

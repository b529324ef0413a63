"""metrics.jsonl: one JSON object a line, appended and flushed at once by one process; the primary record of a run."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
_log = logging.getLogger("coe_dist.tracking")


def read_metrics(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a run folder in file order; metric values are floats, NaN and infinities included.

    Lines that are no JSON object (torn by a crash or a full disk) are passed over. A missing file yields nothing.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            record = parse_line(line)
            if record is not None:
                yield record


def parse_line(line: bytes | str) -> dict[str, Any] | None:
    """The record in one line, or None where the line is not a whole record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or "kind" not in record:
        return None
    if isinstance(record.get("metrics"), dict):
        record["metrics"] = numbers_of(record["metrics"])
    return record


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as Python floats; what has no float value (a string, None, a tensor of many) is left out."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            continue
    return numbers


class TrainedSeconds:
    """How long a run has trained: all its starts, each until its end or, where it was cut short, its newest record."""

    def __init__(self) -> None:
        self.total = 0.0  # of the starts that are over
        self._since: float | None = None
        self._newest = 0.0

    def read(self, record: Mapping[str, Any]) -> None:
        """The records are given in file order."""
        kind, at, seconds = record["kind"], record.get("time"), record.get("seconds")
        if kind == "end" and isinstance(seconds, int | float):
            self.total += seconds
            self._since = None
        elif isinstance(at, int | float):
            if kind == "start":
                self.total += 0.0 if self._since is None else self._newest - self._since
                self._since = at
            self._newest = at


class Journal:
    """The open metrics.jsonl of a run. `append` never raises: a full disk costs one warning and the lines it hits."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS_FILE
        self._warned = False
        self._torn = False
        self._file: int | None = None
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._torn = _ends_inside_a_line(self._path)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            self._warn(error)

    def append(
        self, kind: str, *, step: int, epoch: int | None, metrics: Mapping[str, Any] | None, **extra: Any
    ) -> None:
        """Writes one line with a single system call, so that a crash tears at most the last line."""
        record: dict[str, Any] = {"kind": kind, "time": time.time(), "step": int(step)}
        if epoch is not None:
            record["epoch"] = int(epoch)
        record.update(extra)
        if metrics is not None:
            # JSON has no NaN: non-finite values are written as strings, which float() reads back.
            numbers = numbers_of(metrics)
            record["metrics"] = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        if self._file is None:
            return
        try:
            line = json.dumps(record, default=str).encode() + b"\n"
            if self._torn:
                line = b"\n" + line
            self._torn = os.write(self._file, line) != len(line)
            if self._torn:
                self._warn(OSError("the disk took only a part of a line"))
        except (OSError, TypeError, ValueError) as error:
            self._warn(error)

    @property
    def size(self) -> int:
        """Bytes in the file; 0 where it cannot be asked."""
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            _log.warning("%s: metrics cannot be written (%s); the run goes on without them", self._path, error)
        self._warned = True


def _ends_inside_a_line(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"

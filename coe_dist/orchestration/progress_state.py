"""What the lines of metrics.jsonl say about a running job, for whoever shows it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from coe_dist.tracking.journal import TrainedSeconds, parse_line

_LOAD = re.compile(r"^expert/(\d+)/load$")


@dataclass
class ProgressState:
    """The newest figures of a run. Times in seconds, rates in images per second, fractions from 0 to 1."""

    epochs: int = 0
    steps_per_epoch: int = 0
    step: int = 0
    epoch: int = -1  # counts from 0; -1: no training line yet
    train: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    split: str = ""
    seconds: float | None = None  # of all starts that were read, once the job has ended
    first_step: int = 0  # of the newest start
    resumed_from: str = ""  # the checkpoint's name
    workers: int = 0
    _trained: TrainedSeconds = field(default_factory=TrainedSeconds)
    _timed_from: tuple[float, int] | None = None  # time and step of the first training line
    _newest: tuple[float, int] | None = None

    def read(self, line: str) -> dict[str, Any] | None:
        """Takes in one line; returns its record, or None for a line that is not one (a torn write)."""
        record = parse_line(line)
        if record is None:
            return None
        self._trained.read(record)
        take = getattr(self, f"_take_{record['kind']}", None)
        if take is None:
            return None
        try:
            take(record)
        except (KeyError, TypeError, ValueError):
            return None
        return record

    def _take_start(self, record: dict[str, Any]) -> None:
        self.epochs, self.steps_per_epoch = int(record["epochs"]), int(record["steps_per_epoch"])
        self.step, self.epoch, self.seconds = int(record["step"]), -1, None
        self.first_step = self.step
        self.resumed_from, self.workers = str(record.get("resumed_from", "")), int(record.get("world_size", 0))
        self._timed_from = self._newest = None  # a job that was started again after a failure times itself afresh

    def _take_train(self, record: dict[str, Any]) -> None:
        self.train = dict(record["metrics"])
        self.step, self.epoch = int(record["step"]), int(record["epoch"])
        self._newest = (float(record["time"]), self.step)
        # Not from the start line: the first steps compile the loader and warm up.
        self._timed_from = self._timed_from or self._newest

    def _take_evaluation(self, record: dict[str, Any]) -> None:
        self.evaluation, self.split = dict(record["metrics"]), str(record["split"])
        self.step, self.epoch = int(record["step"]), int(record["epoch"])

    def _take_end(self, record: dict[str, Any]) -> None:
        self.step, self.seconds = int(record["step"]), self._trained.total

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def began_at_its_end(self) -> bool:
        return bool(self.resumed_from) and self.first_step >= self.total_steps

    def start_line(self) -> str:
        """Where the job begins: anew, from a checkpoint, or at its end, when nothing is left to do."""
        workers = f" on {self.workers} worker{'' if self.workers == 1 else 's'}" if self.workers else ""
        if self.began_at_its_end:
            return f"nothing is left to train: {self.resumed_from} is of step {self.step} of {self.total_steps}"
        if self.total_steps == 0:
            return "training.epochs is 0: the networks answer as they start"
        begins = f"resuming from {self.resumed_from}" if self.resumed_from else "training starts"
        return f"{begins} at step {self.step} of {self.total_steps}{workers}"

    @property
    def seconds_left(self) -> float | None:
        """By the mean time of a step since the first training line, evaluations included; None before there are two."""
        if self._timed_from is None or self._newest is None or self._newest[1] <= self._timed_from[1]:
            return None
        (begun, first), (now, last) = self._timed_from, self._newest
        return max(0.0, (now - begun) / (last - first) * (self.total_steps - self.step))

    @property
    def loads(self) -> list[float]:
        """The share of the images each expert was assigned, by global expert id; empty for a single network."""
        found = {int(match[1]): value for name, value in self.train.items() if (match := _LOAD.match(name))}
        return [found[expert] for expert in sorted(found)]

    def epoch_line(self) -> str:
        """The newest epoch in one line, for logs."""
        parts = [f"epoch {self.epoch + 1}/{self.epochs}"]
        if "train/loss" in self.train:
            parts.append(f"loss {self.train['train/loss']:.4f}")
        if "val/top1" in self.evaluation:
            parts.append(f"{self.split} top-1 {percent(self.evaluation['val/top1'])}")
        if "train/images_per_second" in self.train:
            parts.append(f"{self.train['train/images_per_second']:,.0f} images/s")
        if self.loads:
            parts.append(f"expert loads {percent(min(self.loads))} to {percent(max(self.loads))}")
        if self.seconds_left is not None:
            parts.append(f"{clock(self.seconds_left)} left")
        return ", ".join(parts)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

"""Epochs: steps, reports, validation, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from coe_dist.errors import TrainingError
from coe_dist.parallel.router import NonFiniteError
from coe_dist.seeds import derive_seed
from coe_dist.storage.datasets import sidecar_of
from coe_dist.tracking import Recorder, read_metrics
from coe_dist.training.checkpoint import Position, save_name
from coe_dist.training.job import Job
from coe_dist.training.optim import learning_rate_factor
from coe_dist.training.ownership import Owner
from coe_dist.training.pwlu_phases import PwluPhases
from coe_dist.training.reading import Data, grouped
from coe_dist.training.recorded import system_metrics
from coe_dist.training.saving import PendingSave, mark_best
from coe_dist.training.saving import start as start_save
from coe_dist.training.step import MicroBatch, StepSums
from coe_dist.training.stopping import StopRequest
from coe_dist.training.tasks import Task


def _evaluation(record: dict[str, Any]) -> bool:
    return record.get("kind") == "evaluation" and "val/top1" in record.get("metrics", {})


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts `where` before the message of a TrainingError, which names rank and group by itself."""
    try:
        yield
    except NonFiniteError:
        raise
    except TrainingError as error:
        raise TrainingError(f"{where}: {error}") from error


class Loop:
    """Trains a task from `position` to the last epoch, or until somebody wishes it to stop (see stopping.py)."""

    def __init__(self, job: Job, task: Task, data: Data, recorder: Recorder | None) -> None:
        self.job, self.task, self.data, self.recorder = job, task, data, recorder
        config = self.config = job.config
        self.groups = data.groups
        accumulation = config.training.accumulation
        self.steps_per_epoch = -(-data.loader("train").steps_per_epoch // accumulation)
        self.total_steps = self.steps_per_epoch * config.training.epochs
        self.warmup_steps = round(self.steps_per_epoch * config.training.optimizer.warmup_epochs)
        self.pwlu = PwluPhases(task.engines(), task.averages, config.training.pwlu_statistics_epochs)
        validation = sidecar_of(config.data, "validation")
        self.preparation = validation.preparation(config.data.resolution)
        self.stop = StopRequest(Path(job.run_dir))
        self.owner = Owner(Path(job.run_dir)) if self.groups.rank == 0 else None
        self.pending: PendingSave | None = None
        self.stalled = 0.0  # seconds that training has waited for the pending save

    def run(self, position: Position, resumed: dict[str, object] | None = None) -> bool:
        """Returns True when training is complete, False when it was asked to stop and has saved.

        resumed: what the record says of the checkpoint that training goes on from.
        """
        started = time.perf_counter()
        self.task.step.micro_step = position.micro_step
        self._record(
            "start",
            position.step,
            position.epoch,
            {},
            task=self.job.task,
            epochs=self.config.training.epochs,
            steps_per_epoch=self.steps_per_epoch,
            world_size=self.groups.world.size,
            experts=self.task.experts,
            experts_per_sample=self.task.expert_samples,
            images=self.data.loader("train").count,
            **(resumed or {}),
        )
        step, first = position.step, position.step_in_epoch
        if step and not first:
            self._catch_up(step, position.epoch - 1)
        if self.config.training.epochs == 0 and not resumed:
            self._start_save(position)
        for epoch in range(position.epoch, self.config.training.epochs):
            if self.pwlu.begin_epoch(epoch):
                self._record("pwlu", step, epoch, {}, message="piecewise linear units begin to learn")
            step, complete = self._epoch(epoch, step, first)
            if not complete:
                self._preempted(step, epoch)
                return False
            first = 0
            # saved first: an evaluation that fails must not cost the epoch
            if (epoch + 1) % self.config.training.checkpoint_every == 0 or epoch + 1 == self.config.training.epochs:
                self._start_save(Position(step, epoch + 1, 0, self.task.step.micro_step))
            if self._evaluates_after(epoch):
                self._evaluate(step, epoch)
        self._finish_save()
        before = time.perf_counter()
        with naming(f"evaluation after step {step}"):
            self.task.finish(self.data.batches, step)
        now = time.perf_counter()
        self._record(
            "end",
            step,
            max(0, self.config.training.epochs - 1),
            {},
            seconds=now - started,
            evaluate_seconds=now - before,
        )
        return True

    def _evaluates_after(self, epoch: int) -> bool:
        training = self.config.training
        return (epoch + 1) % training.evaluate_every == 0 or epoch + 1 == training.epochs

    def _evaluate(self, step: int, epoch: int) -> None:
        with naming(f"evaluation after step {step}"):
            metrics = self.task.evaluate(self.data.batches)
        self._record("evaluation", step, epoch, metrics, split="validation")
        self._finish_save()
        self._mark(step, metrics["val/top1"])

    def _mark(self, step: int, top1: float) -> None:
        save = Path(self.job.run_dir) / "checkpoints" / save_name(step)
        if self.groups.rank == 0 and save.is_dir():
            mark_best(save, top1, keep=self.config.training.keep_checkpoints)

    def _catch_up(self, step: int, epoch: int) -> None:
        """After a save at an epoch's end: what a run that ended before that save's evaluation, or before it could be
        named the best, left undone. Collective."""
        if not self._evaluates_after(epoch):
            return
        records = read_metrics(self.job.run_dir) if self.groups.rank == 0 else ()  # one rank reads, all learn of it
        found = {record["step"]: record["metrics"] for record in records if _evaluation(record)}
        known = torch.tensor([int(step in found)], device=self.data.device)
        if not int(self.groups.world.all_reduce_sum(known)):
            self._evaluate(step, epoch)
        elif step in found:
            self._mark(step, found[step]["val/top1"])

    def _epoch(self, epoch: int, step: int, first: int) -> tuple[int, bool]:
        """The optimizer steps of an epoch from its step `first` on. Returns the steps done since training began, and
        False when the epoch was cut short by a wish to stop (and is saved)."""
        training, sums, since = self.config.training, StepSums(), time.perf_counter()
        accumulation, every = training.accumulation, training.checkpoint_every_steps
        groups = grouped(self.data.batches("train", epoch, first * accumulation), accumulation)
        factor, before, stopped = 0.0, step, False
        for done, batches in enumerate(groups, first + 1):
            factor = learning_rate_factor(
                step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, schedule=training.optimizer.schedule
            )
            self.task.set_learning_rate(factor)
            stop, written = self._step(batches, sums, step)
            if self.task.averages:
                for engine in self.task.engines():
                    self.task.averages[engine.name].update(engine.network)
            step += 1
            if step % self.config.tracking.every_steps == 0:
                since = self._report(sums, step, epoch, factor, since)
                sums = StepSums()
            if written:
                self._finish_save()
            stopped = stop and done < self.steps_per_epoch  # at its end an epoch is saved and evaluated first
            if stopped or (every is not None and step % every == 0 and done < self.steps_per_epoch):
                self._start_save(Position(step, epoch, done, self.task.step.micro_step))
            if stopped:
                break
        if step > before and step % self.config.tracking.every_steps:
            self._report(sums, step, epoch, factor, since)
        return step, not stopped

    def _step(self, batches: list[MicroBatch], sums: StepSums, step: int) -> tuple[bool, bool]:
        """One optimizer step; `step` are done, messages and records name the one at work, counted from 1.

        A non-finite value ends the run or costs this step, by training.non_finite; every rank agrees. Returns whether
        a rank wishes to stop, and whether all ranks have written their part of the pending save.
        """
        # what networks draw themselves (dropout, drop-path): by seed and step, so that a resumed run draws the same
        torch.manual_seed(derive_seed(self.config.seed, "step", step))
        votes = [int(bool(self.stop)), int(self.pending is not None and self.pending.written)]
        try:
            with naming(f"step {step + 1}"):
                if self.task.step.step(batches, sums, votes):
                    self.pwlu.end_step(done=True)
                    return votes[0] > 0, votes[1] == self.groups.world.size
            problem = f"a gradient is not finite ({', '.join(sums.skipped) or 'of a network on another rank'})"
        except NonFiniteError as error:
            problem = str(error)
        self.pwlu.end_step(done=False)
        problem = f"step {step + 1}: {problem}"
        if self.config.training.non_finite == "stop":
            raise TrainingError(
                f"{problem}; set training.non_finite=skip to go on, or lower training.optimizer.learning_rate"
            )
        sums.skipped.clear()
        self._record("warning", step + 1, None, {}, message=problem)
        return False, False  # agreed upon after the next step

    def _report(self, sums: StepSums, step: int, epoch: int, factor: float, since: float) -> float:
        now = time.perf_counter()
        images = torch.tensor([float(sums.images)], device=self.data.device)
        metrics = self.task.metrics(sums)
        metrics["train/learning_rate"] = factor * self.config.training.optimizer.learning_rate
        metrics["train/images_per_second"] = float(self.groups.world.all_reduce_sum(images)) / max(1e-9, now - since)
        metrics |= system_metrics(self.data.device)
        if self.config.data.progressive is not None:
            metrics["train/resolution"] = self.data.loader("train").side_of(epoch)
        self._record("train", step, epoch, metrics)
        return time.perf_counter()

    def _start_save(self, position: Position) -> None:
        """Collective. Training goes on while a thread writes; `_finish_save` makes the save exist."""
        self._finish_save()
        before = time.perf_counter()
        averages, decay = self.task.averages, self.config.training.ema_decay
        updates = next((average.updates for average in averages.values()), 0)
        self.pending = start_save(
            Path(self.job.run_dir) / "checkpoints",
            self.task.engines(),
            self.groups,
            position,
            averages=averages,
            extra={
                "config": self.config.model_dump(mode="json"),
                "config_digest": self.config.digest(),
                "classes": list(self.task.classes),
                "preparation": self.preparation.record(),  # of the images that validation answers
                "mlflow_run_id": self.job.mlflow_run_id,
                # every stream is derived by name from the seed, the epoch, the step and the sample's id
                "rng": {"seed": self.config.seed},
                "router": self.task.router_state(),
                **({"ema": {"decay": decay, "updates": updates}} if averages else {}),
            },
            keep=self.config.training.keep_checkpoints,
            owner=self.owner,
        )
        self.stalled = time.perf_counter() - before

    def _finish_save(self) -> None:
        """Waits for the pending save, if there is one. Collective."""
        if self.pending is None:
            return
        pending, self.pending, before = self.pending, None, time.perf_counter()
        saved = pending.finish()
        stalled = self.stalled + time.perf_counter() - before
        figures = {"stall_seconds": stalled, "seconds": pending.seconds, "bytes": float(pending.bytes)}
        self._record(
            "checkpoint",
            pending.position.step,
            pending.position.epoch,
            {f"checkpoint/{name}": value for name, value in figures.items()},
            save=saved.name,
        )

    def _preempted(self, step: int, epoch: int) -> None:
        self._finish_save()
        self._record("preempted", step, epoch, {})
        if self.groups.rank == 0:
            self.stop.answer(step)

    def _record(self, kind: str, step: int, epoch: int | None, metrics: dict[str, float], **extra: object) -> None:
        if self.owner is not None:
            self.owner.check()
        if self.recorder is not None:
            self.recorder.record(kind, step=step, epoch=epoch, metrics=metrics, **extra)

"""A study in work: which trainings are left, their turns, and what is finished of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from coe_dist.config import RunConfig
from coe_dist.errors import InputError, TrainingError
from coe_dist.orchestration.revision import git_revision
from coe_dist.orchestration.signals import deferred
from coe_dist.resources import usable_cores
from coe_dist.storage.datasets import sidecar_of
from coe_dist.study import verify as verifying
from coe_dist.study.comparison import summarised
from coe_dist.study.cost import calibration, counted_seconds
from coe_dist.study.frontier import finished_points, frontier
from coe_dist.study.outcome import outcome_of
from coe_dist.study.record import StudyRecord
from coe_dist.study.results import Results, Row
from coe_dist.study.running import run_all
from coe_dist.study.schema import StudyConfig, find_study, load_study
from coe_dist.study.slot import Trained
from coe_dist.study.trainings import Training, study_config, trainings_of
from coe_dist.tracking import Status, run_id_of
from coe_dist.training.checks import check_run
from coe_dist.training.job import Job
from coe_dist.training.run_folder import prepare_folder

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one call may do: so many trainings, and none that would end after so many minutes (the first
    ones always)."""

    runs: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.runs is not None and self.runs < 0:
            raise InputError(f"--max-runs: {self.runs} is not allowed; give a whole number from 0 (only the tables)")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"--max-minutes: {self.minutes} is not allowed; give a number above 0")


class Study:
    """A study and what is finished of it. `chosen`: the trainings this call is about; `every`: those of its tables."""

    def __init__(self, name: str, *, only: str | None, seeds: Sequence[int] | None, say: Say) -> None:
        self.settings: StudyConfig = load_study(find_study(name))
        self.base: RunConfig = study_config(self.settings)
        self.chosen = trainings_of(self.settings, only=only, seeds=seeds)
        others = [] if only is None and seeds is None else trainings_of(self.settings)
        self.every = list({(t.label, t.seed): t for t in (*others, *self.chosen)}.values())
        self.results = Results(Path(self.settings.results), self.settings.name)
        self.revision = (git_revision() or "unknown")[:12]
        self.slots = self.settings.parallel or usable_cores()
        self.say = say
        self.failures: list[str] = []
        self.begun: list[Training] = []  # and not ended

    @property
    def left(self) -> list[Training]:
        """Of the chosen, each equal one once, and tested where one of them is; before them what they start from, where
        its weights are not here."""
        needed: dict[str, Training] = {}
        unfinished = [t for t in self.chosen if self.results.row_of(t.digest, test=t.test) is None]
        for wanted in unfinished:
            for training in [*missing_starts([wanted]), wanted]:
                known = needed.get(training.digest)
                if known is None or (training.test and not known.test):
                    needed[training.digest] = training
        return list(needed.values())

    def finished(self, trainings: Sequence[Training]) -> int:
        return sum(self.results.row_of(t.digest, test=t.test) is not None for t in trainings)

    def seconds(self) -> Callable[[Training], float]:
        """How long a training takes here. Reads the data's side-car; raises InputError for a network's options."""
        train = sidecar_of(self.base.data, "train")
        counted: dict[str, float] = {}
        for training in self.every:
            if training.label not in counted:
                counted[training.label] = counted_seconds(training, train)
        rows = ((t, self.results.row_of(t.digest, test=t.test)) for t in self.every)
        factor = calibration((counted[t.label], row.seconds) for t, row in rows if row is not None)
        return lambda training: factor * counted[training.label]

    def train(self, limits: Limits) -> None:
        """Trains what is left within the limits. Raises Preempted after a SIGTERM; failures are kept."""
        left = self.left
        if limits.runs is not None:
            left = left[: limits.runs]
        if not left:
            return
        seconds_of = self.seconds()
        check_run(left[0].started_config())  # the first needs nothing that is not here
        status: Status = "FAILED"
        record = StudyRecord(self.base, self.settings.name, self.revision)
        try:
            begun = run_all(
                left,
                slots=min(self.slots, len(left)),
                logs=prepare_logs(self.base),
                begin=lambda training: self._begin(training, record),
                finish=lambda training, trained: self._finish(training, trained, record),
                seconds_of=seconds_of,
                max_seconds=None if limits.minutes is None else 60 * limits.minutes,
            )
            status = "FAILED" if self.failures else "FINISHED"
            if begun < len(left):
                self.say(f"{len(left) - begun} trainings would not have ended in time; the same command goes on")
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
            raise
        finally:
            for training in self.begun:
                record.cut(training)
            record.close([self.results.rows_path, self.results.curves_path], status)

    def _begin(self, training: Training, record: StudyRecord) -> Job:
        config, run_dir = training.started_config(), training.config.run_dir
        # of a training that was cut short; its metrics were never sent
        reopened = None if training.ended else run_id_of(run_dir)
        with deferred():
            prepare_folder(config, overwrite=True)
            job = training.job(record.begin(training, reopened))
            self.begun.append(training)
        return job

    def _finish(self, training: Training, trained: Trained, record: StudyRecord) -> None:
        row = None
        with deferred():
            begun = training in self.begun
            if begun:
                self.begun.remove(training)
            if trained.problem is None:
                row = self._add(training, trained)
            else:
                self.failures.append(f"{training.label} seed {training.seed}: {trained.problem}")
                self.say(f"failed: {self.failures[-1]}")
            if begun:
                record.finish(training, row)

    def _add(self, training: Training, trained: Trained) -> Row:
        row, curve = self.outcome(training, trained)
        self.results.add(row, curve)
        top1 = f"val {100 * row.val_top1:.2f}" + ("" if row.test_top1 is None else f", test {100 * row.test_top1:.2f}")
        self.say(
            f"[{self.finished(self.chosen)}/{len(self.chosen)}] {row.label} seed {row.seed}: {top1} at "
            f"{row.macs:,.0f} MACs, {row.seconds:.0f} s"
        )
        return row

    def outcome(self, training: Training, trained: Trained) -> tuple[Row, list[Any]]:
        return outcome_of(
            training,
            training.config.run_dir,
            study=self.settings.name,
            seconds=trained.seconds,
            cpu_seconds=trained.cpu_seconds,
            revision=self.revision,
        )

    def drawn(self) -> tuple[list[Training], list[Training]]:
        """For verify: one random finished training of each chosen curve (second), and what these start or learn from
        and whose weights are not here (first). Raises InputError where none is finished."""
        found = verifying.drawn(self.chosen, self.results, generator=random.SystemRandom())
        if not found:
            raise InputError(f"--verify: nothing is finished in {self.results.rows_path}; run the study first")
        return missing_starts(found), [verifying.repeated(training) for training in found]

    def verify(self, starts: Sequence[Training], again: Sequence[Training]) -> list[dict[str, Any]]:
        """Trains what was drawn, and compares. Raises TrainingError for the first that fails."""
        points, answers, ended = finished_points(self.every, self.results), [], 0
        trainings = [*starts, *again]

        def begin(training: Training) -> Job:
            prepare_folder(training.started_config(), overwrite=True)
            return training.job()

        def finish(training: Training, trained: Trained) -> None:
            nonlocal ended
            label = f"{training.label} seed {training.seed}"
            if trained.problem is not None:
                raise TrainingError(f"{label}: {trained.problem}")
            ended += 1
            told = f"{label}: others start or learn from it"
            if training not in starts:
                before = self.results.row_of(training.digest, test=training.test)
                assert before is not None
                allowed = verifying.allowed_difference(training.curve, points)
                answer = verifying.compared(before, self.outcome(training, trained)[0], allowed)
                answers.append({**answer, "curve": training.curve, "point": training.point})
                told = verifying.sentence(answers[-1])
            self.say(f"[{ended}/{len(trainings)}] {told}")

        run_all(
            trainings,
            slots=min(self.slots, len(trainings)),
            logs=prepare_logs(self.base),
            begin=begin,
            finish=finish,
            seconds_of=lambda training: 0.0,
        )
        return answers

    def summary(self) -> dict[str, Any]:
        points = finished_points(self.every, self.results)
        found = None if self.settings.frontier is None else frontier(self.settings, self.every, self.results)
        return {
            "study": self.settings.name,
            "trainings": len(self.every),
            "finished": self.finished(self.every),
            "failed": self.failures,
            "baseline": self.settings.baseline,
            "points": summarised(points, self.settings.baseline),
            "frontier": found,
        }


def missing_starts(trainings: Iterable[Training]) -> list[Training]:
    """What these start or learn from and whose weights are not here, each after its own teacher."""
    missing: dict[str, Training] = {}
    for training in trainings:
        for _, start in training.starts:
            if start.digest not in missing and start.weights is None:
                missing |= {one.digest: one for one in [*missing_starts([start]), start]}
    return list(missing.values())


def prepare_logs(base: RunConfig) -> Path:
    base.run_dir.mkdir(parents=True, exist_ok=True)
    return base.run_dir

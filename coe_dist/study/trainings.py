"""The grid of a study: one training for each point and seed."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from coe_dist.config import NetworkConfig, RunConfig, load_config
from coe_dist.errors import InputError, TrainingError
from coe_dist.study.schema import StudyConfig
from coe_dist.tracking import read_metrics, tracking_uri
from coe_dist.training.checkpoint import WEIGHTS, complete_saves
from coe_dist.training.job import Job

# what does not change the trained networks
_IDLE = {"name", "runs_dir", "tracking", "workers", "storage"}
_IDLE_TRAINING = {
    *("evaluate_every", "checkpoint_every", "checkpoint_every_steps", "keep_checkpoints", "timeout_seconds"),
}
_IDLE_SINGLE = {"delegator", "router", "early_exit"}  # for a network by itself; of `experts` only the network counts


@dataclass(frozen=True)
class Training:
    """One training of a study. `config.name` names its run folder.

    `digest`: 16 hex digits of all that its outcome depends on, the seed included, so that an equal training of another
    point is the same one. Settings at their defaults are left out, so that finished results stay valid when a setting
    is added; whoever changes a default retrains.
    """

    curve: str
    point: str
    kind: Literal["collaboration", "single"]
    test: bool
    overrides: tuple[str, ...]  # of the curve and the point
    config: RunConfig
    starts: tuple[tuple[str, Training], ...] = ()  # section and the single network that it starts or learns from

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def label(self) -> str:
        return f"{self.curve}/{self.point}"

    @property
    def network(self) -> NetworkConfig | None:
        """The single network to train; None for a collaboration."""
        experts = self.config.experts
        return NetworkConfig(network=experts.network, options=experts.options) if self.kind == "single" else None

    @property
    def digest(self) -> str:
        content = self.config.model_dump(
            mode="json", exclude=_IDLE | (_IDLE_SINGLE if self.network else set()), exclude_defaults=True
        )
        for key in _IDLE_TRAINING:
            content.get("training", {}).pop(key, None)
        content.get("data", {}).pop("staging", None)
        if self.network:
            content["experts"] = self.network.model_dump(mode="json")
        if "teacher" in dict(self.starts):  # known by its digest, not by where its file lies
            for key in ("teacher", "options", "weights"):
                content["distillation"].pop(key, None)
        if self.starts:
            content["starts"] = {section: training.digest for section, training in self.starts}
        text = json.dumps({"kind": self.kind, **content}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def samples(self) -> int:
        """Times a training image is shown to an expert (or to the single network), over all epochs; a mean, rounded,
        where experts learn from a part of each batch."""
        return round(self.config.training.epochs * (1 if self.network else self.config.expert_samples))

    @property
    def ended(self) -> bool:
        """Whether its run folder holds a training to the end."""
        return any(record["kind"] == "end" for record in read_metrics(self.config.run_dir))

    @property
    def weights(self) -> Path | None:
        """Of a single network that is trained, with these very settings, and still in its run folder."""
        run_dir = self.config.run_dir
        saves = complete_saves(run_dir / "checkpoints")
        if (
            not saves
            or not self.ended
            or replace(self, config=load_config(run_dir / "config.yaml")).digest != self.digest
        ):
            return None
        return saves[0] / f"single.{WEIGHTS}"

    @property
    def ready(self) -> bool:
        """Whether all that it starts or learns from is there."""
        return all(training.weights is not None for _, training in self.starts)

    def started_config(self) -> RunConfig:
        """Its configuration with the weights it starts or learns from. Raises TrainingError when they are not there."""
        config = self.config
        for role, training in self.starts:
            weights = training.weights
            if weights is None:
                raise TrainingError(
                    f"{self.label} starts or learns from {training.label} seed {training.seed}, which failed"
                )
            section, key = ("distillation", "weights") if role == "teacher" else (role, "initial_weights")
            changed = getattr(config, section).model_copy(update={key: str(weights)})
            config = config.model_copy(update={section: changed})
        return config

    def job(self, mlflow_run_id: str | None = None) -> Job:
        return Job(
            task="baseline" if self.network else "train",
            config=self.started_config(),
            run_dir=str(self.config.run_dir.absolute()),
            mlflow_run_id=mlflow_run_id,
            network=self.network,
            test=self.test,
        )


def study_config(study: StudyConfig) -> RunConfig:
    """The base configuration with the study's own overrides. It lends the study's MLflow run its place and name."""
    config = load_config(study.base, study.overrides)
    tracking = config.tracking.model_copy(update={"experiment": study.name})
    return config.model_copy(update={"name": f"study-{study.name}", "tracking": tracking})


def trainings_of(study: StudyConfig, *, only: str | None = None, seeds: Sequence[int] | None = None) -> list[Training]:
    """All trainings, seed by seed (so that an unfinished study has whole curves), in the file's order.

    only: a shell pattern for CURVE/POINT or CURVE. seeds: in place of the study's. Raises InputError naming the point
    whose overrides are refused, and when nothing matches.
    """
    place = tracking_uri(study_config(study))
    known: dict[tuple[str, str], RunConfig] = {}
    found: list[tuple[int, Training]] = []
    for name, curve in study.curves.items():
        for point in curve.points:
            if only is not None and not any(fnmatch.fnmatchcase(text, only) for text in (name, f"{name}/{point}")):
                continue
            for position, seed in enumerate(seeds or curve.seeds or study.seeds):
                found.append((position, _training(study, name, point, seed, place, known)))
    if not found:
        points = [f"{name}/{point}" for name, curve in study.curves.items() for point in curve.points]
        raise InputError(f"--only: {only!r} is not allowed; it matches none of {', '.join(points)}")
    return [training for _, training in sorted(found, key=lambda pair: pair[0])]


def _training(
    study: StudyConfig, name: str, point: str, seed: int, place: str, known: dict[tuple[str, str], RunConfig]
) -> Training:
    """known: the configurations of points that were read before."""
    curve = study.curves[name]
    overrides = (*curve.overrides, *curve.points[point])
    if (name, point) not in known:
        try:
            known[name, point] = load_config(study.base, [*study.overrides, *overrides])
        except InputError as error:
            raise InputError(f"curves.{name}.points.{point}: {error}") from None
    config = known[name, point].model_copy(update={"seed": seed})
    settled = _settled(study, config, place, f"{name}.{point}")
    starts = []
    for section, label in curve.start.items():
        if section == "teacher" and config.distillation is None:
            raise InputError(
                f"curves.{name}.points.{point}: distillation: None is not allowed; start.teacher needs the section, "
                "for instance distillation={teacher: small_cnn, weights: start}"
            )
        start, _, start_point = label.partition("/")
        starts.append((section, _training(study, start, start_point, seed, place, known)))
        if section == "teacher":
            settled = _taught(settled, starts[-1][1])
    return Training(name, point, curve.kind, curve.test, overrides, settled, tuple(starts))


def _taught(config: RunConfig, teacher: Training) -> RunConfig:
    """With the teacher's network, whose weights are known when it is trained."""
    assert config.distillation is not None
    assert teacher.network is not None
    network = {"teacher": teacher.network.network, "options": teacher.network.options}
    return config.model_copy(update={"distillation": config.distillation.model_copy(update=network)})


def _settled(study: StudyConfig, config: RunConfig, place: str, label: str) -> RunConfig:
    """As one plain process trains it: nothing is evaluated or saved before the end, and MLflow gets it afterwards."""
    never = max(1, config.training.epochs)
    return config.model_copy(
        update={
            "name": f"{study.name}.{label}.seed{config.seed}",
            "workers": config.workers.model_copy(update={"count": 1, "min": None, "max": None, "max_failures": 0}),
            "training": config.training.model_copy(
                update={"evaluate_every": never, "checkpoint_every": never, "checkpoint_every_steps": None}
            ),
            "tracking": config.tracking.model_copy(update={"experiment": study.name, "uri": place}),
        }
    )

"""Reads a run folder for the report. Missing files are None; unreadable ones are None too and named in `problems`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from coe_dist.errors import InputError
from coe_dist.tracking import TrainedSeconds, read_metrics
from coe_dist.tracking.per_image import PerImage, images_file


def _number_or_none(value: Any) -> Any:
    """JSON has no NaN, so writers use null, NaN or a string for `no images to average over`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value if isinstance(value, str) and value else None
    return number if math.isfinite(number) else None


Number = Annotated[float | None, BeforeValidator(_number_or_none)]


class Top1(BaseModel):
    """Fractions from 0 to 1."""

    coe: float
    delegator: float
    oracle: float
    experts: list[Number]


class CurvePoint(BaseModel):
    threshold: Number = None
    exit_rate: float
    average_macs: float
    top1: float


class Macs(BaseModel):
    delegator: float
    experts: list[float]


class Evaluation(BaseModel):
    """evaluation-<split>.json; fractions from 0 to 1, MACs of one image."""

    split: str
    images: int
    top1: Top1
    exit_rate: float
    average_macs: float
    load: list[float]
    threshold: Number = None
    curve: list[CurvePoint] = Field(default_factory=list)
    macs: Macs
    expert_accuracy: list[Number] = Field(default_factory=list)
    ece: dict[str, Number] = Field(default_factory=dict)

    @property
    def exits(self) -> bool:
        """Whether any image may exit early (a probability is at most 1)."""
        return self.threshold is not None and self.threshold <= 1

    @property
    def points(self) -> list[CurvePoint]:
        """The curve by rising average MACs, with the evaluation's own point in it."""
        own = CurvePoint(
            threshold=self.threshold if self.exits else None,
            exit_rate=self.exit_rate,
            average_macs=self.average_macs,
            top1=self.top1.coe,
        )
        others = [p for p in self.curve if p.threshold != self.threshold and (self.exits or p.exit_rate > 0)]
        return sorted([*others, own], key=lambda p: (p.average_macs, -1 if p is own else p.threshold or 0))


class Details(BaseModel):
    """details-<split>.json; `selected` and `correct` are [C][E] image counts."""

    classes: list[str]
    selected: list[list[int]]
    correct: list[list[int]]
    images_per_class: list[int]


class System(BaseModel):
    split: str = "test"
    top1: float
    macs: Number = None
    average_macs: Number = None


class Summary(BaseModel):
    """summary.json of a comparison; `coe` beside single networks."""

    coe: System
    single: System | None = None
    single_same_macs: System | None = None
    seconds: dict[str, Number] = Field(default_factory=dict)
    expert_samples_per_image: dict[str, Number] = Field(default_factory=dict)
    seed: int | None = None

    def singles(self, split: str) -> list[tuple[str, str, System]]:
        """Key, name and figures of the single networks that were evaluated on this split."""
        found = [
            ("single", "one expert network alone", self.single),
            ("single_same_macs", "one network of about the CoE's MACs after training", self.single_same_macs),
        ]
        return [(key, name, system) for key, name, system in found if system is not None and system.split == split]


class Network(BaseModel):
    """network.json of a run that trains one network alone."""

    network: str = "?"
    options: dict[str, Any] = Field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return f"{self.network} ({options})" if options else self.network


@dataclass(frozen=True)
class Run:
    """A run folder. `series` maps a metric's name to {step: value}; the last value of a step counts (resumed runs)."""

    folder: Path
    name: str
    start: dict[str, Any]
    end: dict[str, Any]
    series: dict[str, dict[int, float]]
    evaluation: Evaluation | None
    details: Details | None
    summary: Summary | None
    config: str
    single: System | None = None  # the figures of a run that trained one network alone
    rows: PerImage | None = None  # of the split that `evaluation` is about
    validation: PerImage | None = None
    network: Network | None = None  # the one that was trained alone
    kept: Evaluation | None = None  # on validation; its threshold is the one in use
    seconds: float | None = None  # of all its starts, once it has ended
    problems: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> bool:
        return self.single is not None or self.network is not None or self.start.get("task") == "baseline"

    def last(self, name: str) -> float | None:
        """The newest finite value of a metric."""
        values = [value for _, value in sorted(self.series.get(name, {}).items()) if math.isfinite(value)]
        return values[-1] if values else None


Model = TypeVar("Model", bound=BaseModel)


def read_run(folder: str | Path, splits: Sequence[str] = ("test", "validation")) -> Run:
    """`evaluation` is that of the first of `splits` that has one; see in_use.py for the threshold that it is of.

    Raises InputError where the folder does not exist or holds nothing of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder")
    problems: list[str] = []
    single = _single(folder)
    read = () if single else splits
    evaluations = {name: _read(folder, f"evaluation-{name}.json", Evaluation, problems) for name in read}
    evaluation = next((found for found in evaluations.values() if found), None)
    split = evaluation.split if evaluation else "test"
    details = _read(folder, f"details-{split}.json", Details, problems)
    if details and not _consistent(details):
        problems.append(f"details-{split}.json is left out: its tables differ in size")
        details = None
    rows = {name: _per_image(folder, name, details, evaluation, problems) for name in (split, "validation")}
    start: dict[str, Any] = {}
    end: dict[str, Any] = {}
    series: dict[str, dict[int, float]] = {}
    trained = TrainedSeconds()
    for record in read_metrics(folder):
        trained.read(record)
        if record["kind"] == "start":
            start, end = record, {}
        elif record["kind"] == "end":
            end = record
        step, metrics = record.get("step"), record.get("metrics")
        if isinstance(step, int) and isinstance(metrics, dict):
            for name, value in metrics.items():
                series.setdefault(name, {})[step] = value
    summary = _read(folder, "summary.json", Summary, problems)
    if not (series or start or evaluation or single or summary or problems):
        raise InputError(f"{folder}: not a run folder; it holds neither metrics.jsonl nor an evaluation-*.json")
    network = _read(folder, "network.json", Network, problems)
    config = folder / "config.yaml"
    text = config.read_text(errors="replace") if config.is_file() else ""
    name = folder.resolve().name
    return Run(
        folder, name, start, end, series, evaluation, details, summary, text,
        single=single, rows=rows[split], validation=rows["validation"],
        network=network, kept=evaluations.get("validation"), problems=problems,
        seconds=trained.total if end else None,
    )  # fmt: skip


def _single(folder: Path) -> System | None:
    """The figures of a single network's run, whose top1 is one number."""
    for split in ("test", "validation"):
        try:
            return System.model_validate(json.loads((folder / f"evaluation-{split}.json").read_bytes()))
        except (OSError, ValueError):  # also pydantic's
            continue
    return None


def _per_image(
    folder: Path, split: str, details: Details | None, evaluation: Evaluation | None, problems: list[str]
) -> PerImage | None:
    path = folder / images_file(split)
    if not path.is_file() or evaluation is None:
        return None
    try:
        rows = PerImage.read(path)
        if rows.right_NE.shape[1] != len(evaluation.load):
            raise ValueError("it has another number of experts than the evaluation")
        if split == evaluation.split and len(rows) != evaluation.images:
            raise ValueError("it has another number of images than the evaluation")
        classes = [column.max() for column in (rows.labels_N, rows.final_class_N, rows.delegator_class_N) if len(rows)]
        if details is not None and max(classes, default=0) >= len(details.classes):
            raise ValueError("it names classes that the data set does not have")
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} is left out: {error}")
        return None
    return rows


def _read(folder: Path, name: str, model: type[Model], problems: list[str]) -> Model | None:
    path = folder / name
    if not path.is_file():
        return None
    try:
        return model.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        problems.append(f"{name} is left out: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}")
    except (OSError, ValueError) as error:
        problems.append(f"{name} is left out: {error}")
    return None


def _consistent(details: Details) -> bool:
    classes = len(details.classes)
    tables = (details.selected, details.correct)
    experts = {len(row) for table in tables for row in table}
    return len(experts) <= 1 and all(len(t) == classes for t in (*tables, details.images_per_class))

"""A study's YAML file: curves of points, each point a list of dotted overrides on a base configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from coe_dist.config import Section, parse, read_yaml
from coe_dist.errors import InputError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,29}$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[list[Seed], Field(min_length=1)]
STUDIES = Path("configs/studies")


class CurveConfig(Section):
    """Trainings of one kind. `single` trains the network of `experts` alone; its delegator and router play no part.

    start: CURVE/POINT of the single network, trained with the same seed, whose weights the delegator or all experts of
    these trainings start from (training/initial_weights.py), or, as `teacher`, that they learn from: its network and
    weights take the place of those in `distillation`, which must be there. Only the teacher is for single networks too,
    and no curve may learn from itself, directly or through others.
    """

    kind: Literal["collaboration", "single"]
    overrides: list[str] = Field(default_factory=list)  # of every point of the curve, after the study's own
    points: Annotated[dict[Name, list[str]], Field(min_length=1)]
    seeds: Seeds | None = None  # none: the study's
    test: bool = True  # false: a search for settings, which sees validation only
    start: dict[Literal["delegator", "experts", "teacher"], str] = Field(default_factory=dict)


class FrontierConfig(Section):
    """Which curves are compared for the saving in MACs at equal accuracy. single: of networks of equal MACs in them,
    such as one network by two recipes, the best on validation counts. baselines: collaborations that are shown beside
    the others and never reported as the saving, such as two networks trained apart."""

    single: Annotated[list[Name], Field(min_length=1)]
    collaborations: Annotated[list[Name], Field(min_length=1)]
    baselines: list[Name] = Field(default_factory=list)
    draws: Annotated[int, Field(ge=100, le=1_000_000)] = 10_000  # of the bootstrap over seeds


class StudyConfig(Section):
    name: Name
    base: str  # the configuration that the overrides change; relative to this file
    overrides: list[str] = Field(default_factory=list)
    seeds: Seeds = Field(default_factory=lambda: [0, 1, 2])
    curves: Annotated[dict[Name, CurveConfig], Field(min_length=1)]
    parallel: Annotated[int, Field(ge=1, le=1024)] | None = None  # trainings at a time; none: one per usable core
    results: str = "docs/results"  # folder of the tables, which are meant to be committed
    frontier: FrontierConfig | None = None
    baseline: str | None = None  # CURVE/POINT that every other point is compared with, seed by seed


def find_study(name: str) -> Path:
    """The file of a study given by name (in configs/studies) or by path. Raises InputError naming the studies."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise InputError(f"{path}: no such study file")
    if (named := STUDIES / f"{name}.yaml").is_file():
        return named
    known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml"))) or f"none; there is no {STUDIES} here"
    raise InputError(f"study: {name!r} is not allowed; give a YAML file or one of {known}")


def load_study(path: Path) -> StudyConfig:
    """Reads and checks a study. Raises InputError (one line) naming the field; `base` becomes a usable path."""
    study = parse(StudyConfig, read_yaml(path))
    if study.frontier is not None:
        for field, kind, curves in (
            ("single", "single", study.frontier.single),
            ("collaborations", "collaboration", study.frontier.collaborations),
            ("baselines", "collaboration", study.frontier.baselines),
        ):
            allowed = [name for name, curve in study.curves.items() if curve.kind == kind and curve.test]
            for curve in curves:
                if curve not in allowed:
                    raise InputError(
                        f"frontier.{field}: {curve!r} is not allowed; give a curve of kind {kind} that is tested "
                        f"({', '.join(allowed) or 'there is none'})"
                    )
    points = {f"{name}/{point}": curve for name, curve in study.curves.items() for point in curve.points}
    if study.baseline is not None and study.baseline not in points:
        raise InputError(f"baseline: {study.baseline!r} is not allowed; give one of {', '.join(points)}")
    _check_starts(study, [label for label, curve in points.items() if curve.kind == "single"])
    for field, seeds in {
        "seeds": study.seeds,
        **{f"curves.{n}.seeds": c.seeds for n, c in study.curves.items()},
    }.items():
        if seeds is not None and len(set(seeds)) < len(seeds):
            raise InputError(f"{field}: {seeds} is not allowed; give each seed once")
    return study.model_copy(update={"base": str(path.parent / study.base)})


def _check_starts(study: StudyConfig, singles: list[str]) -> None:
    for name, curve in study.curves.items():
        for section, label in curve.start.items():
            if curve.kind == "single" and section != "teacher":
                raise InputError(
                    f"curves.{name}.start.{section}: {label!r} is not allowed; only collaborations start from others"
                )
            if label not in singles:
                raise InputError(
                    f"curves.{name}.start.{section}: {label!r} is not allowed; give a point of a curve of kind single "
                    f"({', '.join(singles) or 'there is none'})"
                )
            if name in _teachers(study, label):
                raise InputError(
                    f"curves.{name}.start.{section}: {label!r} is not allowed; it is a point of this curve or learns "
                    "from one"
                )


def _teachers(study: StudyConfig, label: str) -> list[str]:
    """The curve of a single network, that of its teacher, and so on; ends where one is met again."""
    met: list[str] = []
    following: str | None = label
    while following is not None and (curve := following.split("/")[0]) not in met:
        met.append(curve)
        following = study.curves[curve].start.get("teacher") if curve in study.curves else None
    return met

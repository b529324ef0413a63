"""Topology parity: the same training on any number of ranks as in the single-process reference (tests/reference.py)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import reference
import torch
from parallel.covering import Axes, covering, grid
from parallel.covering import Case as Values
from ranks import run_ranks
from reference import Case

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10}
AXES: Axes = {
    "world_size": [1, 2, 3, 4],
    "experts": [2, 3, 4, 6],
    "k": ["two", "all"],
    "accumulation": [1, 2],
    "clip_norm": [None, 0.5],
    "engine": [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)],
    "batchnorm": ["local", "group"],
}
# these vary with the cases of the covering set only
EXTRA: Axes = {
    "labels": ["balanced", "best", "soft"],
    "where": ["replicated", "rank0", "process"],
    "share": [1.0, 0.6],
}


def allowed(values: Values) -> bool:
    return not (values["experts"] == 2 and values["k"] == "all")  # the same as two of two


def case_of(values: Values) -> Case:
    values = dict(values)
    engine, zero_stage = values.pop("engine")
    per_sample = 2 if values.pop("k") == "two" else values["experts"]
    return Case(per_sample=per_sample, engine=engine, zero_stage=zero_stage, **values)


def free_cases(world_size: int) -> list[Case]:
    """float64, so that rounding cannot flip a choice: routing and labels run free."""
    return [
        Case(world_size, experts, k, precision="fp64", batchnorm="group", replay=False)
        for experts, k in ((3, 2), (4, 4), (6, 2))
    ] + [
        Case(world_size, 3, 2, precision="fp64", batchnorm="group", replay=False, **more)
        for more in (
            {"distilled": 0.6, "accumulation": 2},
            {"share": 0.6, "distilled": 0.5},
            {"share": 0.3, "distilled": 0.4, "taught_delegator": False, "where": "process"},
            {"share": 0.6, "samples": 8},  # in the end two images, and ranks without any
        )
    ]


def check(cases: list[Case], folder: Path, timeout: float = 500) -> None:
    """All cases of one world size in one process group; every network of every rank is compared."""
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    for index, case in enumerate(cases):
        torch.save(reference.train(case), folder / f"{index}.pt")
    world_size = cases[0].world_size
    run_ranks(world_size, "parallel.parity_cases:run", folder, timeout)
    failures = []
    for rank in range(world_size):
        errors = json.loads((folder / f"errors-{rank}.json").read_text())
        assert len(errors) == len(cases)
        failures += [
            f"rank {rank}, {where}: {error:.2e} in {case.name}"
            for case, (error, where) in zip(cases, errors, strict=True)
            if not error <= TOLERANCE[case.precision]
        ]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("world_size", AXES["world_size"])
def test_training_does_not_depend_on_the_number_of_ranks(world_size: int, tmp_path: Path) -> None:
    """Every value of every axis and all pairs of values (over the four world sizes together)."""
    cases = [case_of(values) for values in covering(AXES | EXTRA, allowed) if values["world_size"] == world_size]
    check(cases + free_cases(world_size), tmp_path)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world_size", AXES["world_size"])
def test_the_whole_grid(world_size: int, tmp_path: Path) -> None:
    check([case_of(values) for values in grid(AXES | {"world_size": [world_size]}, allowed)], tmp_path, timeout=3000)

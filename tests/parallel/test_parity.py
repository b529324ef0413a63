"""Topology parity: the same training on any number of ranks as in the single-process reference (tests/reference.py)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import reference
import torch
from ranks import run_ranks
from reference import Case

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10}


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


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_does_not_depend_on_the_number_of_ranks(world_size: int, tmp_path: Path) -> None:
    cases = [
        Case(world_size, 4, 2),
        Case(world_size, 4, 4, engine="deepspeed", accumulation=2),
        Case(world_size, 4, 2, engine="deepspeed", zero_stage=1, clip_norm=0.5, batchnorm="group"),
        Case(world_size, 4, 2, precision="fp64", batchnorm="group", replay=False),
    ]
    check(cases, tmp_path)

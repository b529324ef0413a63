"""What the loop trains: a collaboration (collaboration_task.py) or a single network (single_task.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from coe_dist.parallel.groups import Groups
from coe_dist.training.ema import WeightAverage
from coe_dist.training.engines import NetworkEngine
from coe_dist.training.single import SingleStep
from coe_dist.training.step import CollaborationStep, MicroBatch, StepSums

Batches = Callable[[str], Iterable[MicroBatch]]  # split -> this rank's batches of it


class Task(Protocol):
    @property
    def step(self) -> CollaborationStep | SingleStep: ...

    experts: int
    expert_samples: float  # experts that see a training image, on average
    classes: tuple[str, ...]

    averages: dict[str, WeightAverage]  # by name of the network; empty without training.ema_decay

    def engines(self) -> list[NetworkEngine]: ...
    def router_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the router, JSON-serialisable. Equal on every rank, or rank 0's is kept."""

    def load_router_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None:
        """Ends what the task started (a router process)."""

    def set_learning_rate(self, factor: float) -> None: ...
    def metrics(self, sums: StepSums) -> dict[str, float]:
        """Means over all ranks since the last report. Collective."""

    def evaluate(self, batches: Batches) -> dict[str, float]:
        """Figures on the validation split. Collective."""

    def finish(self, batches: Batches, step: int) -> None:
        """Calibrates on validation, reports on test (if the job has it), writes the result files. step: of the
        networks. Collective."""


def reduced(sums: StepSums, names: tuple[str, ...], groups: Groups, device: torch.device) -> dict[str, float]:
    """Totals over all ranks of images, dispatched, bytes_sent and the named values. Collective, one all-reduce."""
    values = [torch.as_tensor(sums.values.get(name, 0.0), device=device).double() for name in names]
    counts = [
        torch.tensor(float(count), dtype=torch.float64, device=device)
        for count in (sums.images, sums.dispatched, sums.bytes_sent)
    ]
    total = groups.world.all_reduce_sum(torch.stack([*counts, *values])).tolist()
    return dict(zip(("images", "dispatched", "bytes_sent", *names), total, strict=True))

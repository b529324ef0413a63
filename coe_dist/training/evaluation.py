"""Distributed evaluation: every image counted exactly once, on any data set size and world size.

Each rank runs the delegator on its share, every image travels to every expert (dense dispatch), the class logits travel
back, and one small record per image is gathered. All figures are then sums over images, never means of means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from coe_dist.coe import early_exit
from coe_dist.coe.calibration import ece
from coe_dist.errors import InputError, TrainingError
from coe_dist.parallel.exchange import combine, dispatch, plan_exchange
from coe_dist.parallel.groups import Groups
from coe_dist.tracking.per_image import PerImage
from coe_dist.training.ema import WeightAverage, average_both
from coe_dist.training.engines import NetworkEngine, autocast, wide
from coe_dist.training.step import MicroBatch


@dataclass(frozen=True)
class Records:
    """One row per image of the split, in id order, on the CPU and equal on every rank."""

    ids_N: torch.Tensor  # int64
    labels_N: torch.Tensor  # int64
    confidence_N: torch.Tensor  # largest softmax probability of the delegator
    delegator_N: torch.Tensor  # bool: the delegator is right
    selected_N: torch.Tensor  # int64: argmax of the selection logits
    experts_NE: torch.Tensor  # bool: expert j is right
    final_N: torch.Tensor  # bool: the answer is right when the image does not exit early
    final_confidence_N: torch.Tensor  # the largest probability of that answer
    delegator_class_N: torch.Tensor  # int64: the class that the delegator answers
    final_class_N: torch.Tensor  # int64: the class answered when the image does not exit early
    selection_confidence_N: torch.Tensor  # softmax probability of the selected expert among the selection logits

    def per_image(self) -> PerImage:
        """What images-<split>.npz keeps of them."""
        return PerImage(
            ids_N=self.ids_N.numpy(),
            labels_N=self.labels_N.int().numpy(),
            delegator_class_N=self.delegator_class_N.int().numpy(),
            confidence_N=self.confidence_N.double().numpy(),
            selected_N=self.selected_N.int().numpy(),
            selection_confidence_N=self.selection_confidence_N.float().numpy(),
            final_class_N=self.final_class_N.int().numpy(),
            final_confidence_N=self.final_confidence_N.float().numpy(),
            right_NE=self.experts_NE.numpy(),
        )


class Evaluator:
    """Runs the networks of all ranks over a split; in their place, where given, the averages of their weights (by name
    of the network, on every rank that holds it)."""

    def __init__(
        self,
        delegator: NetworkEngine,
        experts: dict[int, NetworkEngine],
        groups: Groups,
        *,
        classes: int,
        precision: str,
        final: Literal["expert", "average"],
        averages: Mapping[str, WeightAverage] | None = None,
    ) -> None:
        self.delegator, self.experts, self.groups = delegator, experts, groups
        self.classes, self.precision, self.final = classes, precision, final
        self.averages = averages or {}

    @torch.no_grad()
    def run(self, batches: Iterable[MicroBatch]) -> Records:
        """Collective: every rank gives the same number of batches (some may be empty).

        Raises TrainingError, on every rank, when the class logits of the delegator or of a selected expert are not
        finite.
        """
        engines = [self.delegator, *self.experts.values()]
        for engine in engines:
            average_both(engine.network, self.averages.get(engine.name), engine.group)
            engine.network.eval()
        try:
            rows = [self._batch(batch) for batch in batches]
        finally:
            for engine in engines:
                engine.network.train()
        gathered, _ = self.groups.world.all_gather_rows(torch.cat(rows))
        order = torch.argsort(gathered[:, 0])
        table = gathered[order].cpu()
        ids = table[:, 0].long()
        assert len(ids) == len(torch.unique(ids)), "an image was evaluated twice"
        if not bool(torch.isfinite(table[:, 2]).all()):
            raise TrainingError("the delegator's class logits are not finite (NaN or infinity)")
        if not bool((finite := torch.isfinite(table[:, 6])).all()):
            expert = int(table[~finite][0, 4])
            raise TrainingError(f"the class logits of expert {expert} are not finite (NaN or infinity)")
        labels, rough, answer = (table[:, column].long() for column in (1, 3, 5))
        return Records(
            ids,
            labels,
            table[:, 2],
            rough == labels,
            table[:, 4].long(),
            table[:, 8:].bool(),
            answer == labels,
            table[:, 6],
            rough,
            answer,
            table[:, 7],
        )

    def _batch(self, batch: MicroBatch) -> torch.Tensor:
        """Float64 rows [B, 8+E]: id, label, confidence, delegator's class, selected, final class, final confidence,
        selection confidence, each expert right."""
        experts, device = self.groups.placement.experts, batch.images.device
        rows = len(batch.labels)
        sizes = self._sizes(rows, device)
        everyone = torch.arange(experts, device=device).expand(sum(sizes), -1)
        plan = plan_exchange(everyone, sizes, self.groups.placement, self.groups.rank)
        weights = torch.ones(rows, experts, device=device)
        received = dispatch(plan, batch.images, batch.labels, weights, self.groups.world)
        answers = {
            expert: self._forward(self._network(engine), received[expert].images)
            for expert, engine in sorted(self.experts.items())
        }
        expert_logits_BEC = combine(plan, answers, self.groups.world)()
        if rows == 0:
            return torch.zeros(0, 8 + experts, dtype=torch.float64, device=device)
        with autocast(self.precision, device):
            logits_BC, selection_BE = self._network(self.delegator)(batch.images)
        logits_BC, selected_B = wide(logits_BC), selection_BE.argmax(1)
        probabilities = expert_logits_BEC[torch.arange(rows, device=device), selected_B].softmax(1)
        if self.final == "average":
            probabilities = (probabilities + logits_BC.softmax(1)) / 2
        columns = [
            batch.ids,
            batch.labels,
            early_exit.confidence(logits_BC),
            logits_BC.argmax(1),
            selected_B,
            probabilities.argmax(1),
            probabilities.amax(1),
            early_exit.confidence(selection_BE),
        ]
        right_BE = expert_logits_BEC.argmax(2) == batch.labels[:, None]
        return torch.cat([torch.stack([column.double() for column in columns], 1), right_BE.double()], 1)

    def _sizes(self, rows: int, device: torch.device) -> list[int]:
        sizes, _ = self.groups.world.all_gather_rows(torch.tensor([rows], device=device))
        return [int(size) for size in sizes]

    def _network(self, engine: NetworkEngine) -> nn.Module:
        average = self.averages.get(engine.name)
        return engine.network if average is None else average.network

    def _forward(self, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        if len(images) == 0:  # some layers refuse empty batches
            parameter = next(network.parameters())
            return wide(parameter.new_zeros(0, self.classes))
        with autocast(self.precision, images.device):
            return wide(network(images))


def summarise(
    records: Records,
    *,
    split: str,
    delegator_macs: int,
    expert_macs: list[int],
    threshold: float | None,
    curve: bool = True,
) -> dict[str, Any]:
    """The figures of one evaluation (the object that `coe-dist evaluate --json` prints). Fractions 0-1, MACs integers.

    threshold None: no image exits early. ece: calibration error of the delegator's and of the collaboration's answers.
    """
    images, experts = len(records.ids_N), records.experts_NE.shape[1]
    macs_N = torch.tensor(expert_macs, dtype=torch.float64)[records.selected_N]
    exits_N = early_exit.exits(records.confidence_N, threshold)
    right_N = torch.where(exits_N, records.delegator_N, records.final_N)
    confidence_N = torch.where(exits_N, records.confidence_N, records.final_confidence_N)
    load = torch.bincount(records.selected_N, minlength=experts)
    chosen_right = records.experts_NE.gather(1, records.selected_N[:, None])[:, 0]
    own = torch.bincount(records.selected_N, weights=chosen_right.double(), minlength=experts)
    result: dict[str, Any] = {
        "split": split,
        "images": images,
        "top1": {
            "coe": _mean(right_N),
            "delegator": _mean(records.delegator_N),
            "oracle": _mean(records.experts_NE.any(1)),
            "experts": [_mean(records.experts_NE[:, expert]) for expert in range(experts)],
        },
        "exit_rate": _mean(exits_N),
        "average_macs": round(delegator_macs + float((macs_N * ~exits_N).sum()) / images),
        "load": [int(count) / images for count in load],
        "expert_accuracy": [
            float(right) / int(count) if count else None for right, count in zip(own, load, strict=True)
        ],
        "ece": {"coe": ece(confidence_N, right_N), "delegator": ece(records.confidence_N, records.delegator_N)},
        "threshold": threshold,
        "macs": {"delegator": delegator_macs, "experts": expert_macs},
    }
    if curve:
        points = early_exit.curve(
            records.confidence_N, records.delegator_N, records.final_N, macs_N, delegator_macs, thresholds=None
        )
        result["curve"] = [
            {"threshold": p.threshold, "exit_rate": p.exit_rate, "average_macs": round(p.average_macs), "top1": p.top1}
            for p in points
        ]
    return result


def class_table(records: Records, classes: tuple[str, ...]) -> dict[str, Any]:
    """Counts [C][E] of images per class and selected expert, and how many of them that expert answers right."""
    experts, count = records.experts_NE.shape[1], len(classes)
    cell_N = records.labels_N * experts + records.selected_N
    chosen_right = records.experts_NE.gather(1, records.selected_N[:, None])[:, 0]
    selected = torch.bincount(cell_N, minlength=count * experts).view(count, experts)
    correct = torch.bincount(cell_N, weights=chosen_right.double(), minlength=count * experts).view(count, experts)
    return {
        "classes": list(classes),
        "selected": selected.tolist(),
        "correct": correct.long().tolist(),
        "images_per_class": torch.bincount(records.labels_N, minlength=count).tolist(),
    }


def calibrated_threshold(
    records: Records,
    *,
    delegator_macs: int,
    expert_macs: list[int],
    budget: float | None,
    accuracy: float | None = None,
) -> float | None:
    """The threshold for a budget of average MACs, or the cheapest one of at least this top-1 accuracy, on these
    records; None without either (nobody exits early). Raises InputError for an accuracy that no threshold reaches."""
    macs_N = torch.tensor(expert_macs, dtype=torch.float64)[records.selected_N]
    if accuracy is not None:
        columns = (records.confidence_N, records.delegator_N, records.final_N, macs_N)
        try:
            return early_exit.cheapest_threshold(*columns, delegator_macs, accuracy)
        except ValueError as error:
            raise InputError(f"--min-{error}, of these {len(macs_N)} images") from None
    if budget is None:
        return None
    return float(early_exit.calibrate_threshold(records.confidence_N, macs_N, delegator_macs, budget))


def _mean(flags: torch.Tensor) -> float:
    return int(flags.sum()) / max(1, len(flags))

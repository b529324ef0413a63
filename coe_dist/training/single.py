"""The single-network baseline: the same recipe, loader, engines and workers, data-parallel, without any routing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from coe_dist.parallel.groups import Group
from coe_dist.training.ema import WeightAverage, average_both
from coe_dist.training.engines import NetworkEngine, autocast, wide
from coe_dist.training.step import MicroBatch, StepSums
from coe_dist.training.teacher import Teacher
from coe_dist.training.undo import StatisticsBackup


class SingleStep:
    """One optimizer step of one network, replicated on every rank. `average`, where given, answers in `accuracy`."""

    def __init__(
        self,
        engine: NetworkEngine,
        world: Group,
        *,
        label_smoothing: float,
        call_empty: bool,
        average: WeightAverage | None = None,
        teacher: Teacher | None = None,
        skips: bool = True,
    ) -> None:
        self.engine, self.world, self.average = engine, world, average
        self.label_smoothing, self.call_empty = label_smoothing, call_empty
        self.teacher = teacher
        self.micro_step = 0
        self.backup = StatisticsBackup([engine]) if skips else None

    def step(self, batches: Sequence[MicroBatch], sums: StepSums, votes: list[int] | None = None) -> bool:
        """See CollaborationStep.step."""
        if self.backup is not None:
            self.backup.keep()
        for index, batch in enumerate(batches):
            samples = int(self.world.all_reduce_sum(torch.tensor([len(batch.labels)], device=batch.images.device)))
            loss = None
            if len(batch.labels) or self.call_empty:
                logits = wide(self.engine(batch.images))
                per_image = F.cross_entropy(
                    logits, batch.labels, reduction="none", label_smoothing=self.label_smoothing
                )
                if self.teacher is not None:
                    distilled = self.teacher.losses(logits, self.teacher.hints(batch.images))
                    per_image = self.teacher.mixed(per_image, distilled)
                total = per_image.sum()
                loss = total * (self.world.size / (samples * len(batches)))
                sums.add("expert_loss", total.detach())
            self.micro_step += 1
            sums.images += len(batch.labels)
            self.engine.backward(loss, last=index == len(batches) - 1)
        stepped = self.engine.step()
        if not stepped:
            sums.skipped.append(self.engine.name)
            if self.backup is not None:
                self.backup.restore([self.engine.name])
        if votes is not None:
            votes[:] = self.world.all_reduce_sum(torch.tensor(votes, device=batches[0].images.device)).tolist()
        return stepped

    @torch.no_grad()
    def accuracy(self, batches: Iterable[MicroBatch], precision: str) -> tuple[int, int]:
        """Images answered right and images seen, over all ranks. Collective."""
        average_both(self.engine.network, self.average, self.world)
        network = self.engine.network if self.average is None else self.average.network
        self.engine.network.eval()
        counts = torch.zeros(2, dtype=torch.int64, device=next(network.parameters()).device)
        for batch in batches:
            if len(batch.labels):
                with autocast(precision, batch.images.device):
                    right = network(batch.images).argmax(1) == batch.labels
                counts += torch.stack([right.sum(), torch.tensor(len(right), device=right.device)])
        self.engine.network.train()
        self.world.all_reduce_sum(counts)
        return int(counts[0]), int(counts[1])

"""One training step: the method's five moves.

1. Read:     uint8 images, labels and sample ids of this rank's share of the global micro-batch (done by the caller).
2. Delegate: rough prediction and selection logits.
3. Route:    the router assigns the global micro-batch, or the part of it that the delegator is least sure of, and
             derives dispatch sets, loss weights and the exchange plan.
4. Dispatch, learn, return: images travel to their experts, experts run on weighted, SUM-reduced losses, one float per
             (sample, expert) travels back while the experts' backward pass runs.
5. Teach the delegator: selection labels, variance weights, its own loss and backward; then every engine steps.

Gradients are those of means over the images of the GLOBAL micro-batch, for experts and for selection over those N of
them that experts learn from: an expert's loss is scaled by R/N, R the ranks of its group, because engines average over
their group, and so is the delegator's by all images. With accumulation over G micro-batches each is scaled by 1/G more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from coe_dist.coe import modules
from coe_dist.parallel.exchange import ExpertBatch, combine, dispatch
from coe_dist.parallel.router import NonFiniteError, Router, Routing
from coe_dist.training.engines import NetworkEngine, wide
from coe_dist.training.teacher import Teacher
from coe_dist.training.undo import StatisticsBackup


@dataclass
class StepSums:
    """Sums over this rank's rows since the last report; additive over ranks and steps.

    `values` stay on the device until they are read, so that a step never waits for the GPU because of them:
    delegator_loss and delegator_correct over images; selection_loss over those dispatched, enlarged as if it were over
    all; expert_loss and, of it, distillation_loss (weighted) over (sample, expert) pairs.
    """

    images: int = 0
    dispatched: int = 0  # images that experts learn from
    bytes_sent: int = 0
    # images assigned to each expert of the GLOBAL batches, int64 [E], equal on all ranks
    load: torch.Tensor | None = None
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def add(self, name: str, value: torch.Tensor) -> None:
        self.values[name] = self.values[name] + value if name in self.values else value


@dataclass(frozen=True)
class MicroBatch:
    """This rank's part of a global micro-batch: uint8 [B,C,H,W], int64 [B], int64 [B]."""

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor

    def of(self, rows_S: torch.Tensor) -> MicroBatch:
        """These rows, int64 [S]."""
        images = self.images.index_select(0, rows_S)  # on a CPU many times faster than images[rows]
        return MicroBatch(images, self.labels[rows_S], self.ids[rows_S])


class CollaborationStep:
    """The engines of this rank and the router, and the step that uses them."""

    def __init__(
        self,
        delegator: NetworkEngine,
        experts: dict[int, NetworkEngine],
        router: Router,
        *,
        selection_weight: float,
        label_smoothing: float = 0.0,
        label_rule: str = "balanced",
        frozen_selection: bool = False,
        call_empty: bool = False,
        skips: bool = True,
        teacher: Teacher | None = None,
    ) -> None:
        """skips: whether training goes on after a step that failed, and its statistics must be undone."""
        self.delegator, self.experts, self.router = delegator, experts, router
        self.selection_weight, self.label_smoothing = selection_weight, label_smoothing
        self.label_rule, self.frozen_selection = label_rule, frozen_selection
        self.teacher = teacher
        self.call_empty = call_empty  # batchnorm: group needs every replica's forward, also with zero rows
        self.micro_step = 0  # names the dispatch permutation
        world = router.groups.world
        assert delegator.group.size == world.size, "the delegator must be replicated on every rank"
        assert tuple(sorted(experts)) == router.groups.hosted, "an engine per hosted expert, by global id"
        for expert, engine in experts.items():
            assert engine.group.size == router.groups.placement.replicas(expert), (
                f"expert {expert}: wrong replica group"
            )
        self.backup = StatisticsBackup(self._engines()) if skips else None

    def step(self, batches: Sequence[MicroBatch], sums: StepSums, votes: list[int] | None = None) -> bool:
        """One optimizer step over the accumulated micro-batches. False when a non-finite value made it skip a network.

        votes: numbers of this rank, in the end replaced by their sums over all ranks (they travel with what every step
        must agree on). Raises NonFiniteError, on every rank, when logits or losses are not finite; gradients are then
        cleared and votes as they were. Running statistics of networks that did not step are what they were.
        """
        if self.backup is not None:
            self.backup.keep()
        try:
            for index, batch in enumerate(batches):
                self._accumulate(batch, sums, parts=len(batches), last=index == len(batches) - 1)
        except NonFiniteError:
            for engine in self._engines():
                engine.zero_grad()
            if self.backup is not None:
                self.backup.restore(engine.name for engine in self._engines())
            raise
        failed = [engine.name for engine in self._engines() if not engine.step()]
        if self.backup is not None:
            self.backup.restore(failed)
        sums.skipped += failed
        # every rank learns whether any network of any rank had a non-finite gradient
        counts = torch.tensor([len(failed), *(votes or ())], device=batches[0].images.device)
        networks, *sums_of_votes = self.router.groups.world.all_reduce_sum(counts).tolist()
        if votes is not None:
            votes[:] = sums_of_votes
        return int(networks) == 0

    def _engines(self) -> list[NetworkEngine]:
        return [self.delegator, *(self.experts[expert] for expert in sorted(self.experts))]

    def _accumulate(self, batch: MicroBatch, sums: StepSums, *, parts: int, last: bool) -> None:
        world = self.router.groups.world
        step, self.micro_step = self.micro_step, self.micro_step + 1

        # 2. delegate
        class_logits_BC, selection_BE = self.delegator(batch.images) if self._runs(batch) else self._no_rows(batch)
        # 3. route
        confidence_B = None if self.router.share == 1.0 else _confidence(class_logits_BC)
        routing = self.router.route(wide(selection_BE), batch.ids, step, confidence_B)
        sent, selection_SE, samples = batch, selection_BE, routing.samples
        if routing.chosen_S is not None:
            sent, selection_SE = batch.of(routing.chosen_S), selection_BE[routing.chosen_S]
        # 4. dispatch, learn, return
        weights_Sk = routing.weights_k.expand(len(sent.labels), -1)
        hints_BX, hints_SX = self._hints(batch, sent, routing.chosen_S)
        received = dispatch(routing.plan, sent.images, sent.labels, weights_Sk, world, hints_SX)
        losses, backward_losses = self._expert_losses(received, routing, sums, samples * parts)
        losses_Sk = combine(routing.plan, losses, world)()
        finish_labels = self.router.start_labels(losses_Sk, routing)
        for expert in sorted(self.experts):
            self.experts[expert].backward(backward_losses[expert], last=last)
        # 5. teach the delegator
        labels_Sk, variance_S = finish_labels()
        loss = self._delegator_loss(
            class_logits_BC, selection_SE, batch, routing, labels_Sk, variance_S, hints_BX, sums
        )
        scale = world.size / (routing.batch_images * parts)
        self.delegator.backward(None if loss is None else loss * scale, last=last)
        sums.images += len(batch.labels)
        sums.dispatched += len(sent.labels)
        hint_bytes = 0 if self.teacher is None else self.teacher.bytes_per_image
        sums.bytes_sent += routing.plan.bytes_sent(batch.images.shape[1:].numel() + hint_bytes)
        load = routing.load_E(self.router.experts)
        sums.load = load if sums.load is None else sums.load + load

    def _hints(
        self, batch: MicroBatch, sent: MicroBatch, chosen_S: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The teacher's hints for the delegator, on all images or none, and for experts, on those sent."""
        if self.teacher is None:
            return None, None
        if not self.teacher.delegator:
            return None, self.teacher.hints(sent.images)
        hints_BX = self.teacher.hints(batch.images)
        return hints_BX, hints_BX if chosen_S is None else hints_BX.index_select(0, chosen_S)

    def _runs(self, batch: MicroBatch) -> bool:
        return len(batch.labels) > 0 or self.call_empty

    def _no_rows(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = next(self.delegator.network.parameters()).dtype
        empty = torch.zeros(0, self.router.experts, dtype=dtype, device=batch.images.device)
        return empty[:, :1], empty

    def _expert_losses(
        self, received: dict[int, ExpertBatch], routing: Routing, sums: StepSums, divisor: int
    ) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor | None]]:
        """Forward of every hosted expert: cross-entropy per pair [P_e] to send back, and the loss to run backward
        on."""
        losses: dict[int, torch.Tensor] = {}
        backward: dict[int, torch.Tensor | None] = {}
        for expert in sorted(self.experts):
            engine, rows = self.experts[expert], received[expert]
            others_have_rows = self.call_empty and routing.plan.expert_totals[expert] > 0
            if len(rows.labels) == 0 and not others_have_rows:
                dtype = next(engine.network.parameters()).dtype
                losses[expert], backward[expert] = torch.zeros(0, dtype=dtype, device=rows.images.device), None
                continue
            logits = wide(engine(rows.images))
            plain = F.cross_entropy(logits, rows.labels, reduction="none")
            losses[expert] = plain.detach()
            learned = plain
            if self.label_smoothing > 0:
                learned = F.cross_entropy(logits, rows.labels, reduction="none", label_smoothing=self.label_smoothing)
            if self.teacher is not None and rows.hints is not None:
                distilled = self.teacher.losses(logits, rows.hints)
                sums.add("distillation_loss", (distilled.detach() * rows.weights.to(distilled.dtype)).sum())
                learned = self.teacher.mixed(learned, distilled)
            weighted = (learned * rows.weights.to(learned.dtype)).sum()
            sums.add("expert_loss", weighted.detach())
            backward[expert] = weighted * (engine.group.size / divisor)
        return losses, backward

    def _delegator_loss(
        self,
        class_logits_BC: torch.Tensor,
        selection_SE: torch.Tensor,
        batch: MicroBatch,
        routing: Routing,
        labels_Sk: torch.Tensor,
        variance_S: torch.Tensor,
        hints_BX: torch.Tensor | None,
        sums: StepSums,
    ) -> torch.Tensor | None:
        """Summed loss of this rank's rows, that of selection (over the rows that were sent) enlarged as if it were one
        of all rows; None when there are none and the network was not called."""
        if not self._runs(batch):
            return None
        logits = wide(class_logits_BC)
        per_image = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=self.label_smoothing)
        if self.teacher is not None and hints_BX is not None:
            per_image = self.teacher.mixed(per_image, self.teacher.losses(logits, hints_BX))
        classes = per_image.sum()
        per_row = modules.selection_losses(wide(selection_SE), routing.experts_Bk, labels_Sk, rule=self.label_rule)
        selection = (per_row * variance_S).sum() * (0.0 if self.frozen_selection else 1.0)
        selection = selection * (routing.batch_images / max(routing.samples, 1))
        sums.add("delegator_loss", classes.detach())
        sums.add("selection_loss", selection.detach())
        sums.add("delegator_correct", (logits.detach().argmax(1) == batch.labels).sum())
        return classes + self.selection_weight * selection


def _confidence(class_logits_BC: torch.Tensor) -> torch.Tensor:
    """The largest class probability, [B], no gradient."""
    return torch.softmax(wide(class_logits_BC.detach()), dim=1).amax(1)

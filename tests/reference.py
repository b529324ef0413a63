"""The brute-force reference: the whole method in one process, one plain loop, no parallel code.

It states the training rules as directly as possible. Two things depend on the number of ranks by definition, and only
under BatchNorm mode `local`: each network then runs on the same per-rank chunks of rows, with running statistics per
rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from coe_dist.coe.transport import balanced_assignment, balanced_assignment_sparse

CHANNELS, RESOLUTION, CLASSES = 1, 12, 5
TOP, TEMPERATURE = 3, 1.7  # of distillation
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, GENERALIST, BETA = 0.05, 0.9, 1e-3, 0.2, 0.7


@dataclass(frozen=True)
class Case:
    world_size: int
    experts: int
    per_sample: int
    accumulation: int = 1
    clip_norm: float | None = None
    engine: str = "torch"
    zero_stage: int = 0
    batchnorm: str = "local"
    precision: str = "fp32"
    where: str = "replicated"
    labels: str = "balanced"
    samples: int = 26  # global batch, over all micro-batches
    steps: int = 5
    replay: bool = True
    distilled: float = 0.0  # weight of the distillation loss
    taught_delegator: bool = True  # whether the delegator learns by it too
    share: float = 1.0  # of a micro-batch: what experts learn from

    @property
    def name(self) -> str:
        return "-".join(f"{key}={value}" for key, value in vars(self).items())

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32


@dataclass
class Outcome:
    weights: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # network -> state dict
    momentum: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # network -> parameter -> buffer
    kept: list[torch.Tensor] = field(default_factory=list)  # per micro-batch [N], rows that experts learn from
    dispatch_sets: list[torch.Tensor] = field(default_factory=list)  # per micro-batch [N,k]
    labels: list[torch.Tensor] = field(default_factory=list)  # per micro-batch [N,k]


class TinyNetwork(nn.Module):
    """Two convolutions with BatchNorm; `heads` linear outputs."""

    def __init__(self, width: int, heads: list[int]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(CHANNELS, width, 3, stride=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, bias=False),  # a bias before BatchNorm has no gradient
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.heads = nn.ModuleList(nn.Linear(2 * width, head) for head in heads)

    def forward(self, images: torch.Tensor) -> Any:
        features = self.trunk(images.to(self.heads[0].weight.dtype) / 255)
        outputs = tuple(head(features) for head in self.heads)
        return outputs if len(outputs) > 1 else outputs[0]


def build_teacher(case: Case) -> nn.Module:
    """Strong opinions, so that what it teaches matters."""
    with torch.random.fork_rng():
        torch.manual_seed(12)
        network = TinyNetwork(5, [CLASSES]).eval()
    with torch.no_grad():
        network.heads[0].weight.mul_(8.0)
    return network.to(case.dtype)


def distillation(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """One row: the TOP largest logits of the teacher as float16 (less the largest), renormalised, against the
    student's softmax over all classes, at TEMPERATURE."""
    order = sorted(range(CLASSES), key=lambda label: -float(teacher_logits[label]))[:TOP]
    sent = [float(np.float16(float(teacher_logits[label] - teacher_logits[order[0]]))) for label in order]
    weights = [math.exp(value / TEMPERATURE) for value in sent]
    student = torch.log_softmax(logits / TEMPERATURE, 0)
    total = torch.zeros((), dtype=logits.dtype)
    for label, weight in zip(order, weights, strict=True):
        share = weight / sum(weights)
        total = total + share * (math.log(share) - student[label])
    return TEMPERATURE**2 * total


def build_networks(case: Case) -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        networks: dict[str, nn.Module] = {"delegator": TinyNetwork(4, [CLASSES, case.experts])}
        for expert in range(case.experts):
            networks[f"expert {expert}"] = TinyNetwork(6, [CLASSES])
    return {name: network.to(case.dtype) for name, network in networks.items()}


def batch_of(case: Case, step: int, part: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The global micro-batch: images uint8 [N,C,H,W], labels [N], ids [N]. The last step's last part is a short one."""
    size = case.samples // case.accumulation
    if step == case.steps - 1 and part == case.accumulation - 1:
        size = max(1, size // 3)
    generator = np.random.default_rng([7, step, part])
    labels = generator.integers(0, CLASSES, size)
    images = generator.integers(0, 120, (size, CHANNELS, RESOLUTION, RESOLUTION)) + 25 * labels[:, None, None, None]
    ids = generator.permutation(10_000)[:size]
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels), torch.from_numpy(ids)


def pieces(total: int, parts: int) -> list[int]:
    return [total // parts + (index < total % parts) for index in range(parts)]


class _Network:
    """One network, its optimizer, and running statistics per rank."""

    def __init__(self, network: nn.Module, case: Case) -> None:
        self.network, self.case = network, case
        groups = [
            {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM, nesterov=True)
        self.statistics: dict[int, dict[str, torch.Tensor]] = {}
        self.rows: dict[int, int] = {}
        self.start = {name: buffer.clone() for name, buffer in network.named_buffers()}

    def run(self, images: torch.Tensor, rank_of_row: torch.Tensor) -> Any:
        """Outputs in row order; under `local` in one chunk per rank."""
        if self.case.batchnorm == "group":
            return self.network(images)
        parts, order = [], []
        for rank in sorted(set(rank_of_row.tolist())):
            rows = torch.nonzero(rank_of_row == rank)[:, 0]
            self._swap_in(rank)
            parts.append(self.network(images[rows]))
            self.statistics[rank] = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
            self.rows[rank] = self.rows.get(rank, 0) + len(rows)
            order.append(rows)
        back = torch.argsort(torch.cat(order))
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(column)[back] for column in zip(*parts, strict=True))
        return torch.cat(parts)[back]

    def _swap_in(self, rank: int) -> None:
        saved = self.statistics.get(rank, self.start)
        for prefix, module in self.network.named_modules():
            for name in module._buffers:  # new tensors: autograd still holds those of the chunk before
                module._buffers[name] = saved[f"{prefix}.{name}" if prefix else name].clone()

    def step(self) -> None:
        for parameter in self.network.parameters():
            if parameter.grad is None:  # an expert without rows takes part with a zero gradient
                parameter.grad = torch.zeros_like(parameter)
        if self.case.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.case.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        if self.statistics:
            total = sum(self.rows.values())
            for name, buffer in self.network.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.copy_(sum(self.rows[rank] / total * self.statistics[rank][name] for rank in self.rows))
        return {
            name: value.clone()
            for name, value in self.network.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }


def replica_of_rows(case: Case, expert: int, rank_of_row: list[int]) -> list[int]:
    """The rank that runs each row of one expert: shares as even as possible, rows at home where they fit."""
    if case.experts >= case.world_size:
        return [0] * len(rank_of_row)
    sizes = pieces(case.world_size, case.experts)
    ranks = list(range(sum(sizes[:expert]), sum(sizes[: expert + 1])))
    room = dict(zip(ranks, pieces(len(rank_of_row), len(ranks)), strict=True))
    result = []
    for home in rank_of_row:
        result.append(home if room.get(home, 0) > 0 else -1)
        if result[-1] >= 0:
            room[home] -= 1
    for row, replica in enumerate(result):
        if replica < 0:
            result[row] = next(rank for rank in ranks if room[rank] > 0)
            room[result[row]] -= 1
    return result


def train(case: Case) -> Outcome:
    from coe_dist.coe.modules import step_permutation

    outcome = Outcome()
    networks = {name: _Network(network.train(), case) for name, network in build_networks(case).items()}
    experts, k = case.experts, case.per_sample
    teacher, teaching = build_teacher(case), case.distilled
    micro_step = 0
    for step in range(case.steps):
        for part in range(case.accumulation):
            images, labels, ids = batch_of(case, step, part)
            rank_of_row = torch.repeat_interleave(
                torch.arange(case.world_size), torch.tensor(pieces(len(labels), case.world_size))
            )
            class_logits, selection = networks["delegator"].run(images, rank_of_row)
            with torch.no_grad():
                taught_all = teacher(images)

            # what the delegator is least sure of goes on
            sureness = torch.softmax(class_logits.detach(), 1).amax(1).tolist()
            in_order = sorted(range(len(labels)), key=lambda row: sureness[row])
            kept = torch.tensor(sorted(in_order[: math.ceil(case.share * len(labels))]))
            all_labels, images, labels, ids = labels, images[kept], labels[kept], ids[kept]
            rank_of_row, selection, taught, samples = rank_of_row[kept], selection[kept], taught_all[kept], len(kept)

            # WGM and dispatch
            scores = torch.log_softmax(selection.detach(), 1).numpy()
            assigned = balanced_assignment(scores, ids.numpy()).expert_N
            permutation = step_permutation(3, micro_step, experts).tolist()
            sets = np.zeros((samples, k), dtype=np.int64)
            seen = [0] * experts
            for row in range(samples):
                home = assigned[row]
                others = [
                    (home + permutation[(seen[home] * (k - 1) + u) % (experts - 1)]) % experts for u in range(k - 1)
                ]
                sets[row] = [home, *others]
                seen[home] += 1
            # weights are float32 by definition, also in a float64 run
            weight_first = float(np.float32(experts - (experts - 1) * GENERALIST))
            weight_other = float(np.float32(GENERALIST * (experts - 1) / (k - 1))) if k > 1 else 0.0

            # experts
            losses = torch.zeros(samples, k, dtype=case.dtype)
            total = torch.zeros((), dtype=case.dtype)
            for expert in range(experts):
                pairs = [(row, column) for row in range(samples) for column in range(k) if sets[row, column] == expert]
                if not pairs:
                    continue
                rows = [row for row, _ in pairs]
                replicas = replica_of_rows(case, expert, [int(rank_of_row[row]) for row in rows])
                logits = networks[f"expert {expert}"].run(images[rows], torch.tensor(replicas))
                pair_losses = F.cross_entropy(logits, labels[rows], reduction="none")
                for (row, column), own_logits, loss in zip(pairs, logits, pair_losses, strict=True):
                    losses[row, column] = loss.detach()
                    if teaching:
                        loss = (1 - teaching) * loss + teaching * distillation(own_logits, taught[row])
                    total = total + (weight_first if column == 0 else weight_other) * loss
            (total / samples / case.accumulation).backward()

            # LGM and VCM
            if case.labels == "balanced":
                sparse = balanced_assignment_sparse(
                    -losses.numpy(), sets, experts, ids.numpy(), feasible_N=sets[:, 0].copy()
                )
                targets = torch.from_numpy(sets == sparse.expert_N[:, None]).to(case.dtype)
            elif case.labels == "best":
                targets = F.one_hot(losses.argmin(1), k).to(case.dtype)
            elif case.labels == "soft":
                targets = torch.softmax(-losses, 1)
            else:
                targets = torch.exp(-losses)
            variance = torch.exp(-losses).var(1, unbiased=False)
            ratio = (variance / (variance.mean() + 1e-8)).clamp(max=10)

            # delegator
            chosen = selection.gather(1, torch.from_numpy(sets))
            if case.labels == "competence":  # binary cross-entropy, written out
                cross = -(targets * F.logsigmoid(chosen) + (1 - targets) * F.logsigmoid(-chosen)).mean(1)
            else:
                cross = -(targets * torch.log_softmax(chosen, 1)).sum(1)
            selection_loss = cross * ratio
            rough = F.cross_entropy(class_logits, all_labels, reduction="none")
            if teaching and case.taught_delegator:
                pairs_of_logits = zip(class_logits, taught_all, strict=True)
                rough = (1 - teaching) * rough + teaching * torch.stack(
                    [distillation(*pair) for pair in pairs_of_logits]
                )
            loss = rough.mean() + BETA * selection_loss.mean()
            (loss / case.accumulation).backward()
            outcome.kept.append(kept)
            outcome.dispatch_sets.append(torch.from_numpy(sets))
            outcome.labels.append(targets)
            micro_step += 1
        for network in networks.values():
            network.step()
    for name, network in networks.items():
        outcome.weights[name] = network.state()
        outcome.momentum[name] = {
            key: network.optimizer.state[p]["momentum_buffer"].clone() for key, p in network.network.named_parameters()
        }
    return outcome

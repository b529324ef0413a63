"""The job of the exchange's benchmark and how we do it: every image to its expert, the experts' forward and backward
pass, and one loss per image back to where the image came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from coe_dist.parallel.exchange import combine, dispatch, plan_exchange
from coe_dist.parallel.groups import Groups

CLASSES = 10


@dataclass(frozen=True)
class Work:
    """What one rank holds: uint8 [B,C,H,W], the same pixels as float32, labels int64 [B], its images' experts [B]."""

    images: torch.Tensor
    pixels: torch.Tensor
    labels: torch.Tensor
    experts: torch.Tensor
    samples: int  # N


class Way(Protocol):
    """One way to do the job. `networks`: hosted global expert id -> its network, which holds the gradients."""

    networks: dict[int, nn.Module]

    def __call__(self, work: Work) -> torch.Tensor:
        """Losses [B] of this rank's images; the gradients are those of the mean over the N images. Collective."""


class PlainExpert(nn.Module):
    """Like small_cnn but without BatchNorm, which the padded rows of the peer would disturb."""

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, 10, 3, 2, 1),
                nn.ReLU(),
                nn.Conv2d(10, 20, 3, 2, 1),
                nn.ReLU(),
                nn.Conv2d(20, 40, 3, 2, 1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(40, 320),
                nn.ReLU(),
                nn.Linear(320, CLASSES),
            )

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(images_NCHW.to(torch.float32) / 255 - 0.5)
        return logits


class OurExchange:
    """dispatch() and combine() of coe_dist.parallel, with the gathering of the assignment and the plan in the time."""

    def __init__(self, groups: Groups, build: Callable[[int], nn.Module]) -> None:
        self.groups = groups
        self.networks = {expert: build(expert) for expert in groups.hosted}

    def __call__(self, work: Work) -> torch.Tensor:
        world = self.groups.world
        experts_N1, sizes = world.all_gather_rows(work.experts[:, None])
        plan = plan_exchange(experts_N1, sizes, self.groups.placement, self.groups.rank)
        received = dispatch(plan, work.images, work.labels, torch.ones(len(work.labels), 1), world)
        losses, back = {}, []
        for expert, rows in received.items():
            if len(rows.labels) == 0:
                losses[expert] = torch.zeros(0)
                continue
            each = F.cross_entropy(self.networks[expert](rows.images), rows.labels, reduction="none")
            losses[expert] = each.detach()
            back.append((each * rows.weights).sum() / work.samples)
        wait = combine(plan, losses, world)
        for loss in back:
            loss.backward()  # type: ignore[no-untyped-call]
        return wait()[:, 0]


class SentBytes:
    """Bytes that each all-to-all of this rank sent to other ranks, in order."""

    def __init__(self) -> None:
        self.each: list[int] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        original = dist.all_to_all_single

        def counted(output: Any, input: Any, *positional: Any, **named: Any) -> Any:
            splits = positional[1] if len(positional) > 1 else named.get("input_split_sizes")
            rank, world_size = dist.get_rank(), dist.get_world_size()
            row_bytes = input.numel() * input.element_size() // max(1, input.shape[0])
            own = input.shape[0] // world_size if splits is None else splits[rank]
            self.each.append((input.shape[0] - own) * row_bytes)
            return original(output, input, *positional, **named)

        dist.all_to_all_single = counted
        try:
            yield
        finally:
            dist.all_to_all_single = original

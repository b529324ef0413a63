"""The uneven all-to-all between data ranks and experts' ranks: dispatch() out, combine() back.

One exchange, step by step (our own design):

1. Every rank knows the dispatch sets of the whole global batch, so `plan_exchange` derives on each rank, without
   communication, which (sample, expert) pairs it sends to whom and which it receives from whom.
2. `dispatch` sends each other rank ONE segment of bytes: 8 bytes per pair (label, loss weight), then each uint8 image
   once, even when several experts of that rank want it, and then, where there is a teacher, its hints on each of these
   images (4 bytes a logit: coe/distillation.py). Nothing is padded, nothing is dropped, and what a rank would send to
   itself stays where it is.
3. The experts of this rank read their rows from what arrived and from the local batch.
4. `combine` sends one float per pair back by the reverse all-to-all; the data rank gets losses_Bk.

The frozen ExchangePlan is the only state between the two collective calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from coe_dist.parallel.groups import Group
from coe_dist.parallel.placement import ExpertPlacement, block

HEADER_BYTES = 8  # per pair: label int32, weight float32


@dataclass(frozen=True)
class ExchangePlan:
    """One rank's part of an exchange. Index tensors are int64 on the CPU; lists are indexed by the other rank.

    Pairs to one rank are ordered by (expert, row), so sender and receiver agree without sending indices.
    """

    rank: int
    batch_rows: int  # B
    per_sample: int  # k
    send_images: tuple[torch.Tensor, ...]  # local rows whose image goes to that rank, ascending, each once
    send_pairs: tuple[torch.Tensor, ...]  # flat positions (row * k + column) into [B, k]
    receive_images: tuple[int, ...]  # images that come from that rank
    receive_pairs: tuple[int, ...]
    expert_slots: dict[int, torch.Tensor]  # hosted expert -> rows of the pool of images (see dispatch)
    expert_pairs: dict[
        int, torch.Tensor
    ]  # hosted expert -> positions among all pairs of this rank, by (source, expert, row)
    expert_totals: dict[int, int]  # hosted expert -> its pairs over all replicas

    def bytes_sent(self, image_bytes: int) -> int:
        """Bytes this rank sends in dispatch for images of `image_bytes` each, hints included."""
        return sum(
            len(images) * image_bytes + len(pairs) * HEADER_BYTES
            for other, (images, pairs) in enumerate(zip(self.send_images, self.send_pairs, strict=True))
            if other != self.rank
        )


@dataclass(frozen=True)
class ExpertBatch:
    """What one hosted expert works on: images uint8 [P_e,C,H,W], labels int64 [P_e], weights float32 [P_e], and hints
    uint8 [P_e,X] where they were sent."""

    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    hints: torch.Tensor | None = None


def destinations(experts_Nk: np.ndarray, source_N: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """The rank that computes each pair, int64 [N,k]. experts_Nk: dispatch sets, int64 [N,k]; source_N: the rank that
    holds each row, int64 [N]. Replicas of an expert share its pairs evenly (sizes differ by at
    most one); within that, pairs stay on their own rank where they can, and the rest fills up in order."""
    first = np.array([ranks[0] for ranks in placement.ranks_of_expert], dtype=np.int64)
    dest_P = first[experts_Nk.reshape(-1)]
    source_P = np.repeat(source_N, experts_Nk.shape[1])
    for expert, ranks in enumerate(placement.ranks_of_expert):
        if len(ranks) == 1:
            continue
        pairs = np.flatnonzero(experts_Nk.reshape(-1) == expert)
        placed = np.full(len(pairs), -1, dtype=np.int64)
        room = {rank: len(block(len(pairs), index, len(ranks))) for index, rank in enumerate(ranks)}
        for rank in ranks:
            local = np.flatnonzero(source_P[pairs] == rank)[: room[rank]]
            placed[local] = rank
            room[rank] -= len(local)
        placed[placed < 0] = np.repeat(list(room), list(room.values()))
        dest_P[pairs] = placed
    result: np.ndarray = dest_P.reshape(experts_Nk.shape)
    return result


def plan_exchange(experts_Nk: torch.Tensor, sizes: list[int], placement: ExpertPlacement, rank: int) -> ExchangePlan:
    """Derives this rank's plan from the dispatch sets of the global batch.

    experts_Nk: int64 [N,k], rows in rank order. sizes: rows of each rank, sum N.
    """
    sets_Nk = experts_Nk.cpu().numpy()
    world, k = placement.world_size, sets_Nk.shape[1]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    source_N = np.repeat(np.arange(world), sizes)
    dest_P = destinations(sets_Nk, source_N, placement).reshape(-1)
    expert_P, row_P = sets_Nk.reshape(-1), np.repeat(np.arange(len(source_N)), k)
    source_P = np.repeat(source_N, k)

    by_expert_row = np.argsort(expert_P, kind="stable")  # rows ascend within an expert already
    send_images, send_pairs = [], []
    outgoing = by_expert_row[source_P[by_expert_row] == rank]
    for other in range(world):
        pairs = outgoing[dest_P[outgoing] == other]
        send_pairs.append(torch.from_numpy(pairs - offsets[rank] * k))
        send_images.append(torch.from_numpy(np.unique(row_P[pairs]) - offsets[rank]))

    receive_images, receive_pairs, slots, experts = [], [], [], []
    incoming = by_expert_row[dest_P[by_expert_row] == rank]
    base = 0
    for other in range(world):
        pairs = incoming[source_P[incoming] == other]
        if other == rank:  # the whole local batch is in the pool, so that it needs no copy on a single rank
            images, slot = sizes[rank], row_P[pairs] - offsets[rank]
        else:
            unique, slot = np.unique(row_P[pairs], return_inverse=True)
            images = len(unique)
        receive_images.append(images)
        receive_pairs.append(len(pairs))
        slots.append(slot + base)
        experts.append(expert_P[pairs])
        base += images
    slot_P, arrived_P = np.concatenate(slots), np.concatenate(experts)
    hosted = {expert: np.flatnonzero(arrived_P == expert) for expert in placement.experts_of_rank[rank]}
    return ExchangePlan(
        rank,
        sizes[rank],
        k,
        tuple(send_images),
        tuple(send_pairs),
        tuple(receive_images),
        tuple(receive_pairs),
        {expert: torch.from_numpy(slot_P[pairs]) for expert, pairs in hosted.items()},
        {expert: torch.from_numpy(pairs) for expert, pairs in hosted.items()},
        {expert: int((expert_P == expert).sum()) for expert in hosted},
    )


def dispatch(
    plan: ExchangePlan,
    images_BCHW: torch.Tensor,
    labels_B: torch.Tensor,
    weights_Bk: torch.Tensor,
    world: Group,
    hints_BX: torch.Tensor | None = None,
) -> dict[int, ExpertBatch]:
    """Sends images, labels and weights to the experts' ranks; returns the batch of every hosted expert.

    images uint8 [B,C,H,W], labels int64 [B], weights float [B,k], hints uint8 [B,X], on all ranks or on none; B of them
    that experts learn from (S in the legend of coe_dist.coe). Raises
    TrainingError naming rank and group when the exchange fails or times out. Collective over `world`.
    """
    k, device = plan.per_sample, images_BCHW.device
    pair_labels = labels_B.to(torch.int32).repeat_interleave(k)
    pair_weights = weights_Bk.to(torch.float32).reshape(-1)
    if world.handle is None:
        own = plan.send_pairs[plan.rank].to(device)
        return _expert_batches(plan, images_BCHW, pair_labels[own], pair_weights[own], hints_BX)

    image_bytes = images_BCHW.shape[1:].numel()
    flat = images_BCHW.reshape(plan.batch_rows, image_bytes)
    hints = flat[:, :0] if hints_BX is None else hints_BX
    hint_bytes = hints.shape[1]
    row_bytes = image_bytes + hint_bytes
    segments, send_sizes, receive_sizes = [], [], []
    for other in range(world.size):
        if other == plan.rank:
            send_sizes.append(0)
            receive_sizes.append(0)
            continue
        pairs, rows = plan.send_pairs[other].to(device), plan.send_images[other].to(device)
        header = (
            torch.stack([pair_labels[pairs], pair_weights[pairs].view(torch.int32)], dim=1)
            .view(torch.uint8)
            .reshape(-1)
        )
        segments += [header, flat.index_select(0, rows).reshape(-1), hints.index_select(0, rows).reshape(-1)]
        send_sizes.append(len(pairs) * HEADER_BYTES + len(rows) * row_bytes)
        receive_sizes.append(plan.receive_pairs[other] * HEADER_BYTES + plan.receive_images[other] * row_bytes)
    outgoing = torch.cat(segments)
    incoming = outgoing.new_empty(sum(receive_sizes))
    with world.naming_failures("dispatch"):
        dist.all_to_all_single(incoming, outgoing, receive_sizes, send_sizes, group=world.handle)

    pool, pool_hints, labels, weights = [], [], [], []
    for other, segment in enumerate(torch.split(incoming, receive_sizes)):
        if other == plan.rank:
            own = plan.send_pairs[other].to(device)
            pool.append(flat)
            pool_hints.append(hints)
            labels.append(pair_labels[own])
            weights.append(pair_weights[own])
            continue
        count = plan.receive_images[other]
        cut = plan.receive_pairs[other] * HEADER_BYTES
        end = cut + count * image_bytes
        header = segment[:cut].clone().view(torch.int32).reshape(-1, 2)  # the clone aligns it for the view
        pool.append(segment[cut:end].view(count, image_bytes))
        pool_hints.append(segment[end:].view(count, hint_bytes))
        labels.append(header[:, 0])
        weights.append(header[:, 1].contiguous().view(torch.float32))
    images = torch.cat(pool).reshape(-1, *images_BCHW.shape[1:])
    together = None if hints_BX is None else torch.cat(pool_hints)
    return _expert_batches(plan, images, torch.cat(labels), torch.cat(weights), together)


def _expert_batches(
    plan: ExchangePlan,
    pool: torch.Tensor,
    labels_P: torch.Tensor,
    weights_P: torch.Tensor,
    hints: torch.Tensor | None,
) -> dict[int, ExpertBatch]:
    batches = {}
    for expert, slots in plan.expert_slots.items():
        pairs = plan.expert_pairs[expert].to(pool.device)
        # index_select copies whole images: 28 times faster than pool[slots] for 28x28 uint8 on a CPU
        rows = slots.to(pool.device)
        images = pool.index_select(0, rows)
        chosen = None if hints is None else hints.index_select(0, rows)
        batches[expert] = ExpertBatch(images, labels_P[pairs].long(), weights_P[pairs], chosen)
    return batches


def combine(plan: ExchangePlan, values: dict[int, torch.Tensor], world: Group) -> Callable[[], torch.Tensor]:
    """Starts the way back of one value per pair; the returned function waits and gives values_Bk.

    values: hosted expert -> float [P_e] (training: one float per pair) or [P_e, ...] (evaluation: class logits), in the
    order of its ExpertBatch; values_Bk [B,k,...] has their dtype. Both functions raise TrainingError as dispatch does.
    Collective over `world`; asynchronous.
    """
    template = next(iter(values.values()))
    shape_Bk = (plan.batch_rows, plan.per_sample, *template.shape[1:])
    mine_P = template.new_zeros(sum(plan.receive_pairs), *template.shape[1:])
    for expert, value in values.items():
        mine_P[plan.expert_pairs[expert].to(template.device)] = value
    values_Bk = template.new_zeros(plan.batch_rows * plan.per_sample, *template.shape[1:])
    parts = torch.split(mine_P, list(plan.receive_pairs))
    values_Bk[plan.send_pairs[plan.rank].to(template.device)] = parts[plan.rank]
    if world.handle is None:
        return lambda: values_Bk.view(shape_Bk)

    back_sizes = [0 if other == plan.rank else count for other, count in enumerate(plan.receive_pairs)]
    own_sizes = [0 if other == plan.rank else len(pairs) for other, pairs in enumerate(plan.send_pairs)]
    outgoing = torch.cat([part for other, part in enumerate(parts) if other != plan.rank])
    incoming = outgoing.new_empty(sum(own_sizes), *template.shape[1:])
    with world.naming_failures("combine"):
        work = dist.all_to_all_single(incoming, outgoing, own_sizes, back_sizes, group=world.handle, async_op=True)

    def wait() -> torch.Tensor:
        with world.naming_failures("combine"):
            if work is not None:
                work.wait()
        for other, part in enumerate(torch.split(incoming, own_sizes)):
            if other != plan.rank:
                values_Bk[plan.send_pairs[other].to(template.device)] = part
        assert outgoing is not None  # keeps the sent buffer alive until the transfer has ended
        return values_Bk.view(shape_Bk)

    return wait

"""Runs on every rank: the exchange over real processes against what a single process would compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from coe_dist.parallel.exchange import combine, dispatch, plan_exchange
from coe_dist.parallel.groups import create_groups


def run(folder: Path) -> None:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for experts in (2, 3, 5):
        groups = create_groups(experts, timeout_seconds=300)
        for case, k in enumerate((1, 2, experts)):
            random = np.random.default_rng([experts, case])
            sizes = random.integers(0, 9, world_size).tolist()
            rows = sum(sizes)
            sets = torch.from_numpy(
                np.array([random.permutation(experts)[:k] for _ in range(rows)], dtype=np.int64).reshape(rows, k)
            )
            if case == 1:
                sets = torch.arange(k).expand(rows, k).contiguous()  # everything to the first experts
            images = torch.from_numpy(random.integers(0, 256, (rows, 3, 5, 7), dtype=np.uint8))
            labels, weights = (
                torch.from_numpy(random.integers(0, 1000, rows)),
                torch.from_numpy(random.random((rows, k), dtype=np.float32)),
            )
            mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            plan = plan_exchange(sets, sizes, groups.placement, rank)
            batches = dispatch(plan, images[mine], labels[mine], weights[mine], groups.world)
            values = {}
            for expert, batch in batches.items():
                pairs = [(row, column) for row in range(rows) for column in range(k) if sets[row, column] == expert]
                if groups.placement.replicas(expert) == 1:
                    assert torch.equal(batch.images, images[[row for row, _ in pairs]]), (
                        "images arrive whole and in row order"
                    )
                    assert batch.labels.tolist() == [int(labels[row]) for row, _ in pairs]
                    assert torch.equal(
                        batch.weights, torch.tensor([float(weights[row, column]) for row, column in pairs])
                    )
                values[expert] = batch.images.double().sum((1, 2, 3)) * 1000 + batch.labels + batch.weights + expert
            back = combine(plan, values, groups.world)()
            expected = (images.double().sum((1, 2, 3)) * 1000 + labels)[:, None] + weights + sets
            assert torch.equal(back, expected[mine]), "every pair's value comes back to its own place"

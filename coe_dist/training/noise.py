"""Small normal noise that makes copies of a network part; reproducible by seed and name of the tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from coe_dist.seeds import derive_seed


def noise_for(
    weights: dict[str, torch.Tensor], trainable: Iterable[str], noise: float, seed: int
) -> dict[str, torch.Tensor]:
    """For each trainable tensor normal noise of `noise` times its root mean square, float64, reproducible by `seed`."""
    result = {}
    for name in sorted(trainable):
        value = weights[name].double()
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        spread = noise * value.square().mean().sqrt()
        result[name] = torch.randn(value.shape, generator=generator, dtype=torch.float64) * spread
    return result


def with_noise(weights: dict[str, torch.Tensor], noise: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of `weights` with noise added in float64 to the tensors that have some."""
    moved = {name: (weights[name].double() + added).to(weights[name].dtype) for name, added in noise.items()}
    return weights | moved

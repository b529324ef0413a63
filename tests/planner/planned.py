"""Runs to plan in tests: small networks of Fashion-MNIST's shape, tabulated rates; a network to count by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from coe_dist.bench.planning import data_of, run_of
from coe_dist.config import RunConfig, parse_config
from coe_dist.planner.devices import tabulated
from coe_dist.planner.run import Run


def config_of(**sections: Any) -> RunConfig:
    """Three small experts of which each image sees two; `sections` are merged in."""
    network = {"network": "small_cnn", "options": {"width": 0.25}}
    content: dict[str, Any] = {
        "name": "planned",
        "data": {"folder": "no-data"},
        "delegator": network,
        "experts": {"count": 3, "per_sample": 2, **network},
        "training": {"epochs": 2, "global_batch": 96, "engine": "torch"},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section} if isinstance(section, Mapping) else section
    return parse_config(content)


def planned(gpu: str = "a100", *, network: float | None = None, per_node: int | None = None, **sections: Any) -> Run:
    config = config_of(**sections)
    info, validation, _ = data_of(config)
    return run_of(
        config,
        info,
        validation,
        lambda settings, counted: tabulated(gpu, settings, *counted, network=network, per_node=per_node),
    )


class OneLayer(nn.Module):
    """Small enough to count every operation by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.to(self.layer.weight.dtype).flatten(1))

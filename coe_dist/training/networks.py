"""Builds the networks and engines that a rank holds, and counts their MACs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from coe_dist.coe import backbones, macs
from coe_dist.config import NetworkConfig, RunConfig
from coe_dist.data.sidecar import SplitInfo
from coe_dist.errors import InputError
from coe_dist.parallel.batchnorm import split_batchnorm
from coe_dist.parallel.groups import Group, Groups
from coe_dist.seeds import derive_seed
from coe_dist.training.ema import WeightAverage
from coe_dist.training.engines import NetworkEngine, build_engine
from coe_dist.training.initial_weights import add_noise, start_from_file
from coe_dist.training.optim import build_optimizer


@dataclass(frozen=True)
class NetworkBuilder:
    """Builds networks for one data set; the seed of each stream is derived by name."""

    config: RunConfig
    info: SplitInfo

    def _arguments(self) -> dict[str, Any]:
        return {
            "channels": self.info.channels,
            "classes": len(self.info.classes),
            "mean": self.info.mean,
            "std": self.info.std,
        }

    def delegator(self) -> nn.Module:
        section = self.config.delegator
        with _Naming("delegator"):
            network = backbones.build_delegator(
                section.network,
                section.options,
                experts=self.config.experts.count,
                **self._arguments(),
                seed=derive_seed(self.config.seed, "delegator"),
            )
        return _checked(network, "delegator", section.network)

    def expert(self, expert: int) -> nn.Module:
        return self.single(self.config.experts, "experts", derive_seed(self.config.seed, "expert", expert))

    def single(self, section: NetworkConfig, field: str, seed: int) -> nn.Module:
        with _Naming(field):
            network = backbones.build_classifier(section.network, section.options, **self._arguments(), seed=seed)
        return _checked(network, field, section.network)

    def macs_of(self, network: nn.Module) -> int:
        return macs.count_macs(network, channels=self.info.channels, resolution=self.config.data.resolution)

    def collaboration_macs(self) -> tuple[int, list[int]]:
        """MACs of the delegator and of each expert."""
        return self.macs_of(self.delegator()), [self.macs_of(self.expert(0))] * self.config.experts.count


def _checked(network: nn.Module, field: str, name: str) -> nn.Module:
    """Refuses BatchNorm layers that split_batchnorm does not split: their statistics would differ between ranks."""
    others = {
        type(m).__name__ for m in network.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.BatchNorm2d)
    }
    if others:
        raise InputError(
            f"{field}.network: {name} is not allowed; it has {', '.join(sorted(others))} layers; "
            "of the BatchNorms only BatchNorm2d can be split over ranks"
        )
    return network


class _Naming:
    """Turns a ValueError of a network's constructor into an InputError that names the config section."""

    def __init__(self, field: str) -> None:
        self.field = field

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, ValueError) and not isinstance(error, InputError):
            raise InputError(f"{self.field}.{error}") from error


def engine_for(
    name: str,
    network: nn.Module,
    config: RunConfig,
    group: Group,
    groups: Groups,
    device: torch.device,
    learning_rate: float,
) -> NetworkEngine:
    """Puts a network on its device, splits its BatchNorm over its group, and wraps it in an engine."""
    training = config.training
    split_batchnorm(network, training.batchnorm, group)
    network.to(device=device, dtype=torch.float64 if training.precision == "fp64" else None)
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.train()
    return build_engine(
        name, network, build_optimizer(network, training.optimizer, learning_rate), training, group, groups.alone
    )


def starting_networks(builder: NetworkBuilder, hosted: Iterable[int]) -> tuple[nn.Module, dict[int, nn.Module]]:
    """The delegator and the given experts as training begins with them; warns once of what a file did not give.

    Raises InputError naming the field when such a file is missing or does not fit.
    """
    config = builder.config
    delegator = builder.delegator()
    skipped = [start_from_file(delegator, "delegator", config.delegator, config)]
    experts = {}
    for expert in hosted:
        experts[expert] = builder.expert(expert)
        skipped.append(start_from_file(experts[expert], "experts", config.experts, config))
        if config.experts.initial_weights is not None:
            add_noise(experts[expert], config.experts.initial_noise, config.seed, expert)
    for line in dict.fromkeys(filter(None, skipped)):
        warnings.warn(line, stacklevel=1)
    return delegator, experts


def collaboration_engines(
    config: RunConfig, builder: NetworkBuilder, groups: Groups, device: torch.device, *, starts: bool = True
) -> tuple[NetworkEngine, dict[int, NetworkEngine]]:
    """The delegator's engine and one per hosted expert, created in global expert order. Collective.

    starts: whether they are to be trained and may start from files; else a save is loaded into them.
    """
    optimizer = config.training.optimizer
    if starts:
        own, networks = starting_networks(builder, groups.hosted)
    else:
        own, networks = builder.delegator(), {expert: builder.expert(expert) for expert in groups.hosted}
    delegator = engine_for("delegator", own, config, groups.world, groups, device, optimizer.learning_rate)
    rate = optimizer.expert_learning_rate or optimizer.learning_rate
    experts = {
        expert: engine_for(f"expert {expert}", networks[expert], config, groups.experts[expert], groups, device, rate)
        for expert in groups.hosted
    }
    return delegator, experts


def averages_of(engines: Iterable[NetworkEngine], decay: float | None) -> dict[str, WeightAverage]:
    """By name of the network, a moving average of its weights that starts from them; none without a decay."""
    return {} if decay is None else {engine.name: WeightAverage(engine.network, decay) for engine in engines}

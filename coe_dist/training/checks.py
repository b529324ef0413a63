"""What can be refused before any worker starts: data, networks and budgets that do not fit together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from coe_dist.coe.macs import count_macs, exit_rate_for_budget
from coe_dist.config import RunConfig, is_url
from coe_dist.data.loaders import check_loader
from coe_dist.data.sidecar import SPLITS, SplitInfo, check_labels
from coe_dist.data.stored import StoredImages
from coe_dist.errors import InputError
from coe_dist.storage.datasets import sidecar_of
from coe_dist.training.networks import NetworkBuilder, starting_networks
from coe_dist.training.teacher import configured_teacher


def check_run(config: RunConfig) -> NetworkBuilder:
    """Reads side-cars and labels, and builds each kind of network once. Raises InputError naming the field or file."""
    check_loader(config.data.loader)
    infos = {split: sidecar_of(config.data, split) for split in SPLITS}
    train = infos["train"]
    for split, info in infos.items():
        check_classes(split, info, train)
        if not is_url(config.data.folder):  # of a URL only the side-cars are read here
            beton = Path(config.data.folder) / f"{split}.beton"
            check_labels(beton, info, StoredImages(beton).labels_N)
    if config.training.global_batch > (count := min(train.count, config.data.limit or train.count)):
        raise InputError(
            f"training.global_batch: {config.training.global_batch} is not allowed; "
            f"the train split has {count} images, give at most {count}"
        )
    builder = NetworkBuilder(config, train)
    delegator_macs, expert_macs = builder.collaboration_macs()
    check_budget("early_exit.macs_budget", config.early_exit.macs_budget, delegator_macs, expert_macs)
    starting_networks(builder, [0])
    check_smallest_images(builder)
    check_empty_batches(builder)
    configured_teacher(config, train, torch.device("cpu"))
    return builder


def check_smallest_images(builder: NetworkBuilder) -> None:
    """Networks refuse images that are too small for them in ways of their own."""
    schedule = builder.config.data.progressive
    if schedule is None:
        return
    for field, network in (("delegator", builder.delegator()), ("experts", builder.expert(0))):
        try:
            count_macs(network, channels=builder.info.channels, resolution=schedule.start)
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(
                f"data.progressive.start: {schedule.start} is not allowed; {field}.network refuses it: {reason}"
            ) from error


def check_empty_batches(builder: NetworkBuilder) -> None:
    """Under batchnorm: group a replica is called also when it has no images, because its statistics are collective."""
    config = builder.config
    if config.training.batchnorm != "group" or config.workers.most == 1:
        return
    called: list[tuple[str, str, Callable[[], torch.nn.Module]]] = [
        ("delegator", config.delegator.network, builder.delegator)
    ]
    if config.workers.most > config.experts.count:  # experts have replicas
        called.append(("experts", config.experts.network, lambda: builder.expert(0)))
    side = config.data.resolution
    for section, network, build in called:
        try:
            outputs = build()(torch.zeros(0, builder.info.channels, side, side, dtype=torch.uint8))
            total = torch.stack([output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,))])
            total.sum().backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            raise InputError(
                f"training.batchnorm: group is not allowed with {section}.network: {network}, which cannot run on "
                f"an empty batch ({str(error).splitlines()[0]}); set training.batchnorm: local"
            ) from error


def check_classes(split: str, info: SplitInfo, train: SplitInfo) -> None:
    if info.channels != train.channels:
        raise InputError(
            f"{split}.beton: its images have {info.channels} channels, those of train.beton {train.channels}; "
            "write both from one source"
        )
    if info.classes == train.classes:
        return
    missing, extra = sorted(set(train.classes) - set(info.classes)), sorted(set(info.classes) - set(train.classes))
    difference = "; ".join(
        text
        for text in (
            missing and f"missing: {', '.join(missing[:5])}",
            extra and f"not in train: {', '.join(extra[:5])}",
        )
        if text
    )
    raise InputError(
        f"{split}.beton: its classes differ from train.beton's ({difference or 'another order'}); "
        "write both from one source"
    )


def check_budget(field: str, budget: float | None, delegator_macs: int, expert_macs: list[int]) -> None:
    if budget is None:
        return
    try:
        exit_rate_for_budget(budget, delegator_macs, sum(expert_macs) / len(expert_macs))
    except ValueError:
        raise InputError(
            f"{field}: {budget:g} is not allowed; the delegator alone needs {delegator_macs} MACs, give more"
        ) from None

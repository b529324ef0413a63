"""What can be refused before any worker starts: data, networks and budgets that do not fit together."""

from __future__ import annotations

from pathlib import Path

from coe_dist.coe.macs import exit_rate_for_budget
from coe_dist.config import RunConfig
from coe_dist.data.sidecar import SPLITS, SplitInfo, read_sidecar
from coe_dist.errors import InputError
from coe_dist.training.networks import NetworkBuilder


def check_run(config: RunConfig) -> NetworkBuilder:
    """Reads the side-cars and builds each kind of network once. Raises InputError naming the field or file."""
    infos = {split: read_sidecar(Path(config.data.folder) / f"{split}.beton") for split in SPLITS}
    train = infos["train"]
    for split, info in infos.items():
        check_classes(split, info, train)
    if config.training.global_batch > (count := min(train.count, config.data.limit or train.count)):
        raise InputError(
            f"training.global_batch: {config.training.global_batch} is not allowed; "
            f"the train split has {count} images, give at most {count}"
        )
    builder = NetworkBuilder(config, train)
    delegator_macs, expert_macs = builder.collaboration_macs()
    check_budget("early_exit.macs_budget", config.early_exit.macs_budget, delegator_macs, expert_macs)
    return builder


def check_classes(split: str, info: SplitInfo, train: SplitInfo) -> None:
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

"""The teacher of a training with distillation: it looks once at an image, on the rank that has read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coe_dist.coe.distillation import BYTES_PER_LOGIT, MOST_CLASSES, distillation_losses, pack_hints
from coe_dist.errors import InputError
from coe_dist.training.engines import autocast, wide

if TYPE_CHECKING:
    from coe_dist.coe.teachers import TeacherNetwork
    from coe_dist.config import RunConfig
    from coe_dist.data.sidecar import SplitInfo


class Teacher:
    """A network that answers with hints (coe/distillation.py) and never learns."""

    def __init__(
        self,
        network: TeacherNetwork,
        *,
        top: int,
        temperature: float,
        weight: float,
        delegator: bool,
        precision: str = "fp32",
    ) -> None:
        """weight: of the distillation loss, from 0 to 1. delegator: whether the delegator learns from it too."""
        self.network = network.eval().requires_grad_(False)
        self.top, self.temperature, self.weight, self.delegator = top, temperature, weight, delegator
        self.precision = precision

    def to(self, device: torch.device) -> Teacher:
        self.network.to(device=device, dtype=torch.float64 if self.precision == "fp64" else None)
        return self

    @property
    def bytes_per_image(self) -> int:
        return BYTES_PER_LOGIT * self.top

    @torch.no_grad()
    def hints(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 [B, bytes_per_image] for uint8 images of any number, also none."""
        if len(images_BCHW) == 0:
            return images_BCHW.new_zeros(0, self.bytes_per_image)
        with autocast(self.precision, images_BCHW.device):
            logits = self.network(images_BCHW)
        return pack_hints(wide(logits), self.top)

    def losses(self, logits_PC: torch.Tensor, hints_PX: torch.Tensor) -> torch.Tensor:
        """Of a student with these logits, per row."""
        return distillation_losses(logits_PC, hints_PX, self.temperature)

    def mixed(self, losses_P: torch.Tensor, distilled_P: torch.Tensor) -> torch.Tensor:
        """(1 - weight) * losses + weight * distillation, per row."""
        return (1.0 - self.weight) * losses_P + self.weight * distilled_P


def unlearned_teacher(config: RunConfig, info: SplitInfo) -> Teacher:
    """The teacher that the configuration, which has a section for it, asks for, with random weights. Raises InputError
    naming the field when there is no such network."""
    from coe_dist.coe.teachers import build_teacher

    section, classes = config.distillation, len(info.classes)
    assert section is not None
    if classes > MOST_CLASSES:
        raise InputError(f"distillation: {classes} classes are not allowed; hints name at most {MOST_CLASSES}")
    try:
        network = build_teacher(
            section.teacher,
            options=section.options,
            channels=info.channels,
            classes=classes,
            mean=info.mean,
            std=info.std,
            resolution=section.resolution,
        )
    except ValueError as error:
        raise InputError(f"distillation.{error}") from error
    return Teacher(
        network,
        top=min(section.top, classes),
        temperature=section.temperature,
        weight=section.weight,
        delegator=section.delegator,
        precision=config.training.precision,
    )


def configured_teacher(config: RunConfig, info: SplitInfo, device: torch.device) -> Teacher | None:
    """The teacher that the configuration asks for, with its weights, on `device`; None where it asks for none.

    Raises InputError naming the field when there is no such network, or its file is missing or does not fit.
    """
    from coe_dist.training.weights_file import check_fit, read_weights

    if config.distillation is None:
        return None
    teacher = unlearned_teacher(config, info)
    path, network = Path(config.distillation.weights), teacher.network.network
    weights, own = read_weights("distillation.weights", path), network.state_dict()
    check_fit("distillation.weights", path, weights, own, own)
    network.load_state_dict(weights)
    return teacher.to(device)

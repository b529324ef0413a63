"""A teacher for distillation: a timm classifier as timm builds it, so that its published weights fit, or one of ours
(backbones.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from coe_dist.coe.backbones import Normalise, Resize, build_classifier
from coe_dist.coe.trunks import Options, unknown_network


class TeacherNetwork(nn.Module):
    """images_NCHW uint8 -> class logits [N,C]; `network` holds timm's module, or our classifier, and nothing else."""

    def __init__(self, resize: nn.Module, normalise: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.resize, self.normalise, self.network = resize, normalise, network

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.network(self.normalise(self.resize(images_NCHW))))


def build_teacher(
    name: str,
    *,
    options: Options | None = None,
    channels: int,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    resolution: int | None,
) -> TeacherNetwork:
    """Random weights, nothing is downloaded. options: of a network that build_classifier knows by this name; without
    them it is timm's, and colour images are normalised as timm's weights of this name expect it; all others with `mean`
    and `std`. resolution: side in pixels to which images are resized; none: as they come.

    Raises ValueError, one line, for a name that timm does not know or what build_classifier refuses.
    """
    resize = nn.Identity() if resolution is None else Resize(resolution)
    if options is not None:
        try:
            ours = build_classifier(name, options, channels=channels, classes=classes, mean=mean, std=std, seed=0)
        except ValueError as error:
            raise ValueError(re.sub(r"^network\b", "teacher", str(error))) from error
        return TeacherNetwork(resize, nn.Identity(), ours)
    import timm  # takes seconds to import

    plain = name.removeprefix("timm/")
    if not re.fullmatch(r"\w+", plain) or not timm.is_model(plain):
        raise unknown_network(name, timm.list_models(), field="teacher")
    network: Any = timm.create_model(plain, pretrained=False, num_classes=classes, in_chans=channels)
    if channels == 3:
        mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    return TeacherNetwork(resize, Normalise(channels, mean, std), network)

"""The families of networks that the inference benchmark measures: block strings, sizes and widths.

In each family all networks are timm EfficientNets of the same blocks, for images of the same side, and 100 classes.
Widths were chosen once so that an image costs the same everywhere. The delegator has one block a stage and sees the
image at half the side, as light delegators do. CondConv stands in the last three stages, as its paper has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from coe_dist.coe.backbones import Classifier, Delegator, Normalise

EXPERTS = KERNELS = 8
CLASSES = 100


@dataclass(frozen=True)
class Family:
    name: str
    side: int  # pixels
    stages: tuple[str, ...]  # {}: the number of blocks
    last_stages: tuple[str, ...]  # where CondConv stands
    blocks: tuple[int, ...]  # in each stage; the delegator has one
    stem: int
    activation: type[nn.Module]
    sizes: dict[str, tuple[float, int]]  # delegator, expert, plain, condconv: width, features before the classifier

    def delegator(self) -> Delegator:
        small = nn.Sequential(_EverySecondPixel(), self._trunk("delegator", tuple(1 for _ in self.blocks)))
        return Delegator(_normalise(), small, self.sizes["delegator"][1], CLASSES, EXPERTS)

    def classifier(self, name: str) -> Classifier:
        return Classifier(_normalise(), self._trunk(name, self.blocks), self.sizes[name][1], CLASSES)

    def _trunk(self, name: str, blocks: tuple[int, ...]) -> nn.Module:
        from timm.models._efficientnet_builder import decode_arch_def, round_channels
        from timm.models.efficientnet import EfficientNet

        conditional = f"_cc{KERNELS}" if name == "condconv" else ""
        stages = [*self.stages, *(stage + conditional for stage in self.last_stages)]
        width, features = self.sizes[name]
        trunk: nn.Module = EfficientNet(
            decode_arch_def([[stage.format(count)] for stage, count in zip(stages, blocks, strict=True)]),
            num_classes=0,
            num_features=features,
            stem_size=self.stem,
            round_chs_fn=partial(round_channels, multiplier=width),
            act_layer=self.activation,
        )
        return trunk


class _EverySecondPixel(nn.Module):
    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return images_NCHW[..., ::2, ::2]


def _normalise() -> Normalise:
    return Normalise(3, [0.5] * 3, [0.25] * 3)


_B0 = (
    "ds_r{}_k3_s1_e1_c16_se0.25",
    "ir_r{}_k3_s2_e6_c24_se0.25",
    "ir_r{}_k5_s2_e6_c40_se0.25",
    "ir_r{}_k3_s2_e6_c80_se0.25",
)
_B0_LAST = ("ir_r{}_k5_s1_e6_c112_se0.25", "ir_r{}_k5_s2_e6_c192_se0.25", "ir_r{}_k3_s1_e6_c320_se0.25")
_B0_BLOCKS = (1, 2, 2, 3, 3, 4, 1)

FAMILIES = {
    family.name: family
    for family in (
        # 23M MACs, the cost of the smallest published mobile networks: each call of a layer counts
        Family(
            name="light",
            side=96,
            stages=("ds_r{}_k3_s1_e1_c16", "ir_r{}_k3_s2_e4_c24", "ir_r{}_k3_s2_e4_c40"),
            last_stages=("ir_r{}_k3_s2_e4_c80", "ir_r{}_k3_s1_e4_c112", "ir_r{}_k3_s2_e4_c192"),
            blocks=(1, 2, 2, 3, 2, 1),
            stem=16,
            activation=nn.ReLU,
            sizes={"delegator": (0.75, 512), "expert": (1.0, 768), "plain": (0.83, 768), "condconv": (0.75, 384)},
        ),
        # about 100M MACs, the budget of the paper's second claim: narrow EfficientNets of B0's depth
        Family(
            name="100M",
            side=176,
            stages=_B0,
            last_stages=_B0_LAST,
            blocks=_B0_BLOCKS,
            stem=32,
            activation=nn.SiLU,
            sizes={"delegator": (0.75, 960), "expert": (0.6, 768), "plain": (0.55, 1536), "condconv": (0.55, 704)},
        ),
        # about 400M MACs: "condconv" is timm's tf_efficientnet_cc_b0_8e at its own resolution (with ordinary padding)
        Family(
            name="b0",
            side=224,
            stages=_B0,
            last_stages=_B0_LAST,
            blocks=_B0_BLOCKS,
            stem=32,
            activation=nn.SiLU,
            sizes={"delegator": (1.3, 1664), "expert": (1.1, 1408), "plain": (1.0, 1280), "condconv": (1.0, 1280)},
        ),
    )
}

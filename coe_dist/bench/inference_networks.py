"""The networks of the inference benchmark: one family, equal MACs, and a selection that uses every expert.

Weights are random; BatchNorm, the selection and the threshold are fitted to the images, as training would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coe_dist.bench.inference_families import EXPERTS, Family
from coe_dist.coe.backbones import Classifier, Delegator
from coe_dist.coe.collaboration import CollaborationOfExperts
from coe_dist.coe.early_exit import confidence
from coe_dist.coe.macs import average_macs, count_macs

EXIT_RATE = 0.3
MACS_TOLERANCE = 0.05
LARGEST_LOGIT = 20.0  # about a trained network's; float32 has steps of 8e-6 at 100, near what answers may differ by
_PART = 64  # images at a time
_BALANCING = 200  # steps


@dataclass(frozen=True)
class Networks:
    collaboration: CollaborationOfExperts  # threshold set for EXIT_RATE on `images`
    plain: Classifier
    condconv: Classifier  # its trunk is timm's network, unchanged
    images_NCHW: torch.Tensor  # uint8; of any stretch of them EXIT_RATE exit early, as nearly as whole numbers allow
    macs: dict[str, int]  # of one image; "coe": on average


def build_networks(family: Family, images: int) -> Networks:
    """The same for the same arguments. Raises AssertionError as macs_of does."""
    macs = macs_of(family)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        delegator = family.delegator()
        experts = [family.classifier("expert") for _ in range(EXPERTS)]
        plain, condconv = family.classifier("plain"), family.classifier("condconv")
        images_NCHW = _images(images, family.side)
        for network in (delegator, *experts, plain, condconv):
            _settle(network, images_NCHW)
        features_NF = _spread_selection(delegator, images_NCHW)
        _spread_classes(delegator, features_NF)
        confidence_N, order_N = confidence(delegator.class_head(features_NF)).double().sort(descending=True)
    exits = round(EXIT_RATE * images)
    collaboration = CollaborationOfExperts(
        delegator,
        experts,
        threshold=float(confidence_N[exits - 1 : exits + 1].mean()),
        final="expert",
        delegator_macs=macs["delegator"],
        expert_macs=[macs["expert"]] * EXPERTS,
    )
    return Networks(collaboration.eval(), plain, condconv, images_NCHW[_mixed(order_N, exits)], macs)


def macs_of(family: Family) -> dict[str, int]:
    """MACs of one image in each network, "coe": on average. Raises AssertionError when they are not equal to
    MACS_TOLERANCE."""
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {"delegator": family.delegator()}
        networks |= {name: family.classifier(name) for name in ("expert", "plain", "condconv")}
    macs = {name: count_macs(network, channels=3, resolution=family.side) for name, network in networks.items()}
    macs["coe"] = round(average_macs(macs["delegator"], macs["expert"], EXIT_RATE))
    if max(abs(macs[peer] / macs["coe"] - 1) for peer in ("plain", "condconv")) > MACS_TOLERANCE:
        raise AssertionError(f"inference bench: MACs of {family.name} are not equal to {MACS_TOLERANCE}: {macs}")
    return macs


def _images(count: int, side: int) -> torch.Tensor:
    """uint8 [count,3,side,side]: noise of different coarseness, contrast and colour, so that features differ."""
    coarse_NCHW = torch.rand(count, 3, 6, 6)
    smooth_NCHW = nn.functional.interpolate(coarse_NCHW, size=(side, side), mode="bilinear")
    grain_N, light_NC = torch.rand(count, 1, 1, 1), torch.rand(count, 3, 1, 1)
    noisy_NCHW = grain_N * torch.rand(count, 3, side, side) + (1 - grain_N) * smooth_NCHW
    return (255 * (0.6 * noisy_NCHW + 0.4 * light_NC)).to(torch.uint8)


def _settle(network: nn.Module, images_NCHW: torch.Tensor) -> None:
    """BatchNorm's statistics of real activations: with the initial ones random networks answer all images alike. All
    images at once: behind fifty layers those of a part would let an image grow without bounds."""
    norms: list[Any] = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain mean over the batches seen
    network.train()(images_NCHW)
    network.eval()


def _spread_selection(delegator: Delegator, images_NCHW: torch.Tensor) -> torch.Tensor:
    """A selection head on the whitened main directions of the features and their opposites, biased until experts are
    chosen about equally often, as after a balanced training. Returns the features [N,F]."""
    features_NF = torch.cat([delegator.trunk(delegator.normalise(part)) for part in torch.split(images_NCHW, _PART)])
    mean_F = features_NF.mean(0)
    _, strengths, directions = torch.linalg.svd(features_NF - mean_F, full_matrices=False)
    half = EXPERTS // 2
    mix_EH = torch.cat([torch.eye(half), -torch.eye(half)])
    weight_EF = mix_EH @ (directions[:half] / strengths[:half, None] * len(images_NCHW) ** 0.5)
    bias_E = -weight_EF @ mean_F
    scores_NE = features_NF @ weight_EF.T
    for step in range(_BALANCING):
        loads_E = torch.bincount((scores_NE + bias_E).argmax(1), minlength=EXPERTS) / len(images_NCHW)
        bias_E -= (1 - step / _BALANCING) * scores_NE.std() * (loads_E - 1 / EXPERTS)
    delegator.selection_head.weight.copy_(weight_EF)
    delegator.selection_head.bias.copy_(bias_E)
    return features_NF


def _spread_classes(delegator: Delegator, features_NF: torch.Tensor) -> None:
    """A class head that is sure of some images and not of others, with logits up to LARGEST_LOGIT."""
    nn.init.normal_(delegator.class_head.weight)
    nn.init.zeros_(delegator.class_head.bias)
    delegator.class_head.weight.mul_(LARGEST_LOGIT / delegator.class_head(features_NF).abs().max())


def _mixed(order_N: torch.Tensor, exits: int) -> torch.Tensor:
    """order_N: exits first. The same rows in an order that spreads them evenly among the others, else as they were."""
    count = len(order_N)
    early, late = order_N[:exits].sort().values.tolist(), order_N[exits:].sort().values.tolist()
    takes_early = [(position + 1) * exits // count > position * exits // count for position in range(count)]
    return torch.tensor([early.pop(0) if take else late.pop(0) for take in takes_early])

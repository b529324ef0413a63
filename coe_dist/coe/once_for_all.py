"""Subnets of the once-for-all MobileNetV3 (Cai et al., ICLR 2020; width 1.0), built with timm's block strings.

A stem and a first block of 16 channels, then five stages of 2 to 4 inverted residual blocks, each block with its own
expansion (3, 4 or 6) and depthwise kernel (3, 5 or 7), then MobileNetV3's head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

NETWORK = "ofa_mobilenetv3"
_STAGES = (  # channels, stride, what follows in the block string: squeeze-and-excite, ReLU for hard-swish
    (24, 2, "_nre"),
    (40, 2, "_se0.25_nre"),
    (80, 2, ""),
    (112, 1, "_se0.25"),
    (160, 2, "_se0.25"),
)
_DEEPEST = 4
_CHOICES = {"depth": (2, 3, 4), "expand": (3, 4, 6), "kernel": (3, 5, 7)}
_PASSED_ON = ("drop_rate", "drop_path_rate")


def build_once_for_all(options: Mapping[str, Any], channels: int) -> tuple[nn.Module, int]:
    """The trunk, normalised images [N,channels,H,W] -> pooled features [N,F], and F.

    options: `depth` (one number, or one for each of 5 stages), `expand` and `kernel` (one number, one for each stage,
    or 20: one for each of 4 blocks in each stage, of which the first `depth` count); drop_rate, drop_path_rate. All
    default to the largest. Raises ValueError naming the option.
    """
    from timm.models._efficientnet_blocks import SqueezeExcite
    from timm.models._efficientnet_builder import decode_arch_def, round_channels
    from timm.models.mobilenetv3 import MobileNetV3

    for name in options:
        if name not in (*_CHOICES, *_PASSED_ON):
            raise ValueError(f"options.{name}: unknown; {NETWORK} has {', '.join((*_CHOICES, *_PASSED_ON))}")
    rates = {name: options[name] for name in _PASSED_ON if name in options}
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate < 1.0:
            raise ValueError(f"options.{name}: {rate!r} is not allowed; give a number from 0 to below 1")
    squeeze = partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=round_channels)
    trunk = MobileNetV3(
        block_args=decode_arch_def(block_strings(options)),
        num_features=1280,
        stem_size=16,
        act_layer=nn.Hardswish,
        se_layer=squeeze,
        head_bias=False,
        num_classes=0,
        in_chans=channels,
        **rates,
    )
    return trunk, 1280


def block_strings(options: Mapping[str, Any]) -> list[list[str]]:
    """timm's description of the subnet: a list per stage with a string per block. Raises ValueError naming the
    option."""
    depths = _per_stage("depth", options)
    expansions, kernels = _per_block("expand", options), _per_block("kernel", options)
    stages = [["ds_r1_k3_s1_e1_c16_nre"]]
    for stage, (channels, stride, rest) in enumerate(_STAGES):
        blocks = zip(kernels[stage], expansions[stage], [stride, 1, 1, 1], strict=True)
        names = [f"ir_r1_k{kernel}_s{step}_e{expansion}_c{channels}{rest}" for kernel, expansion, step in blocks]
        stages.append(names[: depths[stage]])
    return [*stages, ["cn_r1_k1_s1_c960"]]


def _per_block(name: str, options: Mapping[str, Any]) -> list[list[int]]:
    value = options.get(name)
    whole = len(_STAGES) * _DEEPEST
    if isinstance(value, Sequence) and len(value) == whole:
        checked = [_checked(name, entry) for entry in value]
        return [checked[at : at + _DEEPEST] for at in range(0, whole, _DEEPEST)]
    return [[entry] * _DEEPEST for entry in _per_stage(name, options)]


def _per_stage(name: str, options: Mapping[str, Any]) -> list[int]:
    value = options.get(name, _CHOICES[name][-1])
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [_checked(name, value)] * len(_STAGES)
    if len(value) != len(_STAGES):
        lengths = "5" if name == "depth" else "5 or 20"
        raise ValueError(f"options.{name}: {len(value)} numbers are not allowed; give one number or {lengths}")
    return [_checked(name, entry) for entry in value]


def _checked(name: str, value: Any) -> int:
    if isinstance(value, bool) or value not in _CHOICES[name]:
        allowed = ", ".join(map(str, _CHOICES[name]))
        raise ValueError(f"options.{name}: {value!r} is not allowed; give {allowed} or a list of them")
    return int(value)

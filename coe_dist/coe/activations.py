"""Replaces the activations of a finished network by piecewise linear units (the option `activation: pwlu`)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from coe_dist.coe.pwlu import PWLU

MODES = ("channel", "layer")

# by name, because timm has classes of its own beside torch's. Gates (sigmoids, tanh) are not activations of this kind.
_REPLACED = (
    *("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "CELU", "SELU", "SiLU", "Swish", "Mish", "HardMish"),
    *("Hardswish", "HardSwish", "GELU", "GELUTanh", "QuickGELU"),
)
_PROBE_SIDE = 224  # pixels; some networks take no other


def replace_activations(network: str, trunk: nn.Module, channels: int, mode: str) -> nn.Module:
    """`trunk`, images [N,channels,H,W] -> anything, with a PWLU in place of every ReLU, SiLU, Hardswish and the like.

    Squeeze-and-excite blocks keep theirs (our own rule): they see one pooled value per image and channel, and their
    gates need the sigmoid's range. mode: one function per channel, or one for the layer. Other weights stay as they
    are. Raises ValueError where the network calls functions instead of modules, or where one module serves several
    widths (only `layer` can).
    """
    widths = _widths(trunk, channels)
    if not widths:
        raise ValueError(f"options.activation: 'pwlu' is not allowed; {network} has no activation layers to replace")
    units: dict[nn.Module, PWLU] = {}
    for layer, found in widths.items():
        if mode == "channel" and (len(found) > 1 or None in found):
            raise ValueError(
                f"options.pwlu_mode: 'channel' is not allowed; {network} has an activation layer without one fixed "
                "number of channels; give layer"
            )
        units[layer] = PWLU(next(iter(found)) if mode == "channel" else None)
    for module in list(trunk.modules()):
        for name, child in module.named_children():
            if child in units:
                setattr(module, name, units[child])
    return trunk


def _widths(trunk: nn.Module, channels: int) -> dict[nn.Module, set[int | None]]:
    """The channels that each activation layer sees (None: not in dimension 1), from one image without computing."""
    gated = {
        inner for module in trunk.modules() if "SqueezeExcit" in type(module).__name__ for inner in module.modules()
    }
    layers = [layer for layer in trunk.modules() if type(layer).__name__ in _REPLACED and layer not in gated]
    names = {layer: name for name, layer in trunk.named_modules()}
    probe = copy.deepcopy(trunk).to("meta").eval()
    seen: dict[str, set[int | None]] = {}
    for layer in layers:
        probe.get_submodule(names[layer]).register_forward_pre_hook(_recorder(seen.setdefault(names[layer], set())))
    side = (getattr(trunk, "default_cfg", None) or {}).get("input_size", (0, 0, _PROBE_SIDE))[-1]
    with torch.no_grad():
        probe(torch.zeros(1, channels, side, side, device="meta"))
    return {layer: seen[names[layer]] for layer in layers if seen[names[layer]]}


def _recorder(found: set[int | None]) -> Any:
    def record(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found.add(inputs[0].shape[1] if inputs[0].dim() in (2, 4) else None)

    return record

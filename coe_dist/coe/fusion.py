"""BatchNorm folded into the convolution before it, for networks that only answer.

In eval mode BatchNorm is a fixed scale and shift per channel, so a convolution can do its work: the same answers, up to
rounding, with a pass over memory less for each pair.
"""

from __future__ import annotations

import copy

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fuse_batchnorm(network: nn.Module) -> nn.Module:
    """A copy of `network`, in eval mode, whose convolutions have absorbed the BatchNorm that follows them.

    A pair is folded where the BatchNorm alone uses the convolution's output, each of the two is called once, their
    weights are used nowhere else, and both are PyTorch's own classes, or timm's convolution with TensorFlow's padding
    and its BatchNorm with an activation (the activation stays). All other layers are left as they are, and all layers
    of a network that torch.fx cannot trace (control flow that depends on values).
    """
    folded = copy.deepcopy(network).eval()
    try:
        graph = _Tracer().trace(folded)
    except Exception:  # whatever the forward of a network does with a symbolic value
        return folded
    modules = dict(folded.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        convolution, norm = modules[str(before.target)], modules[str(node.target)]
        pair = (str(before.target), str(node.target))
        if not _is_plain(convolution) or any(calls[name] > 1 or name in read for name in pair):
            continue
        activation = _activation_of(norm)
        if activation is not None:
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            _fold(convolution, norm)
            parent, _, name = str(node.target).rpartition(".")
            setattr(folded.get_submodule(parent), name, activation)
    return folded


class _Tracer(fx.Tracer):
    """Looks into layers that are made of layers, but not into those two."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        single = isinstance(module, nn.Conv2d | nn.BatchNorm2d) or not any(True for _ in module.children())
        return single or super().is_leaf_module(module, qualified_name)


def _is_plain(layer: nn.Module) -> bool:
    """A convolution that uses its weight as it is: not one that standardises it, or computes it from others."""
    if layer._forward_pre_hooks or layer._forward_hooks:
        return False
    timm_same = type(layer).__module__.startswith("timm.") and type(layer).__name__ == "Conv2dSame"
    return type(layer) is nn.Conv2d or timm_same


def _activation_of(norm: nn.Module) -> nn.Module | None:
    """What remains of a BatchNorm layer without the BatchNorm; None: it is no layer that can be folded."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return None
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    if type(norm).__module__.startswith("timm.") and type(norm).__name__ == "BatchNormAct2d":
        return norm.get_submodule("act")
    return None


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        convolution.weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
    convolution.bias = bias

"""From a name to a trunk: a network without its classifier.

Names: `small_cnn` (ours), `ofa_mobilenetv3` (once_for_all.py), `timm/<name>` or timm's plain name,
`torchvision/<name>`, and what installed packages register with timm (see PLUGINS). Weights are random, never
downloaded. Options beside a network's own: `activation: pwlu` with `pwlu_mode: channel` (the default) or `layer`, and
`condconv: <kernels>` where the network has such a form.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, cast

import torch
from torch import nn

from coe_dist.coe import once_for_all
from coe_dist.coe.activations import MODES, replace_activations
from coe_dist.coe.condconv import with_condconv
from coe_dist.coe.small_cnn import SmallCNN

Options = Mapping[str, Any]

# what we decide ourselves (channels, heads), what would read or download weights, what changes the kind of output
_RESERVED_OPTIONS = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "checkpoint_path", "weights"),
    *("weights_backbone", "num_classes", "in_chans", "global_pool", "features_only"),
)
# Packages name modules under this group of entry points; importing one registers its networks with timm. Every process
# finds them, on every machine where the package is installed, and a run folder cannot name code of its own.
PLUGINS = "coe_dist.networks"
_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")  # torchvision's; in training they return tuples


def build_trunk(network: str, options: Options, channels: int) -> tuple[nn.Module, int]:
    """The trunk, normalised images [N,channels,H,W] -> pooled features [N,F], and F.

    `options` go to the network's constructor. Raises ValueError, one line beginning with `network` or `options`, for an
    unknown name (close ones are given) or an option that is unknown, reserved or refused by the constructor.
    """
    for name in options:
        if name in _RESERVED_OPTIONS:
            raise ValueError(f"options.{name}: not allowed; it is fixed by this project")
    mode, kernels = _activation_mode(options), _condconv_kernels(options)
    own = {name: value for name, value in options.items() if name not in ("activation", "pwlu_mode", "condconv")}
    if network == "small_cnn":
        trunk, features = _small_cnn(own, channels, kernels)
    else:
        trunk, features = _built(network, own, channels)
        if kernels is not None:
            trunk = with_condconv(network, trunk, kernels)
    return (trunk if mode is None else replace_activations(network, trunk, channels, mode)), features


def _built(network: str, options: Options, channels: int) -> tuple[nn.Module, int]:
    if network == once_for_all.NETWORK:
        return once_for_all.build_once_for_all(options, channels)
    if network.startswith("torchvision/"):
        return _torchvision(network, options, channels)
    return _timm(network, options, channels)


def _activation_mode(options: Options) -> str | None:
    """`pwlu_mode` where the activation is a PWLU."""
    mode = options.get("pwlu_mode", MODES[0])
    if mode not in MODES:
        raise ValueError(f"options.pwlu_mode: {mode!r} is not allowed; give {' or '.join(MODES)}")
    if "activation" not in options:
        if "pwlu_mode" in options:
            raise ValueError(f"options.pwlu_mode: {mode!r} is not allowed without activation: pwlu")
        return None
    if options["activation"] != "pwlu":
        raise ValueError(f"options.activation: {options['activation']!r} is not allowed; give pwlu, or leave it out")
    return str(mode)


def _condconv_kernels(options: Options) -> int | None:
    kernels = options.get("condconv")
    if kernels is None:
        return None
    if isinstance(kernels, bool) or not isinstance(kernels, int) or not 2 <= kernels <= 64:
        raise ValueError(f"options.condconv: {kernels!r} is not allowed; give a whole number of kernels from 2 to 64")
    return kernels


def _small_cnn(options: Options, channels: int, kernels: int | None) -> tuple[nn.Module, int]:
    for name in options:
        if name not in ("width", "depth"):
            raise ValueError(f"options.{name}: unknown; small_cnn has width, depth")
    trunk = SmallCNN(channels, condconv=kernels, **options)
    return trunk, trunk.features


def _timm(network: str, options: Options, channels: int) -> tuple[nn.Module, int]:
    import timm  # takes seconds to import

    name = network.removeprefix("timm/")
    # plain names only: timm also knows names of remote places, and tags of pretrained weights
    if re.fullmatch(r"\w+", name) and not timm.is_model(name):
        _load_plugins()
    if not re.fullmatch(r"\w+", name) or not timm.is_model(name):
        raise unknown_network(network, ["small_cnn", once_for_all.NETWORK, *timm.list_models()])
    trunk = _construct(
        network, options, lambda: timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels, **options)
    )
    # networks with a layer between pooling and classifier (MobileNetV3) count its outputs in head_hidden_size
    return trunk, int(cast(int, getattr(trunk, "head_hidden_size", None) or trunk.num_features))


def _load_plugins() -> None:
    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:  # somebody else's module may raise anything
            reason = f"{type(error).__name__} {error}".splitlines()[0]
            raise ValueError(
                f"network: the plug-in {plugin.name} ({plugin.value}) cannot be imported ({reason}); mend or remove it"
            ) from error


def _torchvision(network: str, options: Options, channels: int) -> tuple[nn.Module, int]:
    from torchvision import models

    name = network.removeprefix("torchvision/")
    names = [known for known in models.list_models(module=models) if known not in _AUXILIARY_OUTPUTS]
    if name not in names:
        raise unknown_network(network, [f"torchvision/{known}" for known in names])
    if channels not in (1, 3):
        raise ValueError(
            f"network: {network!r} is not allowed for {channels} channels; torchvision's take 3 (or 1, repeated)"
        )
    trunk = _construct(network, options, lambda: models.get_model(name, weights=None, num_classes=1, **options))
    heads = [
        place for place, layer in trunk.named_modules() if isinstance(layer, nn.Linear) and layer.out_features == 1
    ]
    if not heads:
        raise ValueError(f"network: {network!r} is not allowed; it does not end in a linear layer")
    parent, _, attribute = heads[-1].rpartition(".")
    features = cast(nn.Linear, trunk.get_submodule(heads[-1])).in_features
    setattr(trunk.get_submodule(parent), attribute, nn.Identity())
    return (trunk if channels == 3 else nn.Sequential(_GreyToColour(), trunk)), features


class _GreyToColour(nn.Module):
    def forward(self, images_N1HW: torch.Tensor) -> torch.Tensor:
        return images_N1HW.expand(-1, 3, -1, -1)


def _construct(network: str, options: Options, constructor: Callable[[], Any]) -> nn.Module:
    try:
        return cast(nn.Module, constructor())
    except Exception as error:  # whatever a library raises for a bad option; without options it is not the user's
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unexpected and unexpected[1] in options:
            raise ValueError(f"options.{unexpected[1]}: unknown; {network} has no such option") from error
        if not options:
            raise
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise ValueError(f"options: {dict(options)} is not allowed; {network} refuses it: {reason}") from error


def unknown_network(network: str, names: Sequence[str], field: str = "network") -> ValueError:
    """What to raise for a name that is not among `names`; tells close ones."""
    plain = network.removeprefix("timm/")
    close = difflib.get_close_matches(plain, names, n=4, cutoff=0.5)
    close = close or ["small_cnn", "timm/<name>", "torchvision/<name>"]
    return ValueError(f"{field}: {network!r} is not allowed; no such network, similar are {', '.join(close)}")

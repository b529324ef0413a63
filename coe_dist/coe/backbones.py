"""From a name to a network: delegators and experts (classifiers) with our own heads on a trunk.

Names: see trunks.py, which also has the options `activation` and `condconv`; `resolution` and a delegator's `selection`
belong here. Weights are always random, never downloaded. Images come as uint8; they are resized and normalised inside,
so that they travel as uint8, once, at the larger of the networks' sizes.

Errors are ValueErrors of one line that begins with `network` or `options.<name>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from coe_dist.coe.macs import count_macs
from coe_dist.coe.trunks import Options, build_trunk


class Normalise(nn.Module):
    """Images uint8, or float from 0 to 255 -> (image / 255 - mean) / std per channel, in the network's dtype.

    Raises ValueError for a wrong number of values or a std that is not above 0.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(
                    f"{name}: {len(values)} values are not allowed; give one for each of {channels} channels"
                )
        if min(std) <= 0:
            raise ValueError(f"std: {min(std)} is not allowed; give numbers above 0")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, channels, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, channels, 1, 1))

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return (images_NCHW.to(self.mean.dtype) / 255 - self.mean) / self.std


class Resize(nn.Module):
    """Images uint8, or float from 0 to 255 -> float32 [N,C,side,side], bilinear and antialiased: what a network of the
    option `resolution` sees. Nothing is rounded, so that all devices agree. Images of that size pass unchanged.
    Raises ValueError for a side that is not a whole number from 8 to 1024."""

    def __init__(self, side: int) -> None:
        super().__init__()
        if isinstance(side, bool) or not isinstance(side, int) or not 8 <= side <= 1024:
            raise ValueError(
                f"options.resolution: {side!r} is not allowed; give a whole number of pixels from 8 to 1024"
            )
        self.side = side

    def extra_repr(self) -> str:
        return str(self.side)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        if images_NCHW.shape[2:] == (self.side, self.side):
            return images_NCHW
        size = (self.side, self.side)
        return F.interpolate(images_NCHW.float(), size, mode="bilinear", align_corners=False, antialias=True)


class Classifier(nn.Module):
    """An expert, or a single network: images_NCHW uint8 -> class logits [N,C]."""

    def __init__(
        self, normalise: Normalise, trunk: nn.Module, features: int, classes: int, resize: Resize | None = None
    ) -> None:
        super().__init__()
        self.resize = resize or nn.Identity()
        self.normalise, self.trunk = normalise, trunk
        self.class_head = nn.Linear(features, classes)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.class_head(self.trunk(self.normalise(self.resize(images_NCHW)))))


SELECTIONS = ("shared", "detached", "separate")


class Delegator(nn.Module):
    """images_NCHW uint8 -> (class logits [N,C], selection logits [N,E]), two linear heads on one trunk.

    selection: whether the two tasks share it (our own variants). "shared": both train it. "detached": no gradient of
    selection reaches it. "separate": selection has a trunk of its own, selection_trunk, the same network again.

    The selection head starts at N(0, 0.01^2) weights and zero bias (our own rule): near to no preference, so that the
    first losses and not the initialisation make the experts' portions, but not all zero, which would make every
    sample a tie.
    """

    def __init__(
        self,
        normalise: Normalise,
        trunk: nn.Module,
        features: int,
        classes: int,
        experts: int,
        resize: Resize | None = None,
        *,
        selection: str = "shared",
    ) -> None:
        super().__init__()
        self.resize = resize or nn.Identity()
        self.normalise, self.trunk = normalise, trunk
        self.selection = selection
        self.selection_trunk: nn.Module | None = None
        self.class_head = nn.Linear(features, classes)
        self.selection_head = nn.Linear(features, experts)
        nn.init.normal_(self.selection_head.weight, std=0.01)
        nn.init.zeros_(self.selection_head.bias)

    def forward(self, images_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_NCHW = self.normalise(self.resize(images_NCHW))
        features_NF = self.trunk(x_NCHW)
        if self.selection_trunk is not None:
            selecting_NF = self.selection_trunk(x_NCHW)
        else:
            selecting_NF = features_NF.detach() if self.selection == "detached" else features_NF
        return self.class_head(features_NF), self.selection_head(selecting_NF)


def build_classifier(
    network: str,
    options: Options,
    *,
    channels: int,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> Classifier:
    """A network whose weights are a function of the arguments alone; the global random state is left untouched.

    mean and std: per channel, in units of full intensity (0 to 1). Raises ValueError for an unknown network (close
    names are given), a refused option, or a wrong number of means.
    """
    with _seeded(seed):
        resize, own = _resize(options)
        trunk, features = build_trunk(network, own, channels)
        return Classifier(Normalise(channels, mean, std), trunk, features, classes, resize)


def build_delegator(
    network: str,
    options: Options,
    *,
    channels: int,
    classes: int,
    experts: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> Delegator:
    """A delegator that chooses among `experts` experts; otherwise as build_classifier. Option `selection`: one of
    SELECTIONS."""
    selection = options.get("selection", SELECTIONS[0])
    if selection not in SELECTIONS:
        raise ValueError(f"options.selection: {selection!r} is not allowed; give one of {', '.join(SELECTIONS)}")
    with _seeded(seed):
        resize, own = _resize(_without(options, "selection"))
        trunk, features = build_trunk(network, own, channels)
        delegator = Delegator(
            Normalise(channels, mean, std), trunk, features, classes, experts, resize, selection=selection
        )
        if selection == "separate":  # after the others, which so have the weights they have with one trunk
            delegator.selection_trunk, _ = build_trunk(network, own, channels)
        return delegator


def _resize(options: Options) -> tuple[Resize | None, Options]:
    """The first module of a network with the option `resolution`, and the options without it."""
    resize = Resize(options["resolution"]) if "resolution" in options else None
    return resize, _without(options, "resolution")


def _without(options: Options, name: str) -> Options:
    return {key: value for key, value in options.items() if key != name}


def classifier_with_macs(
    network: str, options: Options, *, channels: int, classes: int, resolution: int, target_macs: float
) -> dict[str, Any]:
    """`options` with the smallest `width` whose classifier has at least target_macs MACs.

    It makes the single network that costs what a collaboration costs on average, to compare with; whole channels make
    steps of up to a quarter in small networks, and the baseline must not have less. Raises ValueError for another
    network than small_cnn, or when no width reaches the target.
    """
    if network != "small_cnn":
        raise ValueError(f"network: {network!r} is not allowed here; only small_cnn has a width to search")

    def macs_at(thousandths: int) -> int:
        candidate = {**options, "width": thousandths / 1000}
        with torch.device("meta"):
            built = build_classifier(
                network,
                candidate,
                channels=channels,
                classes=classes,
                mean=[0.0] * channels,
                std=[1.0] * channels,
                seed=0,
            )
        return count_macs(built, channels=channels, resolution=resolution)

    low, high = 1, 64_000  # MACs never fall with width: bisection for the narrowest network that reaches the target
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if macs_at(middle) >= target_macs else (middle + 1, high)
    if macs_at(low) < target_macs:
        raise ValueError(f"target_macs: {target_macs} is not allowed; the widest {network} has {macs_at(low)} MACs")
    return {**options, "width": low / 1000}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # the CPU generator alone: torch.manual_seed would also reset the accelerators' generators, which are not saved here
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

"""A trained collaboration outside training: a folder of weights that any plain Python process can load.

    DIR/config.json            everything needed to rebuild the networks and to answer, and the sha256 of each file
    DIR/delegator.safetensors  DIR/expert-0000.safetensors  ...

    model = CollaborationOfExperts.from_pretrained("DIR")
    answer = model(model.prepare(["photo.jpg"]))      # or uint8 images; see coe_dist.coe.collaboration
    model.classes[answer.probabilities_NC[0].argmax()]

A folder may come from anywhere: nothing in it is run, no name in it leads out of it, and no network is allocated before
the files are known to hold it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from coe_dist.coe import backbones, collaboration
from coe_dist.coe.early_exit import NO_EXIT
from coe_dist.config import Finite, NetworkConfig, Positive, Section
from coe_dist.errors import InputError
from coe_dist.preparation import RULE, Preparation, prepare_files

CONFIG_FILE = "config.json"
FORMAT: Final = 2
_LARGEST_CONFIG = 16 * 2**20  # bytes; class names are the only long part

Count = Annotated[int, Field(ge=1)]


class WeightsFile(Section):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Count


class PreparationRecord(Section):
    """How image files become the networks' images (coe_dist/preparation.py)."""

    rule: Literal["centre 224/256, antialiased bilinear"] = RULE
    crop_all: bool
    max_resolution: Annotated[int, Field(ge=1)] | None


class PretrainedConfig(Section):
    """config.json. mean and std: per channel in 0..1; resolution: side in pixels; MACs: of one image."""

    format: Literal[2] = FORMAT  # 1 had no record of the preparation
    delegator: NetworkConfig
    experts: NetworkConfig
    count: Annotated[int, Field(ge=2, le=4096)]
    channels: Literal[1, 3]
    classes: Annotated[list[str], Field(min_length=1)]
    mean: list[Finite]
    std: list[Positive]
    resolution: Annotated[int, Field(ge=8, le=1024)]
    preparation: PreparationRecord
    threshold: Annotated[float, Field(ge=0.0, le=NO_EXIT, allow_inf_nan=False)] | None
    final: Literal["expert", "average"]
    delegator_macs: Count
    expert_macs: list[Count]
    weights: Literal["ema", "raw"] = "raw"  # of the run: the moving average of its weights, or the last step's
    files: dict[str, WeightsFile]
    run: str
    step: int
    epoch: int

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field, wanted in (("mean", self.channels), ("std", self.channels), ("expert_macs", self.count)):
            if len(getattr(self, field)) != wanted:
                raise ValueError(f"{field} must have {wanted} values")
        return self

    def build(self, name: str) -> nn.Module:
        """The network called 'delegator', or an expert, with random weights. Raises ValueError for an unknown network
        or option."""
        section = self.delegator if name == "delegator" else self.experts
        shape: dict[str, Any] = {
            "channels": self.channels,
            "classes": len(self.classes),
            "mean": self.mean,
            "std": self.std,
        }
        if name == "delegator":
            shape["experts"] = self.count
            return backbones.build_delegator(section.network, section.options, **shape, seed=0)
        return backbones.build_classifier(section.network, section.options, **shape, seed=0)


class CollaborationOfExperts(collaboration.CollaborationOfExperts):
    """The model of coe_dist.coe.collaboration, loaded from a folder; besides it knows its classes' names."""

    classes: tuple[str, ...]
    channels: int
    resolution: int  # side in pixels of the images that it was trained on
    preparation: Preparation  # of image files, as for the run's validation

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, precision: str = "weights") -> Self:
        """Loads what `coe-dist export weights` wrote, on the CPU and in eval mode.

        precision, and the methods `fused` and `compiled`, which make it faster: see coe_dist.coe.collaboration.

        Raises InputError naming the file, and the tensor, that is missing, not expected, damaged or of another shape;
        ValueError for another precision.
        """
        folder = Path(folder)
        config = read_config(folder)
        networks = []
        for stem, name in (("delegator", "delegator"), *((s, "expert") for s in expert_stems(config.count))):
            networks.append(_load(folder / f"{stem}.safetensors", config, name))
        model = cls(
            networks[0],
            networks[1:],
            threshold=config.threshold,
            final=config.final,
            delegator_macs=config.delegator_macs,
            expert_macs=config.expert_macs,
            precision=precision,
        )
        model.classes, model.channels, model.resolution = tuple(config.classes), config.channels, config.resolution
        record = config.preparation
        model.preparation = Preparation(config.channels, config.resolution, record.crop_all, record.max_resolution)
        return model.eval()

    def prepare(self, files: Sequence[str | Path]) -> torch.Tensor:
        """The images of files of any kind and size, as evaluation prepares them: uint8 [N, channels, resolution,
        resolution] on the CPU. Raises what Pillow raises for a file that it cannot read, ValueError for unusable
        pixels."""
        return torch.from_numpy(prepare_files(files, self.preparation))

    def forward(self, images_NCHW: torch.Tensor) -> collaboration.Answer:
        """See coe_dist.coe.collaboration; images uint8 [N, channels, H, W], normalised inside.

        Raises InputError for another dtype (floats in 0 to 1 would be answered wrongly without a word) or shape.
        """
        if images_NCHW.dtype != torch.uint8 or images_NCHW.ndim != 4 or images_NCHW.shape[1] != self.channels:
            kind = str(images_NCHW.dtype).removeprefix("torch.")
            raise InputError(
                f"images: {kind} {list(images_NCHW.shape)} is not allowed; "
                f"give uint8 [N, {self.channels}, {self.resolution}, {self.resolution}] with values from 0 to 255"
            )
        return super().forward(images_NCHW)


def expert_stems(count: int) -> list[str]:
    return [f"expert-{expert:04d}" for expert in range(count)]


def read_config(folder: Path) -> PretrainedConfig:
    """Reads config.json and checks the folder against it: names, count, size and sha256 of the weights' files.

    Raises InputError naming the first file or field that is not allowed.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; `coe-dist export weights` makes such a folder")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise InputError(f"{path}: {path.stat().st_size} bytes are not allowed; give at most {_LARGEST_CONFIG}")
    try:
        config = PretrainedConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",):
            raise InputError(
                f"{path}: format: {first['input']!r} is not allowed; this version reads format {FORMAT}, which "
                "says how images are prepared; export the run again"
            ) from None
        field = ".".join(map(str, first["loc"])) or "content"
        raise InputError(f"{path}: {field}: {' '.join(first['msg'].split())}") from None
    expected = {f"{stem}.safetensors" for stem in ("delegator", *expert_stems(config.count))}
    for place, names in ((path, set(config.files)), (folder, {file.name for file in folder.glob("*.safetensors")})):
        if missing := sorted(expected - names):
            raise InputError(f"{place}: {missing[0]} is missing; {config.count} experts are expected")
        if extra := sorted(names - expected):
            raise InputError(f"{place}: {extra[0]!r} is not expected; {config.count} experts are")
    for name, file in config.files.items():
        _verify(folder / name, file)
    return config


def _verify(path: Path, file: WeightsFile) -> None:
    if not path.is_file():
        raise InputError(f"{path}: not a file")
    if path.stat().st_size != file.bytes:
        raise InputError(f"{path}: {path.stat().st_size} bytes are not allowed; {CONFIG_FILE} says {file.bytes}")
    with path.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
            raise InputError(f"{path}: its content does not match its sha256 in {CONFIG_FILE}; it is damaged")


def _load(path: Path, config: PretrainedConfig, name: str) -> nn.Module:
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    try:
        _check_fit(path, _blueprint(lambda: config.build(name)), weights)
        network = config.build(name)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        field = "delegator" if name == "delegator" else "experts"
        raise InputError(f"{path.parent / CONFIG_FILE}: {field}.{error}") from None
    network.to(dtype=weights["class_head.weight"].dtype)
    network.load_state_dict(weights)
    return network


def _blueprint(build: Callable[[], nn.Module]) -> nn.Module:
    """The network without memory for its weights: a configuration may ask for any size."""
    try:
        with torch.device("meta"):
            return build()
    except Exception:  # some constructors of timm read values back; those networks are built at once
        return build()


def _check_fit(path: Path, network: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Every tensor, no other, each of its shape; floats in the dtype of the class head, float32 or float64."""
    own = network.state_dict()
    if missing := sorted(set(own) - set(weights)):
        raise InputError(f"{path}: the tensor {missing[0]} is missing")
    if extra := sorted(set(weights) - set(own)):
        raise InputError(f"{path}: the tensor {extra[0]} is not expected")
    floats = weights["class_head.weight"].dtype
    if floats not in (torch.float32, torch.float64):
        raise InputError(f"{path}: class_head.weight: {floats} is not allowed; give float32 or float64")
    for name, value in own.items():
        dtype = floats if value.dtype.is_floating_point else value.dtype
        if weights[name].shape != value.shape or weights[name].dtype != dtype:
            raise InputError(
                f"{path}: {name}: {list(weights[name].shape)} {weights[name].dtype} is not allowed; "
                f"the network has {list(value.shape)} {dtype}"
            )

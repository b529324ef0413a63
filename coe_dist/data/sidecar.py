"""The .json beside each .beton: what is in it, and whether the file is whole."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coe_dist.errors import InputError
from coe_dist.preparation import Preparation

SPLITS = ("train", "validation", "test")
_HEADER = struct.Struct("<HHIQQ")  # FFCV's: version, fields, page size, samples, place of the allocation table
_FFCV_FORMAT = 2


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quarantined(_Record):
    """A file, relative to the source's folder, that could not be read, and why."""

    file: str
    reason: str


class WriteOptions(_Record):
    """What the stored pixels depend on besides the source."""

    max_resolution: int | None = None
    jpeg_fraction: float = 0.0
    jpeg_quality: int = 90
    limit: int | None = None
    labels: str | None = None  # sha256 of the files that label images lying in one folder


class SplitInfo(_Record):
    """One split. `shape` is (H, W) in pixels when all images share it; `mean` and `std` are per channel in 0..1, over
    the train split (every image weighs the same), and the same in all splits; `bytes` and `sha256` are the .beton's."""

    format: Literal[1] = 1
    source: str
    split: str
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    count: Annotated[int, Field(ge=1)]
    counts_per_class: tuple[int, ...]
    channels: Literal[1, 3]
    shape: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    root: str | None = None  # the folder that was read
    quarantined: tuple[Quarantined, ...] = ()
    written: WriteOptions = WriteOptions()
    bytes: int
    sha256: str

    def preparation(self, resolution: int) -> Preparation:
        """How the loaders prepare this split's images for evaluation at `resolution`."""
        cropped = self.shape != (resolution, resolution)
        return Preparation(self.channels, resolution, cropped, self.written.max_resolution)

    @model_validator(mode="after")
    def _consistent(self) -> SplitInfo:
        if len(self.counts_per_class) != len(self.classes) or sum(self.counts_per_class) != self.count:
            raise ValueError("counts_per_class does not fit classes and count")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError("mean and std need one value per channel")
        return self


def sidecar_path(beton: Path) -> Path:
    return beton.with_suffix(".json")


def read_sidecar(beton: Path, *, verify: bool = False) -> SplitInfo:
    """Reads the side-car of a .beton and checks the file against it: size and header, with `verify` every byte.

    Raises InputError when either file is missing, broken or does not belong to the other.
    """
    beton = Path(beton)
    path = sidecar_path(beton)
    if not beton.is_file():
        raise InputError(f"{beton}: no such file; `coe-dist data write` makes it")
    if not path.is_file():
        raise InputError(f"{path}: missing; {beton.name} was not written completely, write it again with --overwrite")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: not a readable side-car ({error.strerror})") from error
    info = parse_sidecar(content, str(path))
    _check_file(beton, info)
    if verify and sha256_of(beton) != info.sha256:
        raise InputError(f"{beton}: its content differs from the sha256 in {path.name}; write it again")
    return info


def parse_sidecar(content: bytes, place: str) -> SplitInfo:
    """A side-car from its content. Raises InputError, which names its place, where it is broken."""
    try:
        return SplitInfo.model_validate(json.loads(content))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "side-car"
        raise InputError(f"{place}: {field}: {first['msg']}; write the data set again with --overwrite") from error
    except ValueError as error:
        raise InputError(
            f"{place}: not a readable side-car ({error}); write the data set again with --overwrite"
        ) from error


def _check_file(beton: Path, info: SplitInfo) -> None:
    size = beton.stat().st_size
    if size != info.bytes:
        raise InputError(f"{beton}: {size} bytes, but {info.bytes} in its side-car; damaged, write it again")
    with beton.open("rb") as file:
        head = file.read(_HEADER.size)
    version, _, _, samples, table = _HEADER.unpack(head) if len(head) == _HEADER.size else (0, 0, 0, 0, 0)
    if version != _FFCV_FORMAT or samples != info.count or not 0 < table < size:
        raise InputError(
            f"{beton}: its header is not that of an FFCV file with {info.count} images; damaged, write it again"
        )


def check_labels(beton: Path, info: SplitInfo, labels_N: npt.NDArray[np.int64]) -> None:
    """Every label of the file must be one of the classes of its side-car, and as often as it says. Raises InputError
    naming the first image."""
    classes = len(info.classes)
    outside_N = (labels_N < 0) | (labels_N >= classes)
    if outside_N.any():
        position = int(outside_N.argmax())
        raise InputError(
            f"{beton}: label {labels_N[position]} of image {position} is not allowed; "
            f"the side-car names {classes} classes, give 0 to {classes - 1}"
        )
    if (counts := tuple(np.bincount(labels_N, minlength=classes).tolist())) != info.counts_per_class:
        raise InputError(
            f"{beton}: its images per class are {list(counts)}, the side-car says {list(info.counts_per_class)}; "
            "write the data set again"
        )


def write_sidecar(beton: Path, info: SplitInfo) -> None:
    """Atomic: the side-car appears whole or not at all."""
    path = sidecar_path(beton)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(info.model_dump(mode="json"), file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

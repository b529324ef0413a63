"""The lists beside a .beton: what each sample was made from and the checksum of its bytes, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from coe_dist.data.sidecar import Quarantined
from coe_dist.errors import InputError


class Sample(NamedTuple):
    """`file` is relative to the source's folder; `checksum` is the CRC-32 of the stored bytes."""

    file: str
    checksum: int


def samples_path(beton: Path) -> Path:
    return beton.with_suffix(".samples.tsv")


def quarantine_path(beton: Path) -> Path:
    return beton.with_suffix(".quarantine.tsv")


def write_samples(beton: Path, samples: Sequence[Sample]) -> None:
    """One line a sample, in order: its checksum in eight hex digits, a tab, its file."""
    _write(samples_path(beton), [f"{sample.checksum:08x}\t{sample.file}" for sample in samples])


def read_samples(beton: Path, count: int) -> list[Sample] | None:
    """None where the list is missing. Raises InputError where it does not fit a file of `count` images."""
    path = samples_path(beton)
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        samples = [Sample(line[9:], int(line[:8], 16)) for line in lines]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a list of samples ({error})") from error
    if len(samples) != count:
        raise InputError(f"{path}: lists {len(samples)} samples, the file has {count}")
    return samples


def write_quarantine(beton: Path, quarantined: Sequence[Quarantined]) -> None:
    """One line a file left out: its name, a tab, the reason. No file where nothing was."""
    if quarantined:
        _write(quarantine_path(beton), [f"{item.file}\t{item.reason}" for item in quarantined])
    else:
        quarantine_path(beton).unlink(missing_ok=True)


def _write(path: Path, lines: Sequence[str]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(path)

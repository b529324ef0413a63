"""Is a .beton whole? Every image is read, compared with its checksum and decoded."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from coe_dist.data.progress import progress_bar
from coe_dist.data.samples import Sample, read_samples
from coe_dist.data.sidecar import SplitInfo, read_sidecar, sha256_of
from coe_dist.data.stored import StoredImages
from coe_dist.errors import InputError

_AT_ONCE = 4096


def verify(beton: Path, *, workers: int = 1, progress: bool = False) -> dict[str, Any]:
    """Checks the file against its side-car and its list of samples, and decodes every image, in `workers` threads.

    Returns {"file", "images", "whole" (bool), "problems" (of the file as a whole, text), "damaged": [{"sample", "file",
    "reason"}]}; a sample's file is None where the list is missing. Raises InputError when there is no such file.
    """
    beton = Path(beton)
    if not beton.is_file():
        raise InputError(f"{beton}: no such file; `coe-dist data write` makes it")
    problems: list[str] = []
    damaged: list[dict[str, Any]] = []
    count = 0
    try:
        info = read_sidecar(beton)
        stored, count = StoredImages(beton), info.count
        samples = read_samples(beton, count)
    except InputError as error:
        problems.append(str(error))
    else:
        damaged = _damaged(stored, info, samples, workers, progress)
        if not damaged and sha256_of(beton) != info.sha256:
            problems.append(f"{beton}: its content outside the images is not what was written; write it again")
    whole = not problems and not damaged
    return {"file": str(beton), "images": count, "whole": whole, "problems": problems, "damaged": damaged}


def show_verified(result: dict[str, Any]) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for problem in result["problems"]:
        console.print(problem)
    for item in result["damaged"]:
        name = "" if item["file"] is None else f" ({item['file']})"
        console.print(f"sample {item['sample']}{name}: {item['reason']}")
    if not result["problems"]:
        state = "all whole" if result["whole"] else f"{len(result['damaged'])} damaged; write the file again"
        console.print(f"{result['file']}: {result['images']:,} images, {state}")


def _damaged(
    stored: StoredImages, info: SplitInfo, samples: list[Sample] | None, workers: int, progress: bool
) -> list[dict[str, Any]]:
    def fault(index: int) -> str | None:
        label = int(stored.labels_N[index])
        if not 0 <= label < len(info.classes):
            return f"label {label} is not one of the {len(info.classes)} classes"
        try:
            stored.pixels(index)
            if samples is not None and zlib.crc32(stored.bytes_of(index).data) != samples[index].checksum:
                return "its bytes are not those that were written"
        except ValueError as error:
            return str(error)
        return None

    damaged: list[dict[str, Any]] = []
    with (
        ThreadPoolExecutor(workers, "verify") as pool,
        progress_bar(f"{stored.beton.name}: verifying", len(stored), progress) as on_progress,
    ):
        for start in range(0, len(stored), _AT_ONCE):  # the pool takes in all that it is given at once
            end = min(start + _AT_ONCE, len(stored))
            for index, reason in enumerate(pool.map(fault, range(start, end)), start):
                if reason is not None:
                    file = None if samples is None else samples[index].file
                    damaged.append({"sample": index, "file": file, "reason": reason})
            on_progress(end)
    return damaged

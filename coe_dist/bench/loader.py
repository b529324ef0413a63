"""Our FFCV loader against torchvision's ImageFolder and DataLoader: images per second, CPU seconds per 1,000 images.

Both give shuffled uint8 batches of the same images, cropped at random (area 0.35 to 1), resized and mirrored;
torchvision reads the original JPEGs, ours the .beton written from them. Both have as many workers as there are usable
cores: processes there, threads here. Whole epochs are timed in turn, after one each that warms up; CPU seconds are
those of this process and its workers. ratio = peer seconds / our seconds, cpu_ratio the same for CPU seconds. The first
case is the form of the ImageNet files: at most 500 pixels, half of the images JPEG, half raw. "parts" are
milliseconds per image.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from coe_dist.bench.loader_parts import file_parts, stored_parts
from coe_dist.bench.loader_peers import torchvision_loader
from coe_dist.bench.ranks import Seconds, summary
from coe_dist.bench.record import Record, case, machine, versions
from coe_dist.config import AugmentationConfig
from coe_dist.data.beton import write_file
from coe_dist.data.loader import SplitLoader
from coe_dist.data.synthetic import write_synthetic_images
from coe_dist.resources import usable_cores

IMAGES, BATCH, CLASSES = 2048, 128, 4
CASES = [(500, 0.5, 176), (500, 0.5, 224), (256, 0.5, 176), (500, 1.0, 176), (500, 0.0, 176)]
PEERS = {"torchvision": "pil", "torchvision_tensor": "tensor"}
AUGMENTATION = AugmentationConfig(flip=True, shift=0, random_resized_crop=True)


def run_loader_bench(*, quick: bool = False) -> Record:
    """Measures all cases; quick: few images, one case. record.py has the answer's form."""
    images, repeats = (96, 2) if quick else (IMAGES, 5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="coe-dist-loader-bench-") as scratch:
            folder = benchmark_images(images, Path(scratch) / "images" if quick else None) / "train"
            cases = [
                _case(folder, Path(scratch), *form, images=images, repeats=repeats)
                for form in (CASES[:1] if quick else CASES)
            ]
    finally:
        torch.set_num_threads(threads)
    packages = versions("coe-dist", "ffcv", "torchvision", "torch", "pillow", "numba")
    return {"name": "loader", "machine": machine(), "versions": packages, "cases": cases}


def benchmark_images(count: int, folder: Path | None = None) -> Path:
    """`count` images for training in four classes, and one image a class in FOLDER/val; made once, kept in the user's
    cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coe_dist"
    folder = folder or cache / f"loader-benchmark-{count}"
    return write_synthetic_images(folder, {"train": count, "val": CLASSES}, classes=CLASSES)


def _case(
    folder: Path, scratch: Path, max_resolution: int, fraction: float, resolution: int, *, images: int, repeats: int
) -> Record:
    workers = usable_cores()
    beton = scratch / "train.beton"
    write_file(
        folder, beton, max_resolution=max_resolution, jpeg_fraction=fraction, workers=workers, overwrite=beton.exists()
    )
    loader = SplitLoader(
        beton,
        global_batch=BATCH,
        rank=0,
        world_size=1,
        resolution=resolution,
        seed=0,
        train=True,
        augmentation=AUGMENTATION,
        threads=workers,
    )
    peers = {name: torchvision_loader(folder, resolution, BATCH, workers, form=form) for name, form in PEERS.items()}
    works: dict[str, Callable[[int], int]] = {
        "ours": lambda epoch: sum(len(batch.labels_B) for batch in loader.epoch(epoch)),
        **{name: _epoch_of(peer) for name, peer in peers.items()},
    }
    taken: dict[str, list[Seconds]] = {name: [] for name in works}
    for epoch in range(repeats + 1):
        for name, work in works.items():
            seconds = _timed_epoch(work, epoch, images)
            if epoch:
                taken[name].append(seconds)
    loader.close()
    figures = {name: _figures(seconds, images) for name, seconds in taken.items()}
    ours = figures.pop("ours")
    ours["bytes_per_image"] = beton.stat().st_size / images
    ours["parts"] = stored_parts(beton, resolution)
    for peer in figures.values():
        peer["cpu_ratio"] = peer["cpu_seconds"] / ours["cpu_seconds"]
    figures["torchvision"]["parts"] = file_parts(sorted(folder.rglob("*.JPEG")), resolution)
    fields = {
        "max_resolution": max_resolution,
        "jpeg_fraction": fraction,
        "resolution": resolution,
        "images": images,
        "workers": workers,
    }
    return case(fields, ours, figures)


def _epoch_of(peer: Any) -> Callable[[int], int]:
    return lambda epoch: sum(len(labels_B) for _, labels_B in peer)


def _timed_epoch(work: Callable[[int], int], epoch: int, images: int) -> Seconds:
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    count = work(epoch)
    if count != images:
        raise AssertionError(f"loader bench: an epoch gave {count} images, not {images}")
    return time.perf_counter() - start, _cpu_seconds() - cpu_start


def _cpu_seconds() -> float:
    """Of this process and of its living children; the peers' workers live on from epoch to epoch."""
    children = (child.cpu_times() for child in psutil.Process().children(recursive=True))
    return time.process_time() + sum(times.user + times.system for times in children)


def _figures(seconds: list[Seconds], images: int) -> Record:
    figures = summary(seconds)
    figures["images_per_second"] = images / figures["seconds"]
    figures["cpu_seconds_per_1000"] = 1000 * figures["cpu_seconds"] / images
    return figures

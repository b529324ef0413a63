"""A dress rehearsal of a long training: the real commands and the real configuration, with everything on, in minutes.

1. Made images, some of every class, and a teacher of random weights: nothing is learned from them, everything runs.
2. `coe-dist data write` of the images, as of ImageNet's.
3. `coe-dist train` of the shrunk configuration, which gets a SIGTERM in the middle and has to end with exit code 75.
4. `coe-dist train` again, to the end, and `coe-dist evaluate`.
5. What they wrote is looked at (rehearsal_checks.py).
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from coe_dist.config import RunConfig, load_config
from coe_dist.data.sidecar import SplitInfo, read_sidecar
from coe_dist.errors import EXIT_BAD_INPUT, EXIT_OK, InputError, TrainingError
from coe_dist.orchestration.rehearsal_checks import Check, Ends, checks_of
from coe_dist.orchestration.rehearsal_config import shrunk
from coe_dist.orchestration.signals import own_signals
from coe_dist.resources import usable_cores
from coe_dist.tracking.journal import read_metrics

SCALE = 0.5  # of ImageNet's sides
_LOOK_SECONDS = 0.2
_END_SECONDS = 60.0


def rehearse(
    path: Path, overrides: Sequence[str] = (), *, folder: Path, classes: int = 1000, per_class: int = 3
) -> list[Check]:
    """Rehearses the training of the configuration at `path`; `overrides` are of the shrunk one.

    folder: for images, teacher and the shrunk configuration; images that are there already are kept. per_class:
    images of a class in train/, a part of which becomes validation, and one in val/ beside. An earlier rehearsal's run
    is replaced. Raises InputError for a configuration that is not allowed, TrainingError when a command fails.
    """
    if classes < 2:
        raise InputError(f"--classes: {classes} is not allowed; give a whole number of at least 2")
    if per_class < 2:
        raise InputError(f"--per-class: {per_class} is not allowed; give a whole number of at least 2")
    place = folder / f"{classes}x{per_class}"
    config_file, data = place / "rehearsal.yaml", place / "data"
    with own_signals():
        settings = shrunk(
            load_config(path), data=data, weights=place / "teacher.safetensors", classes=classes, cores=usable_cores()
        )
        place.mkdir(parents=True, exist_ok=True)
        config_file.write_text(settings.to_yaml())
        settings = load_config(config_file, overrides)
        config_file.write_text(settings.to_yaml())
        write_images(place / "images", classes, per_class)
        source = ("--source", "imagefolder", "--root", str(place / "images"))
        _must("data", "write", *source, "--out", str(data), "--max-resolution", "500", "--jpeg-fraction", "0.5")
        info = read_sidecar(data / "train.beton")
        write_teacher(settings, info)
        stopped = train_until(config_file, settings.run_dir, middle_of(settings, info.count))
        ended = _run("train", str(config_file))
        evaluated = _run("evaluate", str(settings.run_dir)) if ended == EXIT_OK else None
    return checks_of(settings, Ends(stopped, ended, evaluated))


def write_images(folder: Path, classes: int, per_class: int) -> None:
    from coe_dist.data.synthetic import write_synthetic_images

    print(f"{classes * (per_class + 1):,} made images of {classes:,} classes in {folder}", flush=True)
    write_synthetic_images(folder, {"train": classes * per_class, "val": classes}, classes=classes, scale=SCALE)


def write_teacher(config: RunConfig, info: SplitInfo) -> None:
    """Random weights of the teacher that the configuration names, where its file is to be. Raises InputError for a
    network that there is not."""
    import torch
    from safetensors.torch import save_file

    from coe_dist.training.teacher import unlearned_teacher

    if config.distillation is None:
        return
    torch.manual_seed(config.seed)
    teacher = unlearned_teacher(config, info)
    save_file(teacher.network.network.state_dict(), config.distillation.weights)


def middle_of(config: RunConfig, images: int) -> int:
    """The optimizer step after which training is stopped, of so many images: the first of the second epoch, when
    piecewise linear units have begun to learn and images have grown."""
    return -(-min(images, config.data.limit or images) // config.training.global_batch) + 1


def train_until(config_file: Path, run_dir: Path, step: int) -> int:
    """`coe-dist train` anew, which gets a SIGTERM when it has recorded `step`; its exit code."""
    begun = time.time()
    with _command("train", str(config_file), "--overwrite") as process:
        while process.poll() is None:
            records = (r for r in read_metrics(run_dir) if r["kind"] == "train" and r["time"] >= begun)
            if any(record["step"] >= step for record in records):
                print(f"SIGTERM after step {step}", flush=True)
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(_LOOK_SECONDS)
        return process.wait()


def _must(*arguments: str) -> None:
    code = _run(*arguments)
    if code != EXIT_OK:
        text = f"`coe-dist {' '.join(arguments[:2])}` ended with exit code {code}"
        raise InputError(text) if code == EXIT_BAD_INPUT else TrainingError(text)


def _run(*arguments: str) -> int:
    with _command(*arguments) as process:
        return process.wait()


@contextmanager
def _command(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`coe-dist ARGUMENTS`, whose output is ours; it does not outlive the block."""
    print(f"$ coe-dist {shlex.join(arguments)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "coe_dist", *arguments])
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

"""Run folders for tests: one from a real training on two ranks, and small ones made in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ranks import run_ranks
from small_data import batches_of, small_config, write_small

from coe_dist.coe.early_exit import confidence
from coe_dist.config import load_config, parse_config
from coe_dist.data.sidecar import SplitInfo
from coe_dist.inference import CollaborationOfExperts
from coe_dist.parallel.groups import create_groups
from coe_dist.training import saving
from coe_dist.training.checkpoint import Position
from coe_dist.training.chosen import Networks
from coe_dist.training.export import export_weights
from coe_dist.training.job import Job
from coe_dist.training.networks import NetworkBuilder, averages_of, collaboration_engines

CLASSES = tuple("abcdefghij")
INFO = SplitInfo(
    source="test",
    split="train",
    classes=CLASSES,
    count=10,
    counts_per_class=(1,) * 10,
    channels=1,
    shape=(28, 28),
    mean=(0.3,),
    std=(0.35,),
    bytes=1,
    sha256="0" * 64,
)


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    """uint8 [count,1,28,28] of different brightness, grain and side of the light."""
    generator = torch.Generator().manual_seed(seed)
    brightness, share = torch.rand(2, count, 1, 1, 1, generator=generator)
    ramp = torch.linspace(0, 1, 28).expand(28, 28)
    sides = torch.randint(0, 4, (count,), generator=generator)
    ramps = torch.stack([ramp, ramp.flip(1), ramp.T, ramp.T.flip(0)])[sides]
    grain = torch.rand(count, 1, 28, 28, generator=generator)
    return (255 * brightness * (share * grain + (1 - share) * ramps[:, None])).to(torch.uint8)


def small_run(
    folder: Path, experts: int, *, steps: Sequence[int] = (3,), info: SplitInfo = INFO, **sections: Any
) -> Path:
    """A run folder with a save after each of `steps`: real engines, optimizer steps on noise, momentum everywhere, and
    a selection head that uses all experts (also in the averages, where training.ema_decay asks for them). info: of the
    data set that it was trained and validated on."""
    sections = {"experts": {"count": experts, "per_sample": 3}, **sections}
    config = parse_config(small_config(folder / "no-data", folder, **sections))
    groups = create_groups(experts, timeout_seconds=60)
    delegator, hosted = collaboration_engines(config, NetworkBuilder(config, info), groups, torch.device("cpu"))
    averages = averages_of([delegator, *hosted.values()], config.training.ema_decay)
    ema = {"ema": {"decay": config.training.ema_decay, "updates": max(steps)}} if averages else {}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, max(steps) + 1):
        images = images_of(32, step).expand(-1, info.channels, -1, -1)
        labels = torch.randint(0, len(info.classes), (32,), generator=generator)
        chosen = torch.randint(0, experts, (32,), generator=generator)
        for engine in (delegator, *hosted.values()):
            output = engine(images)
            loss = F.cross_entropy(output[0] if engine is delegator else output, labels)
            if engine is delegator:
                loss = loss + F.cross_entropy(output[1], chosen)
            engine.backward(loss, last=True)
            assert engine.step()
            if averages:
                averages[engine.name].update(engine.network)
        if step in steps:
            for network in (delegator.network, *(averages[name].network for name in averages if name == "delegator")):
                _spread_selection(network, info.channels)
            saving.start(
                config.run_dir / "checkpoints",
                [delegator, *hosted.values()],
                groups,
                Position(step, 0, step, step),
                averages=averages,
                extra={
                    "config": config.model_dump(mode="json"),
                    "config_digest": config.digest(),
                    "preparation": info.preparation(config.data.resolution).record(),
                    **ema,
                },
                keep=len(steps),
            ).finish()
    return config.run_dir


def _spread_selection(network: torch.nn.Module, channels: int) -> None:
    """A selection head on the whitened main directions of the features, so that each of up to 8 experts is chosen."""
    training = network.training
    network.eval()
    with torch.no_grad():
        features = network.trunk(network.normalise(images_of(200, seed=5).expand(-1, channels, -1, -1)))
        mean = features.mean(0)
        _, strength, directions = torch.linalg.svd(features - mean, full_matrices=False)
        head = network.selection_head
        mix = torch.cat([torch.eye(4), -torch.eye(4)])[: len(head.weight)]
        head.weight.copy_(mix.to(mean.dtype) @ (directions[:4] / strength[:4, None] * 200**0.5))
        head.bias.copy_(-head.weight @ mean)
    network.train(training)


def write_loads(
    run: Path,
    load: Sequence[float],
    threshold: float | None = None,
    calibrated_for: Networks | None = None,
    step: int | None = 3,
) -> None:
    """What an evaluation on validation leaves, as far as tests need it. step: of the networks; small_run's last."""
    origin = None if calibrated_for is None else calibrated_for._asdict()
    content = {"load": list(load), "threshold": threshold, "calibrated_for": origin, "step": step}
    (run / "evaluation-validation.json").write_text(json.dumps(content))


def early_exiting_run(folder: Path) -> Path:
    """small_run of three experts that are all chosen, with names of classes and a threshold that ends 60% of
    images_of(200) early; exported, without the threshold, as <folder>/first."""
    run = small_run(folder, 3)
    (run / "details-test.json").write_text(json.dumps({"classes": CLASSES}))
    export_weights(run, folder / "first")
    with torch.no_grad():
        logits_NC, _ = CollaborationOfExperts.from_pretrained(folder / "first").delegator(images_of(200))
    write_loads(run, [0.2, 0.3, 0.5], threshold=float(confidence(logits_NC).quantile(0.6)))
    return run


def run_jobs(folder: Path) -> None:
    """On every rank: the jobs of <folder>/jobs.json; keeps each one's evaluation-test.json as result-<number>.json."""
    import torch.distributed as dist

    from coe_dist.training.worker import run_worker

    for number, content in enumerate(json.loads((folder / "jobs.json").read_text())):
        job = Job.model_validate(content)
        run_worker(job)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.copy(Path(job.run_dir) / "evaluation-test.json", folder / f"result-{number}.json")


def run_on_two_ranks(folder: Path, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Runs the jobs one after the other; returns the content of evaluation-test.json after each."""
    (folder / "jobs.json").write_text(json.dumps([job.model_dump(mode="json") for job in jobs]))
    run_ranks(2, "trained_run:run_jobs", folder)
    return [json.loads((folder / f"result-{number}.json").read_text()) for number in range(len(jobs))]


def job_of(run: Path, task: str, *overrides: str) -> Job:
    return Job(task=task, config=load_config(run / "config.yaml", overrides), run_dir=str(run))  # type: ignore[arg-type]


def real_run(base: Path) -> Path:
    """Three experts, two epochs of 101 images of Fashion-MNIST (in <base>/real/data), trained on two ranks; once per
    `base`, for which tests give their session's temporary folder."""
    folder = base / "real"
    config = parse_config(small_config(folder / "data", folder))
    if not folder.exists():
        config.run_dir.mkdir(parents=True)
        write_small(folder / "data")
        (config.run_dir / "config.yaml").write_text(config.to_yaml())
        run_on_two_ranks(folder, [job_of(config.run_dir, "train")])
    return config.run_dir


def answers_of(model: CollaborationOfExperts, data: Path) -> tuple[int, float, list[float]]:
    """The model by itself on the test split: images, top-1, and the fraction of them that each expert is chosen for."""
    images, right, chosen = 0, 0, torch.zeros(len(model.experts), dtype=torch.int64)
    for batch in batches_of(data / "test.beton", model.resolution, 37):
        answer = model(batch.images_BCHW)
        images += len(batch.labels_B)
        right += int((answer.probabilities_NC.argmax(1) == batch.labels_B).sum())
        chosen += torch.bincount(answer.expert_N, minlength=len(chosen))
    return images, right / images, (chosen / images).tolist()

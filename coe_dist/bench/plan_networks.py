"""What the networks, their engines and the loader of a configuration take on this machine (see plan_rates.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F

from coe_dist.bench.ranks import slowest_seconds
from coe_dist.bench.record import Record
from coe_dist.coe import modules, pwlu
from coe_dist.config import RunConfig
from coe_dist.data.sidecar import SplitInfo
from coe_dist.parallel.groups import Group, Groups
from coe_dist.planner.devices import loader_seconds
from coe_dist.planner.layout import Layout
from coe_dist.planner.rates import Cost
from coe_dist.storage.datasets import copied_beton
from coe_dist.training.engines import NetworkEngine, wide
from coe_dist.training.networks import NetworkBuilder, averages_of, engine_for
from coe_dist.training.teacher import unlearned_teacher

LOADER_IMAGES = 2048  # of each rank, at most
_MOST_EXPERTS = 4  # enough for their activations to displace each other, as a step's do
_LONGEST = 1.0  # seconds that one pass may take; then fewer rows are measured


@dataclass(frozen=True)
class Setting:
    """What is measured, and where."""

    config: RunConfig
    info: SplitInfo
    groups: Groups
    device: torch.device
    planned: int  # workers of the plan; `groups` may have fewer
    between: Callable[[], object] = lambda: None  # before each timed call: other work, so that caches are as in a step

    def layout(self, batch: int, world: int) -> Layout:
        """Of `world` ranks on one machine."""
        config = self.config
        image_bytes = self.info.channels * config.data.resolution**2
        return Layout(config.experts.count, config.experts_per_sample, batch, world, image_bytes, world)

    def seconds(self, work: Callable[[], object]) -> float:
        """See slowest_seconds. Collective."""
        return slowest_seconds(work, prepare=self.between, wait=self._wait)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def affine(small: tuple[float, float], large: tuple[float, float]) -> Cost:
    """The line through two (rows, seconds); where noise makes it fall, or start below zero, the nearest that does
    not."""
    (rows, seconds), (more, longer) = small, large
    each = max(0.0, (longer - seconds) / (more - rows)) if more > rows else 0.0
    each = min(each, longer / more)
    return Cost(max(0.0, longer - each * more), each)  # rounding alone makes it negative


@dataclass(frozen=True)
class Engines:
    """Of training, but each reduces over nobody: the delegator and some of the experts that a rank hosts."""

    delegator: NetworkEngine
    experts: list[NetworkEngine]


def build_engines(setting: Setting) -> Engines:
    """Collective."""
    config, builder = setting.config, NetworkBuilder(setting.config, setting.info)
    hosted = int(setting.layout(config.micro_batch, setting.planned).hosted.max())
    rate = config.training.optimizer.learning_rate / 1000  # many steps on noise must stay finite

    def engine(name: str, network: torch.nn.Module) -> NetworkEngine:
        pwlu.realign(network)  # most of training is in its second phase
        alone = Group(f"{name} alone", (setting.groups.rank,), None)
        return engine_for(name, network, config, alone, setting.groups, setting.device, rate)

    experts = [engine(f"expert {expert}", builder.expert(expert)) for expert in range(min(hosted, _MOST_EXPERTS))]
    engines = Engines(engine("delegator", builder.delegator()), experts)
    torch.set_num_threads(config.workers.threads)  # DeepSpeed changes it
    return engines


def measure_networks(setting: Setting, engines: Engines) -> Record:
    """Costs of the delegator and of an expert, seconds of their engines' steps, bytes of the delegator. Collective."""
    layout = setting.layout(setting.config.micro_batch, setting.planned)
    figures: Record = {}
    for name, group, others, rows in (
        ("delegator", [engines.delegator], engines.experts, layout.images),
        ("expert", engines.experts, [engines.delegator], setting.config.experts.share * layout.rows_of_expert),
    ):
        there = replace(setting, between=passes(setting, others, 8))
        figures[name] = asdict(_network_cost(there, group, int(rows.max()) + 1))
        ready = replace(setting, between=passes(setting, group, 4))
        figures[f"{name}_step"] = ready.seconds(_steps(group, setting.config.training.ema_decay)) / len(group)
    if setting.config.distillation is not None:
        figures["teacher"] = asdict(_teacher_cost(setting, engines, int(layout.images.max()) + 1))
    figures["delegator_bytes"] = sum(p.numel() * p.element_size() for p in engines.delegator.network.parameters())
    return figures


def _teacher_cost(setting: Setting, engines: Engines, rows: int) -> Cost:
    """Of its answers to so many images, with random weights."""
    teacher = unlearned_teacher(setting.config, setting.info).to(setting.device)
    side = setting.config.data.resolution
    images = torch.zeros(max(rows, 2), setting.info.channels, side, side, dtype=torch.uint8, device=setting.device)
    there = replace(setting, between=passes(setting, engines.experts, 8))
    few, many = max(1, len(images) // 4), len(images)
    small, large = (there.seconds(lambda n=n: teacher.hints(images[:n])) for n in (few, many))  # type: ignore[misc]
    return affine((few, small), (many, large))


def _steps(engines: list[NetworkEngine], ema_decay: float | None) -> Callable[[], None]:
    averages = averages_of(engines, ema_decay)

    def work() -> None:
        for engine in engines:
            engine.step()
            if averages:
                averages[engine.name].update(engine.network)

    return work


def _network_cost(setting: Setting, engines: list[NetworkEngine], rows: int) -> Cost:
    """Of one of them, at the rows of the run and at a quarter of them, or at fewer where those would take too long."""
    few = setting.seconds(passes(setting, engines, 8))
    large = max(8, min(rows, int(8 * _LONGEST / few)))
    small = max(2, large // 4)
    each = {n: setting.seconds(passes(setting, engines, n)) / len(engines) for n in (small, large)}
    return affine((small, each[small]), (large, each[large]))


def passes(setting: Setting, engines: list[NetworkEngine], rows: int) -> Callable[[], None]:
    """Forward and loss of all engines on `rows` noisy images, then backward of all, as experts do in a step."""
    config, device = setting.config, setting.device
    side, experts, k = config.data.resolution, config.experts.count, config.experts_per_sample
    generator = torch.Generator().manual_seed(rows)
    shape = (rows, setting.info.channels, side, side)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    labels = torch.randint(0, len(setting.info.classes), (rows,), generator=generator).to(device)
    experts_Bk = torch.rand(rows, experts, generator=generator).argsort(1)[:, :k].to(device)
    labels_Bk = F.one_hot(torch.zeros(rows, dtype=torch.int64), k).float().to(device)
    weights = torch.ones(rows, device=device)

    def loss_of(engine: NetworkEngine) -> torch.Tensor:
        output = engine(images)
        logits = wide(output[0] if isinstance(output, tuple) else output)
        losses = F.cross_entropy(logits, labels, reduction="none")
        if isinstance(output, tuple):
            losses = losses + modules.selection_losses(
                wide(output[1]), experts_Bk, labels_Bk, rule=config.router.labels
            )
        return (losses * weights).sum() / rows

    def work() -> None:
        for engine in engines:
            engine.zero_grad()
        for engine, loss in [(engine, loss_of(engine)) for engine in engines]:
            engine.backward(loss, last=True)

    return work


def measure_loader(setting: Setting) -> Record:
    """Processor seconds of all reading threads for an image; the table's figure where the data set is not there yet.
    Collective only in that all ranks read at once."""
    data, beton = setting.config.data, copied_beton(setting.config.data, "train")
    if not beton.is_file():
        return {"loader_seconds_per_image": loader_seconds(setting.config)}
    from coe_dist.data.loaders import open_loader

    images = LOADER_IMAGES * setting.groups.world.size
    loader = open_loader(
        data.loader,
        beton,
        global_batch=setting.config.micro_batch,
        rank=setting.groups.rank,
        world_size=setting.groups.world.size,
        resolution=data.resolution,
        seed=setting.config.seed,
        train=True,
        augmentation=data.augmentation,
        threads=data.loader_threads,
        limit=min(images, data.limit or images),
    )
    taken = []
    for epoch in range(3):
        start = time.process_time()
        seen = sum(len(batch.labels_B) for batch in loader.epoch(epoch))
        taken.append((time.process_time() - start) / max(1, seen))
    loader.close()
    return {"loader_seconds_per_image": min(taken[1:])}

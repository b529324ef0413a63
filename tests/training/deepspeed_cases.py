"""Runs on two ranks: several DeepSpeed engines in one process, with and without our guard around them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel.parity_cases import build_step, largest_error, run_case
from reference import Case, batch_of
from torch import nn
from training.checkpoint_cases import engines_of, train

from coe_dist.coe.backbones import build_classifier
from coe_dist.config import OptimizerConfig, TrainingConfig
from coe_dist.data.order import share
from coe_dist.parallel.batchnorm import split_batchnorm
from coe_dist.parallel.groups import Group, Groups, create_groups
from coe_dist.training.deepspeed_engine import DeepSpeedEngine, NetworkGroups, prepare_deepspeed
from coe_dist.training.engines import build_engine
from coe_dist.training.optim import build_optimizer
from coe_dist.training.step import MicroBatch, StepSums

STAGES = (0, 1, 2)


def trap_case(stage: int) -> Case:
    """Two experts on two ranks: networks of the same shape, each on a rank of its own, and the delegator on both."""
    return Case(2, 2, 2, engine="deepspeed", zero_stage=stage, batchnorm="local", steps=3)


@contextmanager
def without_guard() -> Iterator[None]:
    original = DeepSpeedEngine._activate
    DeepSpeedEngine._activate = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        DeepSpeedEngine._activate = original  # type: ignore[method-assign]


def trap(folder: Path, groups: Groups) -> dict[str, Any]:
    """Largest parameter error against plain torch: guarded at each stage, and at stage 0 unguarded with each network's
    groups left as the global, as if its engine had been built last; `alone`: with the averaging of a lone rank's
    gradients that our engine leaves out."""
    errors: dict[str, Any] = {}
    for stage in STAGES:
        case, expected = trap_case(stage), torch.load(folder / f"{stage}.pt", weights_only=False)
        errors[f"guarded {stage}"] = largest_error(run_case(case, groups, expected), expected)
    case, expected = trap_case(0), torch.load(folder / "0.pt", weights_only=False)
    errors["delegator last"] = unguarded(case, groups, expected, last="delegator", alone=False)
    errors["delegator last, alone"] = unguarded(case, groups, expected, last="delegator", alone=True)
    errors["expert last, alone"] = unguarded(case, groups, expected, last="expert", alone=True)
    return errors


def unguarded(case: Case, groups: Groups, expected: Any, *, last: str, alone: bool) -> tuple[float, str]:
    from deepspeed.utils import groups as deepspeed_groups

    step = build_step(case, groups, expected)
    engine: Any = step.delegator if last == "delegator" else step.experts[groups.rank]
    if alone:
        hosted: Any = step.experts[groups.rank]
        hosted.engine.enable_backward_allreduce = True
    with without_guard():
        deepspeed_groups.mpu = engine._mpu
        train(case, groups, step, 0, case.steps)
        return largest_error(step, expected)


def rows_on_one_rank(groups: Groups) -> dict[str, float]:
    """Largest error of a replicated network's parameters after steps in which only one of the ranks has images, by
    stage, BatchNorm mode, images and that rank; against plain torch on these images alone. `unguarded`: at stage 2,
    with gradients reduced in the order in which they come."""
    result = {}
    for batchnorm, images, rank in product(("local", "group"), (6, 1), (0, 1)):
        plain = TrainingConfig(engine="torch")
        alone = Group("alone", (groups.rank,), None)
        expected = _trained(groups, alone, plain, images, rank=groups.rank)
        for name in (*STAGES, "unguarded"):
            stage = 2 if name == "unguarded" else name
            training = TrainingConfig(zero_stage=stage, batchnorm=batchnorm)  # type: ignore[arg-type]
            found = _trained(groups, groups.world, training, images, rank=rank, guarded=name != "unguarded")
            result[f"{name} {batchnorm} {images} {rank}"] = max(
                float((found[key] - value).abs().max() / value.abs().max()) for key, value in expected.items()
            )
    return result


def _trained(
    groups: Groups, group: Group, training: TrainingConfig, images: int, *, rank: int, guarded: bool = True
) -> dict[str, Any]:
    settings = OptimizerConfig(learning_rate=0.05)
    network = build_classifier(
        "small_cnn", {"width": 0.2}, channels=1, classes=10, mean=[0.3], std=[0.3], seed=0
    ).train()
    split_batchnorm(network, training.batchnorm, group)
    engine = build_engine("one", network, build_optimizer(network, settings, 0.05), training, group, groups.alone)
    if not guarded:
        engine._in_order = False  # type: ignore[attr-defined]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(0, 256, (images, 1, 12, 12), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 10, (images,), generator=generator)
        rows = slice(0, images if groups.rank == rank else 0)
        loss = None
        if groups.rank == rank or training.batchnorm == "group":
            summed = nn.functional.cross_entropy(engine(batch[rows]), labels[rows], reduction="sum")
            loss = summed * (group.size / images)
        engine.backward(loss, last=True)
        assert engine.step()
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


class UsedHalf(nn.Module):
    """The loss does not reach `unused`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.used(rows)


def unreached(groups: Groups) -> dict[str, Any]:
    """Parameters after three steps of two micro-batches each, by engine, of a network on a rank of its own, and whether
    those that the loss does not reach moved; and what a gradient that is not finite then changes."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1)
    result: dict[str, Any] = {}
    for name in ("torch", "deepspeed"):
        network = UsedHalf()
        training = TrainingConfig(engine=name, clip_norm=0.5, optimizer=config)
        optimizer = build_optimizer(network, config, config.learning_rate)
        engine = build_engine("expert", network, optimizer, training, groups.experts[groups.rank], groups.alone)
        rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            engine.backward(engine(rows[:3]).square().sum(), last=False)
            engine.backward(engine(rows[3:]).square().sum(), last=True)
            assert engine.step()
        after = {key: value.clone() for key, value in network.state_dict().items()}
        result[name] = {key: value.tolist() for key, value in after.items()}
        result[f"{name} moved"] = not torch.equal(network.unused.weight, UsedHalf().unused.weight)
        engine.backward(engine(rows * torch.nan).sum(), last=True)
        result[f"{name} skipped"] = not engine.step() and all(
            torch.equal(value, after[key]) for key, value in network.state_dict().items()
        )
        result[f"{name} cleared"] = all(parameter.grad is None for parameter in network.parameters())
    return result


def two_gradients(groups: Groups) -> tuple[nn.Linear, float]:
    """A network whose gradient has norm 3 on rank 0 and 19 on rank 1."""
    network = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(network.weight)
    return network, (3.0, 19.0)[groups.rank]


def clipped(groups: Groups) -> dict[str, list[float]]:
    """Length of one SGD step of two networks, each on its own rank, clipped to norm 1: by our engine at each stage, and
    by DeepSpeed's own clip while another engine's groups are the global."""
    deepspeed = prepare_deepspeed()
    from deepspeed.utils import groups as deepspeed_groups

    plain = OptimizerConfig(learning_rate=1.0, momentum=0.0, weight_decay=0.0)
    group, result = groups.experts[groups.rank], {}
    for stage in STAGES:
        network, norm = two_gradients(groups)
        config = TrainingConfig(engine="deepspeed", zero_stage=stage, clip_norm=1.0, optimizer=plain)
        engine = DeepSpeedEngine(
            f"expert {groups.rank}", network, build_optimizer(network, plain, 1.0), config, group, groups.alone
        )
        engine.backward(engine(torch.tensor([[norm, 0.0, 0.0, 0.0]])).sum(), last=True)
        assert engine.step()
        result[f"ours {stage}"] = [float(network.weight.detach().norm()), engine.grad_norm]

    network, norm = two_gradients(groups)
    assert groups.alone is not None
    assert groups.world.handle is not None
    mine = NetworkGroups(groups.alone, group.ranks, groups.alone)
    native, _, _, _ = deepspeed.initialize(
        model=network,
        optimizer=build_optimizer(network, plain, 1.0),
        mpu=mine,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": 0},
            "gradient_clipping": 1.0,
        },
    )
    native.backward(native(torch.tensor([[norm, 0.0, 0.0, 0.0]])).sum())
    deepspeed_groups.mpu = NetworkGroups(groups.world.handle, groups.world.ranks, groups.alone)  # the delegator's
    native.step()
    result["deepspeed"] = [float(network.weight.detach().norm())]
    return result


def note_type(network: Any, seen: set[str]) -> None:
    network.heads[0].register_forward_hook(lambda _module, _inputs, output: seen.add(str(output.dtype)))


def bf16(groups: Groups) -> dict[str, Any]:
    """bf16 training by autocast, torch and DeepSpeed: what is bfloat16, what stays float32, and whether it learns."""
    result = {}
    for engine, stage in (("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)):
        case = Case(2, 2, 2, engine=engine, zero_stage=stage, precision="bf16", steps=12, batchnorm="group")
        seen: set[str] = set()
        step = build_step(case, groups, None)
        for network in engines_of(step):
            note_type(network.network, seen)
        losses = []
        for _ in range(case.steps):
            images, labels, ids = batch_of(case, 0, 0)
            rows = slice(*share(len(labels), groups.rank, groups.world.size))
            sums = StepSums()
            assert step.step([MicroBatch(images[rows], labels[rows], ids[rows])], sums)
            losses.append(float(sums.values["expert_loss"]) + float(sums.values["delegator_loss"]))
        states = [value for each in engines_of(step) for value in each.network.state_dict().values()]
        result[f"{engine} {stage}"] = {
            "outputs": sorted(seen),
            "stored": sorted({str(value.dtype) for value in states}),
            "finite": all(bool(torch.isfinite(value).all()) for value in states),
            "losses": [losses[0], losses[-1]],
        }
    return result


def run(folder: Path) -> None:
    groups = create_groups(2, timeout_seconds=300)
    prepare_deepspeed()
    import deepspeed.ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    result = {
        "known": "deepspeed_shm_comm" in ALL_OPS,
        "compatible": deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"],
        "trap": trap(folder, groups),
        "unreached": unreached(groups),
        "rows on one rank": rows_on_one_rank(groups),
        "clipped": clipped(groups),
        "bf16": bf16(groups),
    }
    (folder / f"result-{dist.get_rank()}.json").write_text(json.dumps(result))

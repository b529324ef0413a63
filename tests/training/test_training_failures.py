"""What must not happen silently or hang: non-finite values, experts without rows, ranks that die, tiny batches."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel.parity_cases import solver_of
from ranks import run_ranks, start_ranks
from reference import Case
from small_data import small_config
from torch import nn

from coe_dist.coe.backbones import build_classifier, build_delegator
from coe_dist.config import OptimizerConfig, TrainingConfig, parse_config
from coe_dist.data.sidecar import SplitInfo
from coe_dist.errors import InputError
from coe_dist.parallel.batchnorm import split_batchnorm
from coe_dist.parallel.groups import create_groups
from coe_dist.parallel.router import Router
from coe_dist.tracking.journal import read_metrics
from coe_dist.training.checks import check_empty_batches
from coe_dist.training.engines import build_engine
from coe_dist.training.networks import NetworkBuilder
from coe_dist.training.optim import build_optimizer
from coe_dist.training.step import CollaborationStep, MicroBatch, StepSums


def test_values_that_are_not_finite_and_experts_without_rows(tmp_path: Path) -> None:
    run_ranks(2, "training.failure_cases:run", tmp_path)
    for rank in range(2):
        results = json.loads((tmp_path / f"results-{rank}.json").read_text())
        assert len(results) == 4
        for engine, cases in results.items():
            told = {(case["network"], case["where"]): case["told"] for case in cases}
            assert "the delegator's selection logits are not finite" in told["delegator", "forward"], engine
            assert "the losses of experts [3] are not finite" in told["expert 3", "forward"], engine
            skipped = {case["network"]: case["skipped"] for case in cases if case["where"] == "backward"}
            assert skipped["expert 3"] == (["expert 3"] if rank == 1 else []), engine
            assert skipped["delegator"] == ["delegator"], engine  # its gradient is reduced over both ranks


def test_ranks_and_replicas_without_rows(tmp_path: Path) -> None:
    run_ranks(3, "training.failure_cases:run_replicas", tmp_path)


def job_folder(tmp_path: Path, data: Path) -> Path:
    content = small_config(data, tmp_path / "runs", training={"engine": "torch", "epochs": 2, "global_batch": 32})
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path


def end_ranks(folder: Path, target: str) -> list[subprocess.Popen[str]]:
    """Waits for rank 0 and ends rank 1, whatever it does."""
    processes = start_ranks(2, target, folder)
    try:
        processes[0].wait(timeout=300)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 0, (folder / "rank0.log").read_text()[-4000:]
    return processes


def test_a_job_whose_values_are_not_finite_and_one_whose_rank_is_killed(small_data: Path, tmp_path: Path) -> None:
    folder = job_folder(tmp_path, small_data)
    processes = end_ranks(folder, "training.failure_cases:run_jobs")
    for rank in range(2):
        told = json.loads((folder / f"told-{rank}.json").read_text())
        assert told["stop"].startswith("step 2: the delegator's selection logits are not finite")
        assert "set training.non_finite=skip" in told["stop"]
        assert told["skip"].startswith("evaluation after step 4: the delegator's class logits are not finite")
    lines = [line for line in read_metrics(folder / "runs" / "skip") if line["kind"] == "warning"]
    assert [line["step"] for line in lines] == [2, 3, 4]
    for line in lines:
        assert line["message"] == (
            f"step {line['step']}: the delegator's selection logits are not finite (NaN or infinity)"
        )
    assert processes[1].returncode == -9
    message, _ = json.loads((folder / "died-0.json").read_text())
    assert message.startswith("step 3: rank 0, group 'world' (ranks [0, 1]): "), message
    assert len(message.splitlines()) == 1


def test_a_rank_that_stops_answering_ends_the_others_at_the_timeout(small_data: Path, tmp_path: Path) -> None:
    folder = job_folder(tmp_path, small_data)
    end_ranks(folder, "training.failure_cases:run_stopped")
    message, seconds = json.loads((folder / "died-0.json").read_text())
    assert message.startswith("step 3: rank 0, group 'world' (ranks [0, 1]): "), message
    assert seconds > 8  # nothing but the timeout could end it


class ConditionalNetwork(nn.Module):
    """A mixture of kernels per image (CondConv), and BatchNorm on a single pixel."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers.cond_conv2d import CondConv2d

        self.routing = nn.Linear(1, 3)
        self.convolution = CondConv2d(1, 4, 3, padding=1, num_experts=3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, images: torch.Tensor) -> Any:
        values = images.float() / 255
        routing = torch.sigmoid(self.routing(values.mean((2, 3))))
        pooled = self.convolution(values, routing).mean((2, 3), keepdim=True)
        return self.head(self.norm(pooled).flatten(1))


@pytest.mark.parametrize("batchnorm", ["local", "group"])
@pytest.mark.parametrize("kind", ["squeeze and excitation", "conditional convolution"])
def test_a_single_image_and_experts_without_any(kind: str, batchnorm: str) -> None:
    """Batches of 4, 1 and 1 images to 2 of 3 experts: BatchNorm on one value, and an expert without rows."""
    arguments: dict[str, Any] = {"channels": 1, "classes": 5, "mean": [0.5], "std": [0.5]}
    networks: dict[str, nn.Module] = {
        "delegator": build_delegator("timm/mobilenetv3_small_050", {}, experts=3, **arguments, seed=1)
    }
    for expert in range(3):
        torch.manual_seed(expert)
        networks[f"expert {expert}"] = (
            ConditionalNetwork()
            if kind == "conditional convolution"
            else build_classifier("timm/mobilenetv3_small_050", {}, **arguments, seed=expert)
        )
    groups = create_groups(3, timeout_seconds=300)
    config = TrainingConfig(engine="torch", batchnorm=batchnorm)
    engines = {}
    for name, network in networks.items():
        group = groups.world if name == "delegator" else groups.experts[int(name.split()[1])]
        split_batchnorm(network.train(), batchnorm, group)  # type: ignore[arg-type]
        optimizer = build_optimizer(network, OptimizerConfig(), 0.01)
        engines[name] = build_engine(name, network, optimizer, config, group, groups.alone)
    router = Router(
        groups,
        solver_of(Case(1, 3, 2), groups),
        experts=3,
        per_sample=2,
        generalist_weight=0.2,
        variance=True,
        seed=3,
    )
    hosted = {expert: engines[f"expert {expert}"] for expert in range(3)}
    step = CollaborationStep(
        engines["delegator"], hosted, router, selection_weight=1.0, call_empty=batchnorm == "group"
    )
    generator = torch.Generator().manual_seed(5)
    for size in (4, 1, 1):
        images = torch.randint(0, 256, (size, 1, 32, 32), generator=generator, dtype=torch.uint8)
        sums = StepSums()
        assert step.step([MicroBatch(images, torch.arange(size), torch.arange(size))], sums)
        assert sums.load is not None
        assert int(sums.load.sum()) == size
    for network in networks.values():
        for value in network.state_dict().values():
            assert bool(torch.isfinite(value).all())


def test_networks_that_cannot_run_on_no_image_are_named_before_training(small_data: Path, tmp_path: Path) -> None:
    info = SplitInfo.model_validate_json((small_data / "train.json").read_text())

    def builder(workers: int, batchnorm: str, network: str, **options: int) -> NetworkBuilder:
        content = small_config(
            small_data,
            tmp_path,
            experts={"count": 2, "network": network, "options": options},
            training={"batchnorm": batchnorm},
            workers={"count": workers},
        )
        return NetworkBuilder(parse_config(content), info)

    conditional = "timm/efficientnet_cc_b0_4e"
    with pytest.raises(InputError, match=r"^training.batchnorm: group is not allowed with experts.network: timm/eff"):
        check_empty_batches(builder(3, "group", conditional))
    with pytest.raises(InputError, match=r"^training.batchnorm: group .* experts.network: small_cnn, .* empty batch"):
        check_empty_batches(builder(3, "group", "small_cnn", condconv=2))
    check_empty_batches(builder(3, "local", "small_cnn", condconv=2))
    for workers, batchnorm, network in (
        (2, "group", conditional),
        (3, "local", conditional),
        (3, "group", "small_cnn"),
    ):
        check_empty_batches(builder(workers, batchnorm, network))

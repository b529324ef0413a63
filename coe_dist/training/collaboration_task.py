"""A collaboration in training: its engines, its step, its figures and its result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from coe_dist.parallel.groups import Groups
from coe_dist.parallel.process_solver import OpenChannel, ProcessSolver
from coe_dist.parallel.router import Router
from coe_dist.parallel.router_process import ChildChannel
from coe_dist.parallel.solvers import LocalSolver, Problems, RankZeroSolver, ReplicatedSolver, Solver
from coe_dist.seeds import derive_seed
from coe_dist.tracking.per_image import images_file
from coe_dist.tracking.store import write_bytes, write_json
from coe_dist.training import evaluation
from coe_dist.training.chosen import Networks
from coe_dist.training.engines import NetworkEngine
from coe_dist.training.job import Job
from coe_dist.training.networks import NetworkBuilder, averages_of, collaboration_engines
from coe_dist.training.run_folder import evaluation_file
from coe_dist.training.step import CollaborationStep, StepSums
from coe_dist.training.tasks import Batches, reduced
from coe_dist.training.teacher import configured_teacher
from coe_dist.training.thresholds import Threshold, stored_threshold


class CollaborationTask:
    def __init__(
        self,
        job: Job,
        builder: NetworkBuilder,
        groups: Groups,
        device: torch.device,
        open_channel: OpenChannel = ChildChannel,
    ) -> None:
        config = job.config
        self.config, self.builder, self.groups, self.device = config, builder, groups, device
        self.run_dir, self.classes, self.splits = Path(job.run_dir), builder.info.classes, job.final_splits
        self.experts, self.expert_samples = config.experts.count, config.expert_samples
        self.problems = Problems(config.experts.count, config.router.labels, config.router.label_temperature)
        # before the engines: a router process starts while they are built
        self.solver = _build_solver(job, self.problems, groups, open_channel)
        self.delegator, self.hosted = collaboration_engines(
            config, builder, groups, device, starts=job.task != "evaluate"
        )
        self.averages = averages_of(self.engines(), config.training.ema_decay)
        router = Router(
            groups,
            self.solver,
            experts=config.experts.count,
            per_sample=config.experts_per_sample,
            generalist_weight=config.router.generalist_weight,
            variance=config.router.variance,
            seed=derive_seed(config.seed, "dispatch"),
            share=config.experts.share,
        )
        self.step = CollaborationStep(
            self.delegator,
            self.hosted,
            router,
            selection_weight=config.router.selection_weight,
            label_smoothing=config.training.label_smoothing,
            label_rule=config.router.labels,
            frozen_selection=config.router.selection == "frozen",
            call_empty=config.training.batchnorm == "group",
            skips=config.training.non_finite == "skip",
            teacher=configured_teacher(config, builder.info, device) if job.task == "train" else None,
        )
        self.evaluator = evaluation.Evaluator(
            self.delegator,
            self.hosted,
            groups,
            classes=len(builder.info.classes),
            precision=config.training.precision,
            final=config.early_exit.final,
            averages=self.averages,
        )
        self.delegator_macs, self.expert_macs = builder.collaboration_macs()

    def engines(self) -> list[NetworkEngine]:
        return [self.delegator, *(self.hosted[expert] for expert in sorted(self.hosted))]

    def router_state(self) -> dict[str, Any]:
        prices = self.problems.prices_E  # none before the first step, and where a router process holds them
        return {} if prices is None else {"prices": prices.tolist()}

    def load_router_state(self, state: dict[str, Any]) -> None:
        """The prices are a warm start only: plans do not depend on them. Those for another count are left out."""
        prices = state.get("prices")
        if prices is not None and len(prices) == self.experts:
            self.problems.prices_E = np.array(prices)

    def close(self) -> None:
        self.solver.close()

    def set_learning_rate(self, factor: float) -> None:
        optimizer = self.config.training.optimizer
        self.delegator.set_learning_rate(factor * optimizer.learning_rate)
        for engine in self.hosted.values():
            engine.set_learning_rate(factor * (optimizer.expert_learning_rate or optimizer.learning_rate))

    def metrics(self, sums: StepSums) -> dict[str, float]:
        names = ("expert_loss", "delegator_loss", "selection_loss", "delegator_correct", "distillation_loss")
        total = reduced(sums, names, self.groups, self.device)
        images, dispatched = max(1.0, total["images"]), max(1.0, total["dispatched"])
        experts_loss = total["expert_loss"] / dispatched
        classes, selection = total["delegator_loss"] / images, total["selection_loss"] / images
        delegator_loss = classes + self.config.router.selection_weight * selection
        metrics = {
            "train/loss": experts_loss + delegator_loss,
            "train/loss_experts": experts_loss,
            "train/loss_delegator": delegator_loss,
            "train/loss_selection": selection,
            "train/top1_delegator": total["delegator_correct"] / images,
            "train/bytes_sent": total["bytes_sent"],
        }
        if self.config.distillation is not None:
            metrics["train/loss_distillation"] = total["distillation_loss"] / dispatched
        if sums.load is not None:
            share = sums.load.double() / sums.load.sum().clamp_min(1)
            metrics |= {f"expert/{expert:02d}/load": float(value) for expert, value in enumerate(share)}
        return metrics

    def _summary(
        self, records: evaluation.Records, split: str, threshold: float | None, *, curve: bool
    ) -> dict[str, Any]:
        return evaluation.summarise(
            records,
            split=split,
            delegator_macs=self.delegator_macs,
            expert_macs=self.expert_macs,
            threshold=threshold,
            curve=curve,
        )

    def threshold(
        self, records: evaluation.Records, budget: float | None, accuracy: float | None = None
    ) -> float | None:
        return evaluation.calibrated_threshold(
            records,
            delegator_macs=self.delegator_macs,
            expert_macs=self.expert_macs,
            budget=budget,
            accuracy=accuracy,
        )

    def evaluate(self, batches: Batches) -> dict[str, float]:
        records = self.evaluator.run(batches("validation"))
        exits = self.config.early_exit
        threshold = exits.threshold if exits.threshold is not None else self.threshold(records, exits.macs_budget)
        result = self._summary(records, "validation", threshold, curve=False)
        metrics = {
            "val/top1": result["top1"]["coe"],
            "val/top1_delegator": result["top1"]["delegator"],
            "val/top1_oracle": result["top1"]["oracle"],
            "val/exit_rate": result["exit_rate"],
            "val/average_macs": result["average_macs"],
        }
        for expert in range(self.experts):
            metrics[f"expert/{expert:02d}/val_load"] = result["load"][expert]
            if result["expert_accuracy"][expert] is not None:
                metrics[f"expert/{expert:02d}/accuracy"] = result["expert_accuracy"][expert]
        return metrics

    def finish(self, batches: Batches, step: int) -> None:
        exits, kept = self.config.early_exit, stored_threshold(self.run_dir)
        # by a user, since: a run without steps left
        if kept is not None and kept.calibrated_for == self._networks(step):
            self.report(batches, self.splits, step=step, budget=None, given=kept)
        else:
            self.report(batches, self.splits, step=step, budget=exits.macs_budget, given=Threshold(exits.threshold))

    def _networks(self, step: int) -> Networks:
        return Networks(step, "ema" if self.averages else "raw")

    def report(
        self,
        batches: Batches,
        splits: tuple[str, ...],
        *,
        step: int,
        budget: float | None,
        given: Threshold,
        accuracy: float | None = None,
        stored: bool = True,
    ) -> None:
        """Evaluates the splits in order and writes evaluation-<split>.json, details-<split>.json and
        images-<split>.npz (or, when the figures are not to be stored with the run, asked-<split>.json alone).

        step: of the networks. The threshold is calibrated on validation for `budget` or for a top-1 `accuracy`, or
        `given`. Besides the figures (see evaluation.summarise) the files say of which networks they are (step,
        weights), for which ones the threshold was calibrated (calibrated_for: the same two, or null when it was given),
        and whether they are stored with the run.
        """
        networks, threshold = self._networks(step), given
        for split in splits:
            records = self.evaluator.run(batches(split))
            if split == "validation" and (budget is not None or accuracy is not None):
                threshold = Threshold(self.threshold(records, budget, accuracy), networks)
            origin = threshold.calibrated_for
            result = {
                **self._summary(records, split, threshold.value, curve=True),
                **networks._asdict(),
                "calibrated_for": None if origin is None else origin._asdict(),
                "stored": stored,
            }
            if self.groups.rank == 0:
                write_json(self.run_dir / evaluation_file(split, stored=stored), result)
                if stored:
                    table = evaluation.class_table(records, self.builder.info.classes)
                    write_json(self.run_dir / f"details-{split}.json", table)
                    write_bytes(self.run_dir / images_file(split), records.per_image().to_bytes())


def _build_solver(job: Job, problems: Problems, groups: Groups, open_channel: OpenChannel) -> Solver:
    config = job.config
    if config.router.scope == "local":
        return LocalSolver(problems, groups.world, groups.rank)
    if config.router.where == "rank0":
        return RankZeroSolver(problems, groups.world, groups.rank)
    if config.router.where == "process" and job.task != "evaluate":  # evaluation routes nothing
        channel = open_channel(problems) if groups.rank == 0 else None
        return ProcessSolver(channel, groups.world, timeout_seconds=config.training.timeout_seconds)
    return ReplicatedSolver(problems)

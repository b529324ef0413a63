"""A whole configuration, and the rules that hold between its fields."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

from omegaconf import OmegaConf
from pydantic import Field, model_validator

from coe_dist.config.addresses import holds_secret, is_url, scheme_of
from coe_dist.config.messages import refused
from coe_dist.config.sections import (
    DataConfig,
    DistillationConfig,
    EarlyExitConfig,
    ExpertsConfig,
    PretrainableConfig,
    RouterConfig,
    Section,
    StorageConfig,
    TrackingConfig,
    TrainingConfig,
    WorkersConfig,
)


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    runs_dir: str = "runs"
    data: DataConfig = DataConfig()
    delegator: PretrainableConfig = PretrainableConfig()
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    training: TrainingConfig = TrainingConfig()
    distillation: DistillationConfig | None = None
    early_exit: EarlyExitConfig = EarlyExitConfig()
    workers: WorkersConfig = WorkersConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: StorageConfig = StorageConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def experts_per_sample(self) -> int:
        """k: how many experts see each training image."""
        return self.experts.count if self.experts.per_sample is None else self.experts.per_sample

    @property
    def expert_samples(self) -> float:
        """How many experts see a training image in an epoch: k, or less on average where `experts.share` is below 1."""
        k, share = self.experts_per_sample, self.experts.share
        return k if share == 1.0 else round(share * k, 6)

    @property
    def micro_batch(self) -> int:
        """N: images per global micro-batch, the unit of routing, labels and BatchNorm."""
        return self.training.global_batch // self.training.accumulation

    @property
    def uses_pwlu(self) -> bool:
        """Whether a network has piecewise linear units (coe/pwlu.py)."""
        return any(section.options.get("activation") == "pwlu" for section in (self.delegator, self.experts))

    @model_validator(mode="after")
    def _cross_field_rules(self) -> RunConfig:
        self._check_places()
        count, k = self.experts.count, self.experts_per_sample
        if k > count:
            raise refused("experts.per_sample", k, f"give a whole number from 1 to experts.count = {count}")
        if k == 1 and self.router.generalist_weight > 0:
            raise refused(
                "experts.per_sample",
                k,
                f"router.generalist_weight = {self.router.generalist_weight} > 0 needs at least 2 experts per sample",
            )
        if k == 1 and self.router.selection != "frozen":
            raise refused(
                "experts.per_sample",
                k,
                "it leaves selection without a signal; give 2 or more, or set router.selection: frozen",
            )
        if self.training.global_batch % self.training.accumulation:
            raise refused(
                "training.accumulation",
                self.training.accumulation,
                f"it must divide training.global_batch = {self.training.global_batch}",
            )
        if self.early_exit.macs_budget is not None and self.early_exit.threshold is not None:
            raise refused(
                "early_exit.threshold",
                self.early_exit.threshold,
                "early_exit.macs_budget is given too; give only one of them",
            )
        workers = self.workers
        if (workers.min is None) != (workers.max is None):
            given, other = ("min", "max") if workers.max is None else ("max", "min")
            raise refused(
                f"workers.{given}", getattr(workers, given), f"give workers.{other} too, or workers.count alone"
            )
        if workers.min is not None and workers.max is not None and workers.min > workers.max:
            raise refused("workers.min", workers.min, f"give at most workers.max = {workers.max}")
        if workers.wait_minutes is not None and workers.oversubscribe:
            raise refused("workers.wait_minutes", workers.wait_minutes, "workers.oversubscribe waits for no machine")
        if self.router.scope == "local" and self.router.where != "replicated":
            raise refused(
                "router.where",
                self.router.where,
                "router.scope: local solves on every rank; give replicated",
            )
        self._check_progressive()
        if self.uses_pwlu and self.training.pwlu_statistics_epochs >= self.training.epochs:
            raise refused(
                "training.pwlu_statistics_epochs",
                self.training.pwlu_statistics_epochs,
                f"training.epochs = {self.training.epochs} leaves no epoch in which activation: pwlu is learned; "
                "give fewer, or more epochs",
            )
        if self.training.engine == "torch" and self.training.zero_stage != 0:
            raise refused("training.zero_stage", self.training.zero_stage, "engine: torch knows only stage 0")
        if self.training.optimizer.name == "lamb" and self.training.zero_stage > 0:
            raise refused(
                "training.zero_stage",
                self.training.zero_stage,
                "training.optimizer.name: lamb scales its steps by whole tensors, which ZeRO cuts up; give 0",
            )
        if self.training.precision == "fp64" and self.training.engine != "torch":
            raise refused("training.precision", "fp64", "DeepSpeed cannot reduce float64; set training.engine: torch")
        return self

    def _check_places(self) -> None:
        if is_url(self.runs_dir):
            raise refused("runs_dir", scheme_of(self.runs_dir), "give a folder here, and the address as storage.url")
        if self.data.staging.folder is not None and is_url(self.data.staging.folder):
            raise refused("data.staging.folder", scheme_of(self.data.staging.folder), "give a folder of each machine")
        if self.storage.url is not None and not is_url(self.storage.url):
            raise refused("storage.url", self.storage.url, "give an address such as s3://bucket/runs")
        for field, place in (("data.folder", self.data.folder), ("storage.url", self.storage.url or "")):
            if is_url(place) and holds_secret(place):
                raise refused(
                    field,
                    scheme_of(place),
                    "an address has no password, '?' or '#' here; the environment holds what gives access",
                )

    def _check_progressive(self) -> None:
        schedule = self.data.progressive
        if schedule is None:
            return
        if schedule.start >= self.data.resolution:
            raise refused(
                "data.progressive.start", schedule.start, f"give less than data.resolution = {self.data.resolution}"
            )
        if schedule.until_epoch <= schedule.from_epoch:
            raise refused(
                "data.progressive.until_epoch",
                schedule.until_epoch,
                f"give more than data.progressive.from_epoch = {schedule.from_epoch}",
            )
        if schedule.until_epoch >= self.training.epochs:
            raise refused(
                "data.progressive.until_epoch",
                schedule.until_epoch,
                f"training.epochs = {self.training.epochs} leaves no epoch at the full resolution; give fewer",
            )

    def digest(self) -> str:
        """16 hex digits that identify this configuration (all fields, defaults included)."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return str(OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json"))))

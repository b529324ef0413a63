"""What a group of workers is asked to do: one JSON-serialisable object, the same under Ray and torchrun."""

from __future__ import annotations

from typing import Literal

from coe_dist.config import NetworkConfig, RunConfig, Section


class Job(Section):
    task: Literal["train", "baseline", "evaluate"]
    config: RunConfig
    run_dir: str  # absolute
    mlflow_run_id: str | None = None
    network: NetworkConfig | None = None  # baseline: the single network to train
    test: bool = True  # train, baseline: look at the test split in the end; a search for settings must not
    split: Literal["validation", "test"] = "test"  # evaluate
    macs_budget: float | None = None  # evaluate: overrides the stored threshold
    min_accuracy: float | None = None  # evaluate: the same, with the cheapest threshold of this validation top-1
    threshold: float | None = None
    save: str | None = None  # evaluate: name of the save to load, which has been verified; none: the newest valid one
    stored: bool = True  # evaluate: whether the figures become the run's own

    @property
    def final_splits(self) -> tuple[str, ...]:
        """What is evaluated when training is complete."""
        return ("validation", "test") if self.test else ("validation",)

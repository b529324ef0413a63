"""What the tests of this folder share: a run with a record in MLflow, and its exported model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coe_dist.exports.mlflow_model import Exported


@dataclass(frozen=True)
class Tracked:
    run: Path
    uri: str  # of MLflow's store
    run_id: str
    out: Path  # the saved model
    exported: Exported

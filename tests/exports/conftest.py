"""One small run with a record in MLflow, its exported weights and its MLflow model, shared by these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from exported_run import Tracked
from small_data import small_config
from trained_run import early_exiting_run

from coe_dist.config import parse_config
from coe_dist.exports.mlflow_model import export_mlflow
from coe_dist.inference import CollaborationOfExperts
from coe_dist.tracking import finish_run, start_run
from coe_dist.training.export import export_weights


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts that are all chosen; a threshold that ends 60% of the images early; tracking is off."""
    folder = tmp_path_factory.mktemp("exports")
    run = early_exiting_run(folder)
    config = small_config(folder / "no-data", folder, experts={"count": 3, "per_sample": 3})
    (run / "config.yaml").write_text(parse_config(config).to_yaml())
    return run


@pytest.fixture(scope="session")
def model(run: Path) -> CollaborationOfExperts:
    export_weights(run, run.parent / "weights")
    return CollaborationOfExperts.from_pretrained(run.parent / "weights")


@pytest.fixture(scope="session")
def tracked(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """The same run in a folder with a record in MLflow; its model is saved, logged and registered."""
    import shutil

    folder = tmp_path_factory.mktemp("tracked")
    content = small_config(folder, folder, experts={"count": 3, "per_sample": 3}, tracking={"enabled": True})
    config = parse_config(content)
    shutil.copytree(run, config.run_dir)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    run_id = start_run(config, run_name="run")
    assert run_id is not None
    finish_run(config, run_id, "FAILED")
    exported = export_mlflow(config.run_dir, out=folder / "model", register="small")
    return Tracked(config.run_dir, f"sqlite:///{folder / 'mlflow.db'}", run_id, folder / "model", exported)

"""MLflow's record of a study: one run per training, all below one run of the study.

The driver alone talks to MLflow, after a training, so that the training processes need not import it.
"""

from __future__ import annotations

import platform
from pathlib import Path

from coe_dist import tracking
from coe_dist.config import RunConfig
from coe_dist.study.results import Row
from coe_dist.study.trainings import Training
from coe_dist.training.recorded import data_used, run_tags
from coe_dist.training.run_folder import evaluation_file

PARENT = "mlflow.parentRunId"  # MLflow's own name for the tag by which its page nests runs


class StudyRecord:
    """The study's MLflow run, reopened when the study goes on. Nothing here raises for what happens to MLflow."""

    def __init__(self, config: RunConfig, study: str, revision: str) -> None:
        self.config, self.study, self.revision = config, study, revision
        self.run_id = tracking.start_run(
            config,
            run_name=study,
            tags={"kind": "study", "host": platform.node(), "git_revision": revision},
            run_id=tracking.run_id_of(config.run_dir),
        )

    def begin(self, training: Training, reopened: str | None) -> str | None:
        """The training's run, or the one to reopen, of the same training that was cut short; its id."""
        tags = {
            **run_tags(training.config, baseline=training.network is not None, revision=self.revision),
            "study": self.study,
            "curve": training.curve,
            "point": training.point,
            "config_digest": training.digest,
            **({PARENT: self.run_id} if self.run_id else {}),
        }
        run_id = tracking.start_run(
            training.config,
            run_name=f"{training.label} seed {training.seed}",
            tags=tags,
            params=training.network.model_dump() if training.network else None,
            run_id=reopened,
        )
        tracking.log_datasets(training.config, run_id, data_used(training.config))
        return run_id

    def finish(self, training: Training, row: Row | None) -> None:
        """Sends what the training left in metrics.jsonl, the row's figures and the evaluations."""
        config, run_dir = training.config, training.config.run_dir
        run_id = tracking.run_id_of(run_dir)
        if row is not None:
            step = max((int(record["step"]) for record in tracking.read_metrics(run_dir)), default=0)
            recorder = tracking.Recorder(run_dir, config, None)
            recorder.record("study", step=step, metrics=_figures(row))
            recorder.close()
        files = [run_dir / "config.yaml", *(run_dir / evaluation_file(s, stored=True) for s in ("validation", "test"))]
        tracking.log_artifacts(config, run_id, files)
        tracking.finish_run(config, run_id, "FAILED" if row is None else "FINISHED")

    def cut(self, training: Training) -> None:
        """The training was stopped in its middle; it will be done again, in the same MLflow run."""
        tracking.finish_run(training.config, tracking.run_id_of(training.config.run_dir), "KILLED")

    def close(self, files: list[Path], status: tracking.Status) -> None:
        tracking.log_artifacts(self.config, self.run_id, files)
        tracking.finish_run(self.config, self.run_id, status)


def _figures(row: Row) -> dict[str, float]:
    names = ("macs", "val_top1", "test_top1", "full_macs", "full_val_top1", "full_test_top1", "oracle_top1")
    values = {name: getattr(row, name) for name in (*names, "delegator_top1", "seconds", "cpu_seconds")}
    return {f"study/{name}": float(value) for name, value in values.items() if value is not None}

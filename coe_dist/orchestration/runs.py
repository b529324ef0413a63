"""The user's jobs, each one function: train a configuration, evaluate a run, run the demonstration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from coe_dist import tracking
from coe_dist.config import NetworkConfig, RunConfig
from coe_dist.errors import InputError, Preempted, TrainingError
from coe_dist.orchestration.mirroring import mirrored, restore
from coe_dist.orchestration.progress import ProgressDisplay
from coe_dist.orchestration.ray_session import RaySession, session_for
from coe_dist.orchestration.ray_train import run_under_ray
from coe_dist.orchestration.revision import git_revision
from coe_dist.orchestration.shares import check_workers
from coe_dist.resources import usable_cores, usable_gpus
from coe_dist.storage.mirror import Mirror
from coe_dist.training.run_folder import (
    check_folder,
    check_network,
    evaluation_file,
    load_run_config,
    locked,
    prepare_folder,
)
from coe_dist.training.stopping import REQUEST, clear_stop, preempted_at, request_stop


def train(config: RunConfig, *, address: str | None = None, overwrite: bool = False) -> Path:
    """Trains `config` under Ray and returns the run folder; an existing run folder is resumed.

    address: a running Ray cluster (none: a local Ray for this run). Raises InputError before any worker starts when the
    configuration, the data, the machine or the store do not allow the run, and Preempted when SIGTERM made the workers
    save and end; then there is no report.
    """
    from coe_dist.orchestration.reporting import report
    from coe_dist.training.checkpoint import check_newest
    from coe_dist.training.checks import check_run

    if address is None:
        check_workers(config)
    classes = check_run(config).info.classes
    if not overwrite:
        restore(config)
    check_folder(config, overwrite=overwrite)
    if not overwrite:
        check_newest(config.run_dir / "checkpoints", experts=config.experts.count, classes=classes)
    with locked(config), mirrored(config, overwrite=overwrite) as mirror:
        with session_for(config, address) as session:
            run_dir = _train_locked(session, config, None, overwrite, mirror)
            clear_stop(run_dir)
        report([run_dir])
    return run_dir


def train_in(
    session: RaySession,
    config: RunConfig,
    *,
    network: NetworkConfig | None = None,
    overwrite: bool = False,
    more_follows: bool = False,
) -> Path:
    """One training in an open Ray session; `network` trains that single network instead of the collaboration.

    A SIGTERM that comes too late to interrupt the training raises Preempted only if the job has `more_follows`.
    """
    with locked(config), mirrored(config, overwrite=overwrite) as mirror:
        run_dir = _train_locked(session, config, network, overwrite, mirror)
        late = (run_dir / REQUEST).exists()
        clear_stop(run_dir)
    if late and more_follows:
        raise Preempted(f"preempted after {config.name}, resumable: the same command goes on from there")
    return run_dir


def _train_locked(
    session: RaySession, config: RunConfig, network: NetworkConfig | None, overwrite: bool, mirror: Mirror | None
) -> Path:
    from coe_dist.orchestration.router_actor import run_worker_with_actor
    from coe_dist.training.job import Job
    from coe_dist.training.recorded import data_used, run_tags

    run_dir = prepare_folder(config, overwrite=overwrite)
    if network is not None:
        check_network(run_dir, network)
    if mirror is not None:
        mirror.start()
    tags = {
        **run_tags(config, baseline=network is not None, revision=git_revision() or ""),
        "checkpoints": str((run_dir / "checkpoints").absolute()),
        "preempted": "false",
    }
    run_id = tracking.start_run(
        config,
        run_name=config.name,
        tags=tags,
        params=network.model_dump() if network else None,
        run_id=tracking.run_id_of(run_dir),
    )
    tracking.log_datasets(config, run_id, data_used(config))
    job = Job(
        task="baseline" if network else "train",
        config=config,
        run_dir=str(run_dir.absolute()),
        mlflow_run_id=run_id,
        network=network,
    )
    display = ProgressDisplay(run_dir)
    status: tracking.Status = "FAILED"
    display.start()
    try:
        try:
            run_under_ray(run_worker_with_actor, job, session=session, stop=lambda: request_stop(run_dir))
        except TrainingError:
            if preempted_at(run_dir) is None:  # else a worker died after all was saved
                raise
        if (step := preempted_at(run_dir)) is not None:
            raise Preempted(f"preempted at step {step}, resumable: the same command goes on from there")
        status = "FINISHED"
    except BaseException as error:
        # SIGTERM arrives as a SystemExit (signals.Terminated)
        status = "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit | Preempted) else "FAILED"
        if isinstance(error, Preempted):
            tracking.start_run(config, run_name=config.name, tags={"preempted": "true"}, run_id=run_id)
        raise
    finally:
        display.stop()
        tracking.log_artifacts(
            config,
            run_id,
            [
                run_dir / "config.yaml",
                *sorted(run_dir.glob("evaluation-*.json")),
                *sorted(run_dir.glob("details-*.json")),
                *sorted(run_dir.glob("images-*.npz")),
            ],
        )
        tracking.finish_run(config, run_id, status)
    return run_dir


def evaluate(
    run_dir: str | Path,
    *,
    split: Literal["validation", "test"] = "test",
    macs_budget: float | None = None,
    min_accuracy: float | None = None,
    threshold: float | None = None,
    checkpoint: str = "latest",
    weights: Literal["ema", "raw"] | None = None,
    store: bool | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run (see training.chosen) and returns the figures of evaluation-<split>.json.

    Uses the run's number of workers (its largest, if elastic), or as many as this machine has cores. With `macs_budget`
    or `min_accuracy` (a top-1 from 0 to 1) the threshold is calibrated on validation. weights: the moving averages of
    the weights or the last step's; None: the averages where the run holds some. store: whether the figures, with their
    threshold, become the run's own; None: they do, unless `threshold` is given or these are not the newest networks
    with the weights that None means: such questions store nothing.
    """
    run_dir = Path(run_dir)
    config = load_run_config(run_dir)
    from coe_dist.training.checks import check_budget, check_run
    from coe_dist.training.chosen import LATEST, chosen_weights, find_save, valid_save
    from coe_dist.training.job import Job
    from coe_dist.training.thresholds import check_threshold

    check_threshold(threshold, macs_budget)
    workers = config.workers
    if address is None and not workers.oversubscribe:
        gpus = usable_gpus() if workers.device != "cpu" else 0
        count = min(workers.most, usable_cores(), gpus or workers.most)
        workers = workers.model_copy(update={"count": count, "min": None, "max": None})
    config = config.model_copy(update={"workers": workers})
    builder = check_run(config)
    check_budget("--macs-budget", macs_budget, *builder.collaboration_macs())
    newest = find_save(run_dir, LATEST)
    if not (newest / "delegator.safetensors").is_file():
        raise InputError(f"{run_dir}: it is the run of a single network; give the run of a collaboration")
    # the workers verify the newest save, and fall back to the one before
    save = None if checkpoint == LATEST else valid_save(run_dir, checkpoint)[0]
    averaged = config.training.ema_decay is not None
    usual, chosen = (chosen_weights(run_dir, asked, averaged=averaged) for asked in (None, weights))
    if store is None:
        store = threshold is None and save in (None, newest) and chosen == usual
    if chosen == "raw":  # then the workers load and use no averages
        training = config.training.model_copy(update={"ema_decay": None})
        config = config.model_copy(update={"training": training})
    job = Job(
        task="evaluate",
        config=config,
        run_dir=str(run_dir.absolute()),
        split=split,
        macs_budget=macs_budget,
        min_accuracy=min_accuracy,
        threshold=threshold,
        save=None if save is None else save.name,
        stored=store,
    )
    from coe_dist.training.worker import run_worker  # imports FFCV: seconds, which a refusal should not take

    run_under_ray(run_worker, job, address=address)
    result: dict[str, Any] = json.loads((run_dir / evaluation_file(split, stored=store)).read_text())
    return result

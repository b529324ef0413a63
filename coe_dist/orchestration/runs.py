"""The user's jobs, each one function: train a configuration, evaluate a run, run the demonstration."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

from coe_dist import tracking
from coe_dist.config import NetworkConfig, RunConfig, parse_config
from coe_dist.errors import InputError
from coe_dist.orchestration.progress import ProgressDisplay
from coe_dist.orchestration.ray_session import RaySession, session_for
from coe_dist.orchestration.ray_train import check_workers, run_under_ray

RESUMABLE = {"training.epochs", "training.evaluate_every", "training.checkpoint_every", "training.keep_checkpoints"}
RESUMABLE_SECTIONS = {"workers", "tracking", "early_exit"}


def train(config: RunConfig, *, address: str | None = None, overwrite: bool = False) -> Path:
    """Trains `config` under Ray and returns the run folder; an existing run folder is resumed.

    address: a running Ray cluster (none: a local Ray for this run). Raises InputError before any worker starts when the
    configuration, the data or the machine do not allow the run.
    """
    from coe_dist.training.checks import check_run

    if address is None:
        check_workers(config)
    check_run(config)
    check_folder(config, overwrite=overwrite)
    with session_for(config, address) as session:
        return train_in(session, config, overwrite=overwrite)


def train_in(
    session: RaySession, config: RunConfig, *, network: NetworkConfig | None = None, overwrite: bool = False
) -> Path:
    """One training in an open Ray session; `network` trains that single network instead of the collaboration."""
    from coe_dist.orchestration.router_actor import run_worker_with_actor
    from coe_dist.training.job import Job

    run_dir = prepare_folder(config, overwrite=overwrite)
    tags = {"kind": "baseline" if network else "collaboration", "host": platform.node(), **_revision()}
    run_id = tracking.start_run(
        config,
        run_name=config.name,
        tags=tags,
        params=network.model_dump() if network else None,
        run_id=tracking.run_id_of(run_dir),
    )
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
        run_under_ray(run_worker_with_actor, job, session=session)
        status = "FINISHED"
    except BaseException as error:
        status = (
            "KILLED"
            if isinstance(error, KeyboardInterrupt | SystemExit) or type(error).__name__ == "Terminated"
            else "FAILED"
        )
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
            ],
        )
        tracking.finish_run(config, run_id, status)
    return run_dir


def check_folder(config: RunConfig, *, overwrite: bool) -> None:
    """Raises InputError when an existing run folder must not be replaced, or not be resumed with this configuration.

    Changes nothing.
    """
    run_dir = config.run_dir
    stored = run_dir / "config.yaml"
    if overwrite and run_dir.exists() and not stored.is_file():
        raise InputError(f"{run_dir}: it is not a run folder (no config.yaml), so --overwrite leaves it alone")
    if overwrite or not stored.is_file():
        return
    before = load_run_config(run_dir).model_dump(mode="json")
    changed = sorted(_differences(before, config.model_dump(mode="json")))
    refused = [key for key in changed if key not in RESUMABLE and key.split(".")[0] not in RESUMABLE_SECTIONS]
    if refused:
        raise InputError(
            f"{refused[0]}: {_at(config.model_dump(mode='json'), refused[0])} is not allowed; the run in {run_dir}, "
            f"which would be resumed, has {_at(before, refused[0])}; give that, another name, or --overwrite"
        )


def prepare_folder(config: RunConfig, *, overwrite: bool) -> Path:
    """Creates the run folder, or makes an existing one ready to be resumed; refuses what check_folder refuses."""
    check_folder(config, overwrite=overwrite)
    run_dir = config.run_dir
    stored = run_dir / "config.yaml"
    try:
        if overwrite and run_dir.exists():
            shutil.rmtree(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = stored.with_name(".config.yaml.partial")
        temporary.write_text(config.to_yaml())
        temporary.replace(stored)
    except OSError as error:
        raise InputError(f"runs_dir: {config.runs_dir} is not allowed; {run_dir}: {error.strerror}") from error
    return run_dir


def load_run_config(run_dir: str | Path) -> RunConfig:
    """The configuration a run folder was trained with; its name and place are those of the folder."""
    from omegaconf import OmegaConf

    run_dir = Path(run_dir)
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run_dir}: it is not a run folder (no config.yaml)")
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return parse_config(content | {"name": run_dir.resolve().name, "runs_dir": str(run_dir.parent)})


def evaluate(
    run_dir: str | Path,
    *,
    split: Literal["validation", "test"] = "test",
    macs_budget: float | None = None,
    threshold: float | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Evaluates a run's newest checkpoint on the workers of its configuration; returns evaluation-<split>.json's
    content."""
    run_dir = Path(run_dir)
    config = load_run_config(run_dir)
    from coe_dist.coe.early_exit import NO_EXIT
    from coe_dist.training.checkpoint import complete_saves
    from coe_dist.training.checks import check_budget, check_run
    from coe_dist.training.job import Job

    if macs_budget is not None and threshold is not None:
        raise InputError(f"--threshold: {threshold} is not allowed; --macs-budget is given too, give only one of them")
    if threshold is not None and not 0 <= threshold <= NO_EXIT:
        raise InputError(
            f"--threshold: {threshold} is not allowed; give a number from 0 to 1, or {NO_EXIT:g} for no early exit"
        )
    builder = check_run(config)
    check_budget("--macs-budget", macs_budget, *builder.collaboration_macs())
    saves = complete_saves(run_dir / "checkpoints")
    if not saves:
        raise InputError(f"{run_dir}: it holds no checkpoint to evaluate")
    if not (saves[0] / "delegator.safetensors").is_file():
        raise InputError(f"{run_dir}: it is the run of a single network; give the run of a collaboration")
    job = Job(
        task="evaluate",
        config=config,
        run_dir=str(run_dir.absolute()),
        split=split,
        macs_budget=macs_budget,
        threshold=threshold,
    )
    from coe_dist.training.worker import run_worker  # imports FFCV: seconds, which a refusal should not take

    run_under_ray(run_worker, job, address=address)
    result: dict[str, Any] = json.loads((run_dir / f"evaluation-{split}.json").read_text())
    return result


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key in before.keys() | after.keys():
        old, new, name = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict) and key != "options":
            found |= _differences(old, new, f"{name}.")
        elif old != new and name not in ("name", "runs_dir"):
            found.add(name)
    return found


def _at(content: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        content = content[part]
    return content


def _revision() -> dict[str, str]:
    """The git revision of the working directory, where there is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return {}
    return {"git_revision": done.stdout.strip()} if done.returncode == 0 else {}

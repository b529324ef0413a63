"""Runs the worker function on every worker of a Ray Train run and turns what goes wrong into one line.

The worker function knows nothing of Ray: it finds torchrun's environment variables and an initialised default process
group. Whatever Ray Train keeps for itself lives under <run_dir>/ray while the run lasts.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from coe_dist.config import RunConfig
from coe_dist.errors import InputError, TrainingError
from coe_dist.orchestration.failures import WorkerFailed, describe_failure, root_cause, write_account
from coe_dist.orchestration.ray_session import RaySession, session_for
from coe_dist.orchestration.resources import usable_cores, usable_gpus
from coe_dist.orchestration.worker_output import redirect_output, relaying_warnings

_STARTUP_ATTEMPTS = 3  # Ray Train would wait for busy CPUs for ever, a minute an attempt


class RunJob(Protocol):
    """What the orchestrator needs to know of a job (coe_dist.training.job.Job has it)."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def run_dir(self) -> str: ...


JobT = TypeVar("JobT", bound=RunJob)


def check_workers(config: RunConfig) -> None:
    """Raises InputError when this machine cannot host the workers the configuration asks for."""
    workers, cores = config.workers, usable_cores()
    if workers.count > cores and not workers.oversubscribe:
        raise InputError(
            f"workers.count: {workers.count} is not allowed; this machine has {_counted(cores, 'core')}; "
            f"give at most {cores} or set workers.oversubscribe: true"
        )
    if workers.device == "gpu":
        gpus = usable_gpus()
        _refuse_missing_gpus(config, gpus, "this machine")


def run_under_ray(
    worker_fn: Callable[[JobT], object], job: JobT, *, address: str | None = None, session: RaySession | None = None
) -> None:
    """Runs `worker_fn(job)` on `job.config.workers.count` workers and returns when all are done.

    Uses the open `session`, else the cluster at `address`, else a Ray of its own on this machine.
    Raises InputError when the machine or cluster is too small or a worker met bad input, TrainingError with the
    worker's own line when a worker failed (tracebacks in <run_dir>/error.txt), KeyboardInterrupt on Ctrl-C and
    signals.Terminated on SIGTERM; in each case the workers are gone when the session is left.
    """
    if session is None:
        if address is None:
            check_workers(job.config)
        with session_for(job.config, address) as opened:
            run_under_ray(worker_fn, job, session=opened)
        return
    cpus_per_worker, gpus_per_worker = _share(job.config, session)
    run_dir = Path(job.run_dir)
    storage = run_dir / "ray"
    name = _unused_name(run_dir)
    (run_dir / "error.txt").unlink(missing_ok=True)
    storage.mkdir(parents=True, exist_ok=True)
    try:
        with relaying_warnings(run_dir):
            _fit(worker_fn, job, session, name, cpus_per_worker, gpus_per_worker)
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _fit(
    worker_fn: Callable[[JobT], object], job: JobT, session: RaySession, name: str, cpus: float, gpus: float
) -> None:
    # Read by Ray Train in this process: workers stay in the working directory, so relative paths keep their meaning.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # it would print every line twice
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    from coe_dist.orchestration.torch_backend import MeetingConfig

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray Train's handler would turn Ctrl-C into exit code 0; without it Python raises KeyboardInterrupt."""

    config, run_dir = job.config, Path(job.run_dir)
    refused = run_dir / "ray" / f"{name}.refused"
    directory = os.getcwd() if session.local else None

    def train_loop() -> None:
        _work(worker_fn, job, refused, directory)

    trainer = Trainer(
        train_loop,
        torch_config=MeetingConfig(
            backend="nccl" if gpus else "gloo", timeout_s=int(config.training.timeout_seconds), loopback=session.local
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers.count,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(run_dir / "ray"),
            failure_config=ray.train.FailureConfig(
                max_failures=config.workers.max_failures, controller_failure_limit=_STARTUP_ATTEMPTS - 1
            ),
            worker_runtime_env={"env_vars": _worker_environment(config, session, gpus > 0)},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        write_account(run_dir, error.worker_failures)
        raise root_cause(error.worker_failures) from None
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        cause = getattr(error, "controller_failure", error)
        write_account(run_dir, {-1: cause})
        if isinstance(cause, ray.exceptions.RayActorError):  # a worker that dies while the others still start
            raise root_cause({-1: cause}) from error
        line = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise TrainingError(f"Ray could not run the workers: {line}") from error
    if refused.exists():  # seen again by the workers of a restart, which then had nothing to do
        raise InputError(refused.read_text())


def _work(worker_fn: Callable[[JobT], object], job: JobT, refused: Path, directory: str | None) -> None:
    """Runs in every worker process, in Ray Train's training thread."""
    if refused.exists():
        return  # a restart (workers.max_failures) cannot mend bad input: end at once
    rank = int(os.environ["RANK"])
    if directory is not None:
        os.chdir(directory)
    redirect_output(Path(job.run_dir), rank)
    import torch

    torch.set_num_threads(job.config.workers.threads)
    try:
        worker_fn(job)
    except Exception as error:
        failure: WorkerFailed = describe_failure(error, rank)
        if failure.kind == "input":
            refused.write_text(failure.message)
        raise failure from None


def _share(config: RunConfig, session: RaySession) -> tuple[float, float]:
    """CPUs and GPUs of each worker. Raises InputError naming what is there when it is too little."""
    count, where = config.workers.count, "this machine" if session.local else f"the cluster at {session.address}"
    if count > session.cpus and not config.workers.oversubscribe:
        raise InputError(
            f"workers.count: {count} is not allowed; {where} has {_counted(session.cpus, 'core')} and "
            f"{_counted(session.gpus, 'GPU')}; give at most {session.cpus:g} or set workers.oversubscribe: true"
        )
    # Ray counts in steps of 1/10000; rounded down so that all workers fit together.
    cpus = 1.0 if count <= session.cpus else int(session.cpus / count * 10_000) / 10_000
    if config.workers.device == "gpu":
        _refuse_missing_gpus(config, session.gpus, where)
    use_gpu = config.workers.device == "gpu" or (config.workers.device == "auto" and session.gpus >= count)
    return cpus, 1.0 if use_gpu else 0.0


def _refuse_missing_gpus(config: RunConfig, gpus: float, where: str) -> None:
    """Also when oversubscribed: NCCL refuses two ranks on one GPU."""
    if config.workers.count > gpus:
        raise InputError(
            f"workers.count: {config.workers.count} is not allowed with workers.device: gpu; {where} has "
            f"{_counted(gpus, 'GPU')}; " + (f"give at most {gpus:g}" if gpus else "set workers.device: cpu")
        )


def _worker_environment(config: RunConfig, session: RaySession, use_gpu: bool) -> dict[str, str]:
    search_path = [str(Path(__file__).resolve().parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        "OMP_NUM_THREADS": str(config.workers.threads),
        "MKL_NUM_THREADS": str(config.workers.threads),
        "NUMBA_THREADING_LAYER": "omp",  # two FFCV loaders at once abort with numba's own workqueue layer
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, search_path))),
    }
    if not use_gpu:  # Ray leaves the GPUs visible to workers that asked for none, and DeepSpeed would take them
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if session.local:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "MLFLOW_TRACKING_URI"):
        if name in os.environ:
            environment.setdefault(name, os.environ[name])
    return environment


def _unused_name(run_dir: Path) -> str:
    """Ray Train resumes what it finds under a known name; ours is always new (resuming is our checkpoints' job)."""
    return f"{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}-{secrets.token_hex(4)}"


def _counted(number: float, noun: str) -> str:
    return f"{number:g} {noun}" + ("" if number == 1 else "s")

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
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from coe_dist.children import search_path
from coe_dist.config import RunConfig
from coe_dist.errors import TrainingError
from coe_dist.orchestration.failures import describe_failure, root_cause, write_account
from coe_dist.orchestration.ray_session import RaySession, session_for
from coe_dist.orchestration.shares import Share, check_workers, counted, place_of, share_of
from coe_dist.orchestration.signals import asking_first
from coe_dist.orchestration.worker_output import redirect_output, relaying_warnings

ROOM_SECONDS = 60.0  # how long the first start waits for busy cores; later ones wait training.timeout_seconds
GROW_SECONDS = 60.0  # an elastic run grows at most that often


class RunJob(Protocol):
    """What the orchestrator needs to know of a job (coe_dist.training.job.Job has it)."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def run_dir(self) -> str: ...


JobT = TypeVar("JobT", bound=RunJob)


def run_under_ray(
    worker_fn: Callable[[JobT], object],
    job: JobT,
    *,
    address: str | None = None,
    session: RaySession | None = None,
    stop: Callable[[], None] | None = None,
) -> None:
    """Runs `worker_fn(job)` on the configured number of workers and returns when all are done.

    Uses the open `session`, else the cluster at `address`, else a Ray of its own on this machine. `stop` asks workers
    to end by themselves: with it the first SIGTERM while workers run only calls it (see signals.asking_first).
    Raises InputError when the machine or cluster is too small or a worker met bad input, TrainingError with the
    worker's own line when a worker failed (tracebacks in <run_dir>/error.txt), KeyboardInterrupt on Ctrl-C and
    signals.Terminated on SIGTERM; in each case the workers are gone when the session is left.
    """
    if session is None:
        if address is None:
            check_workers(job.config)
        with session_for(job.config, address) as opened:
            run_under_ray(worker_fn, job, session=opened, stop=stop)
        return
    share = share_of(job.config, session)
    run_dir = Path(job.run_dir)
    name = _unused_name(run_dir)
    storage = run_dir / "ray" / name  # of this job alone: an evaluation may run beside the training
    (run_dir / "error.txt").unlink(missing_ok=True)
    storage.mkdir(parents=True, exist_ok=True)
    began = storage / "began"

    def ask() -> bool:
        if stop is None or not began.exists():
            return False
        stop()
        return True

    try:
        with relaying_warnings(run_dir), asking_first(ask, seconds=job.config.training.timeout_seconds):
            _fit(worker_fn, job, session, name, share, began)
    finally:
        shutil.rmtree(storage, ignore_errors=True)
        with suppress(OSError):  # another job's is there
            storage.parent.rmdir()


def _fit(
    worker_fn: Callable[[JobT], object], job: JobT, session: RaySession, name: str, share: Share, began: Path
) -> None:
    # Read by Ray Train in this process: workers stay in the working directory, so relative paths keep their meaning.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # it would print every line twice
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    # an attempt to find room, not the wait for it
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    from coe_dist.orchestration.restarts import GrowAfterSave, NoRoomError, Patience, RestartPolicy
    from coe_dist.orchestration.torch_backend import MeetingConfig

    config, run_dir = job.config, Path(job.run_dir)
    room = ROOM_SECONDS if config.workers.wait_minutes is None else 60.0 * config.workers.wait_minutes
    patience = Patience(name, room, max(room, config.training.timeout_seconds))

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray Train's handler would turn Ctrl-C into exit code 0; without it Python raises KeyboardInterrupt."""

        def _create_default_callbacks(self) -> list[Any]:
            """Without Ray Data's, which starts a process of its own each time: our loaders read the files."""
            return [one for one in super()._create_default_callbacks() if not isinstance(one, DatasetsCallback)]

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            parts["failure_policy"] = RestartPolicy(self.run_config.failure_config, run_dir, patience)
            if self.scaling_config.elasticity_enabled:
                parts["scaling_policy"] = GrowAfterSave(
                    self.scaling_config, run_dir, patience, epochs=config.training.epochs
                )
            return super()._initialize_and_run_controller(**parts)

    directory = os.getcwd() if session.local else None

    def train_loop() -> None:
        _work(worker_fn, job, began, directory)

    trainer = Trainer(
        train_loop,
        torch_config=MeetingConfig(
            backend="nccl" if share.gpus else "gloo",
            timeout_s=int(config.training.timeout_seconds),
            loopback=session.local,
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=share.num_workers,
            use_gpu=share.gpus > 0,
            resources_per_worker={"CPU": share.cpus, **({"GPU": share.gpus} if share.gpus else {})},
            elastic_resize_monitor_interval_s=GROW_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(began.parent),
            failure_config=ray.train.FailureConfig(max_failures=config.workers.max_failures),
            worker_runtime_env={"env_vars": _worker_environment(config, session, share.gpus > 0)},
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
        if isinstance(cause, NoRoomError | WorkerGroupStartupTimeoutError):
            raise TrainingError(_no_room(share, session)) from None
        if isinstance(cause, ray.exceptions.RayActorError):  # a worker that dies while the others still start
            raise root_cause({-1: cause}) from error
        cause = getattr(cause, "cause", cause)  # what a worker raised on its way to the others
        line = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise TrainingError(f"Ray could not run the workers: {line}") from error


def _no_room(share: Share, session: RaySession) -> str:
    import ray

    free = ray.available_resources()
    there, needed = [counted(session.cpus, "core")], [counted(share.fewest * share.cpus, "core")]
    left = [f"{free.get('CPU', 0.0):g}"]
    if share.gpus:
        there.append(counted(session.gpus, "GPU"))
        needed.append(counted(share.fewest * share.gpus, "GPU"))
        left.append(f"{free.get('GPU', 0.0):g}")
    return (
        f"no room for the workers: they need {' and '.join(needed)}; {place_of(session)} has {' and '.join(there)}, "
        f"of which {' and '.join(left)} are free; wait for other work to end, or lower the number of workers"
    )


def _work(worker_fn: Callable[[JobT], object], job: JobT, began: Path, directory: str | None) -> None:
    """Runs in every worker process, in Ray Train's training thread."""
    rank = int(os.environ["RANK"])
    try:
        if directory is not None:
            os.chdir(directory)
        redirect_output(Path(job.run_dir), rank)
        import torch

        torch.set_num_threads(job.config.workers.threads)
        began.touch()
        worker_fn(job)
    except Exception as error:
        raise describe_failure(error, rank) from None


def _worker_environment(config: RunConfig, session: RaySession, use_gpu: bool) -> dict[str, str]:
    environment = {
        "OMP_NUM_THREADS": str(config.workers.threads),
        "MKL_NUM_THREADS": str(config.workers.threads),
        "NUMBA_THREADING_LAYER": "omp",  # two FFCV loaders at once abort with numba's own workqueue layer
        "PYTHONPATH": search_path(),
    }
    if not use_gpu:  # Ray leaves the GPUs visible to workers that asked for none, and DeepSpeed would take them
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if session.local:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    network = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG")
    stores = (
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_DEFAULT_REGION",
        "AWS_REGION",
    )  # no secrets: Ray shows them
    for name in (*network, *stores, "MLFLOW_TRACKING_URI"):
        if name in os.environ:
            environment.setdefault(name, os.environ[name])
    return environment


def _unused_name(run_dir: Path) -> str:
    """Ray Train resumes what it finds under a known name; ours is always new (resuming is our checkpoints' job)."""
    return f"{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}-{secrets.token_hex(4)}"

"""The function every worker process runs; also `torchrun --nproc-per-node 2 -m coe_dist.training.worker CONFIG`.

It needs only torch.distributed's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) or a process group that is
initialised already, so that whoever starts the processes stays replaceable.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from coe_dist import tracking
from coe_dist.coe.warm_up import warm_up, warm_up_pwlu
from coe_dist.config import RunConfig, load_config
from coe_dist.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_PREEMPTED, InputError, TrainingError
from coe_dist.leaving import leave
from coe_dist.parallel.groups import Groups, create_groups
from coe_dist.parallel.process_solver import OpenChannel
from coe_dist.parallel.router_process import ChildChannel
from coe_dist.storage.datasets import sidecar_of
from coe_dist.training import checkpoint
from coe_dist.training.checkpoint import Position
from coe_dist.training.checks import check_run
from coe_dist.training.collaboration_task import CollaborationTask
from coe_dist.training.job import Job
from coe_dist.training.loop import Loop
from coe_dist.training.networks import NetworkBuilder
from coe_dist.training.reading import Data
from coe_dist.training.run_folder import check_folder, prepare_folder
from coe_dist.training.single_task import SingleTask
from coe_dist.training.staged import stage_together
from coe_dist.training.stopping import listen_to_sigterm
from coe_dist.training.tasks import Task
from coe_dist.training.thresholds import Threshold, stored_threshold


def run_worker(job: Job, open_channel: OpenChannel = ChildChannel) -> bool:
    """Trains, or evaluates, as `job` says. Collective: every process of the group calls it with the same job.

    Returns False when it was asked to stop before the end, and has saved (see stopping.py).
    `open_channel` starts the router process on rank 0 where the configuration asks for one (router.where: process).
    """
    config = job.config
    device = _device(config)
    torch.set_num_threads(config.workers.threads)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    if job.task == "train":
        warm_up()  # now, while no other rank waits for this one in a collective
    if job.task != "evaluate" and config.uses_pwlu and device.type == "cpu":
        warm_up_pwlu()
    _join_process_group(config, device)
    groups = create_groups(config.experts.count, timeout_seconds=config.training.timeout_seconds)
    stage_together(job, groups, device)
    builder = NetworkBuilder(config, sidecar_of(config.data, "train"))
    data = Data(config, groups, device)
    try:
        task = _build_task(job, builder, groups, device, open_channel)
        try:
            before = time.perf_counter()
            position, save = _resume(job, task, groups)
            resumed = {"resumed_from": save, "load_seconds": time.perf_counter() - before} if save else {}
            torch.set_num_threads(config.workers.threads)  # FFCV and DeepSpeed change it
            if job.task == "evaluate":
                assert isinstance(task, CollaborationTask)
                _evaluate(job, task, data, position.step)
                return True
            return _train(job, task, data, position, resumed)
        finally:
            task.close()
    finally:
        data.close()


def _build_task(
    job: Job, builder: NetworkBuilder, groups: Groups, device: torch.device, open_channel: OpenChannel
) -> Task:
    if job.network is not None:
        return SingleTask(job, builder, groups, device)
    return CollaborationTask(job, builder, groups, device, open_channel)


def _train(job: Job, task: Task, data: Data, position: Position, resumed: dict[str, object]) -> bool:
    recorder = tracking.Recorder(Path(job.run_dir), job.config, job.mlflow_run_id) if data.groups.rank == 0 else None
    try:
        return Loop(job, task, data, recorder).run(position, resumed)
    finally:
        if recorder is not None:
            recorder.close()


def _evaluate(job: Job, task: CollaborationTask, data: Data, step: int) -> None:
    """The threshold is the one asked for, else the one stored with the run, else the configuration's."""
    budget, accuracy, given = job.macs_budget, job.min_accuracy, Threshold(job.threshold)
    if budget is None and accuracy is None and given.value is None:
        exits, stored = job.config.early_exit, stored_threshold(Path(job.run_dir))
        budget, given = (exits.macs_budget, Threshold(exits.threshold)) if stored is None else (None, stored)
    splits: tuple[str, ...] = (job.split,)
    if (budget is not None or accuracy is not None) and job.split == "test":
        splits = ("validation", "test")  # a threshold is always calibrated on validation
    task.report(data.batches, splits, step=step, budget=budget, accuracy=accuracy, given=given, stored=job.stored)


def _resume(job: Job, task: Task, groups: Groups) -> tuple[Position, str]:
    """Loads the save that the job names, else the newest valid one of the run folder, if there is one; returns its
    position and name (or '')."""
    folder = Path(job.run_dir) / "checkpoints"
    save, problems = checkpoint.agreed_save(folder, groups) if job.save is None else (folder / job.save, [])
    for problem in problems:
        warnings.warn(problem, stacklevel=1)
    if save is None:
        if job.task == "evaluate":
            raise InputError(f"{job.run_dir}: it holds no checkpoint to evaluate")
        return Position(), ""
    position, manifest = checkpoint.load(
        save,
        task.engines(),
        experts=job.config.experts.count,
        classes=task.classes,
        averages=task.averages,
        optimizer=job.task != "evaluate",
    )
    task.load_router_state(manifest.get("router") or {})
    return position, save.name


def _device(config: RunConfig) -> torch.device:
    wanted = config.workers.device
    if wanted == "gpu" and not torch.cuda.is_available():
        raise InputError("workers.device: gpu is not allowed; this machine has no usable GPU; give cpu or auto")
    without_gpu = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if wanted == "cpu" or without_gpu or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would take a GPU it sees
        return torch.device("cpu")
    # under Ray, CUDA_VISIBLE_DEVICES holds only this worker's GPUs
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join_process_group(config: RunConfig, device: torch.device) -> None:
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:  # a plain single process
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=config.training.timeout_seconds)
    )


def main(arguments: list[str]) -> int:
    """torchrun's entry: a configuration and overrides, or a job file ending in .json."""
    try:
        if not arguments:
            raise InputError(
                "give a configuration: torchrun --nproc-per-node 2 -m coe_dist.training.worker CONFIG [key=value ...]"
            )
        if arguments[0].endswith(".json"):
            job = Job.model_validate_json(Path(arguments[0]).read_text())
        else:
            config = load_config(arguments[0], arguments[1:])
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
            workers = config.workers.model_copy(update={"count": world_size})
            # every rank refuses by itself, none waits for another
            classes = check_run(config.model_copy(update={"workers": workers})).info.classes
            check_folder(config, overwrite=False)
            checkpoint.check_newest(config.run_dir / "checkpoints", experts=config.experts.count, classes=classes)
            if os.environ.get("RANK", "0") == "0":
                prepare_folder(config, overwrite=False)
            job = Job(task="train", config=config, run_dir=str(config.run_dir.absolute()))
        listen_to_sigterm()
        if not run_worker(job):
            return EXIT_PREEMPTED
    except InputError as error:
        print(f"coe-dist: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except TrainingError as error:
        if os.environ.get("COE_DIST_DEBUG"):
            raise
        print(f"coe-dist: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

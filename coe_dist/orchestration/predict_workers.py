"""Prediction spread over the workers of a Ray: each holds the model, takes chunks of files and gives back their rows.

A chunk is what one process alone would answer as one batch, and the driver hands the rows on in the order of the files:
the result does not depend on the number of workers or on who was faster (beyond floating point's rounding). When a
worker's process dies Ray starts it again and gives it its chunks again; rows come back only once.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from coe_dist.config import parse_config
from coe_dist.errors import InputError, TrainingError
from coe_dist.orchestration.failures import describe_failure, root_cause
from coe_dist.orchestration.ray_session import RaySession, session_for
from coe_dist.orchestration.shares import part_of
from coe_dist.prediction.answers import Row, answer, chunks_of
from coe_dist.prediction.decode import decode
from coe_dist.prediction.model import Opened

_AT_ONCE = 2  # chunks a worker has: one is decoded while the model answers the other
_WINDOW = 8  # chunks per worker that may be done or under way behind one that is slow
_RESTARTS = 2  # of a worker's process
_START_SECONDS = 300.0  # of all workers; imports from a cold disk take a minute


class PredictionWorker:
    """Runs in a process of its own, as a Ray actor. Several threads may be in it."""

    def __init__(self, number: int, directory: str, top: int, threads: int, gpu: bool) -> None:
        torch.set_num_threads(threads)
        if Path(directory).is_dir():
            os.chdir(directory)  # relative names keep their meaning
        self._number, self._top, self._threads = number, top, threads
        self._device = torch.device("cuda" if gpu else "cpu")
        self._opened: Opened | None = None
        self._loading, self._answering = threading.Lock(), threading.Lock()

    def ready(self, reference: list[Any]) -> int:
        """Its process id, once the model is loaded."""
        self._load(reference)
        return os.getpid()

    def run(self, reference: list[Any], files: Sequence[str]) -> list[Row]:
        """The rows of one chunk."""
        try:
            opened = self._load(reference)
            with ThreadPoolExecutor(self._threads) as pool:
                decoded = list(pool.map(lambda file: decode(file, opened.model.preparation), files))
            with self._answering:
                return answer(opened.model, files, decoded, top=self._top, device=self._device)
        except Exception as error:
            raise describe_failure(error, self._number) from None

    def _load(self, reference: list[Any]) -> Opened:
        """Takes the Opened from Ray's store, where this process has not yet. Part of every call, for a process that
        was started again knows only what its calls bring."""
        import ray

        with self._loading:
            if self._opened is None:
                opened: Opened = ray.get(reference[0])
                opened.model.to(self._device)
                self._opened = opened
            return self._opened


def predict_on_workers(
    opened: Opened, files: Sequence[str], *, workers: int, address: str | None, batch: int, top: int
) -> Generator[list[Row]]:
    """The rows of each chunk of `batch` files, all in the order of `files`; more workers than cores share them.

    Uses the cluster at `address`, whose machines must see the files under the same names, else a Ray of its own, which
    ends with the iterator. Raises InputError when a cluster has no room, TrainingError when a worker fails.
    """
    with session_for(parse_config({"name": "predict"}), address) as session:
        import ray

        try:
            model = [ray.put(opened)]  # in a list, so that Ray hands on the reference
            actors = _start(model, session, workers, top)
            yield from _in_order(actors, model, chunks_of(files, batch))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            raise root_cause({getattr(cause, "rank", -1): cause}) from None
        except ray.exceptions.RayError as error:
            raise root_cause({-1: error}) from None


def _start(model: list[Any], session: RaySession, workers: int, top: int) -> list[Any]:
    """Starts all workers and waits until each holds the model. Ray itself would wait for a place for ever."""
    import ray

    free = session.cpus if session.local else float(ray.available_resources().get("CPU", 0.0))
    cpus = part_of(session.cpus, workers, local=session.local)
    if cpus * workers > free:
        raise InputError(
            f"--workers: {workers} is not allowed; the cluster at {session.address} has {free:g} free of "
            f"{session.cpus:g} cores, give fewer or wait for a place"
        )
    gpus = part_of(session.gpus, workers, local=False)  # a part of a GPU is taken from one of them
    threads = max(1, int(session.cpus // workers)) if session.local else 1
    actor = ray.remote(PredictionWorker).options(
        num_cpus=cpus,
        num_gpus=gpus,
        max_concurrency=_AT_ONCE,
        max_restarts=_RESTARTS,
        max_task_retries=_RESTARTS,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})}},
    )
    actors = [actor.remote(number, os.getcwd(), top, threads, gpus > 0) for number in range(workers)]
    try:
        ray.get([worker.ready.remote(model) for worker in actors], timeout=_START_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise TrainingError(f"the {workers} workers did not start within {_START_SECONDS:g} s") from None
    return actors


def _in_order(actors: Sequence[Any], model: list[Any], chunks: Iterator[Sequence[str]]) -> Iterator[list[Row]]:
    """Whoever is free takes the next chunk; results wait for those before them."""
    import ray

    free = deque(actor for _ in range(_AT_ONCE) for actor in actors)
    under_way: dict[Any, tuple[int, Any]] = {}
    done: dict[int, list[Row]] = {}
    given = handed_on = 0
    more = True
    while more or under_way:
        while more and free and given - handed_on < _WINDOW * len(actors):
            chunk = next(chunks, None)
            if chunk is None:
                more = False
                break
            worker = free.popleft()
            under_way[worker.run.remote(model, chunk)] = (given, worker)
            given += 1
        if not under_way:
            break
        (finished,), _ = ray.wait(list(under_way), num_returns=1)
        number, worker = under_way.pop(finished)
        done[number] = ray.get(finished)
        free.append(worker)
        while handed_on in done:
            yield done.pop(handed_on)
            handed_on += 1

"""How many workers may run, and what each of them gets of a machine or cluster."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from coe_dist.config import RunConfig
from coe_dist.errors import InputError
from coe_dist.orchestration.ray_session import RaySession
from coe_dist.resources import usable_cores, usable_gpus

_SMALLEST_ELASTIC_SHARE = 1 / 16
_log = logging.getLogger("coe_dist.workers")


@dataclass(frozen=True)
class Share:
    """From `fewest` to `most` workers (equal where their number is fixed), with `cpus` and `gpus` (0 or 1) each."""

    fewest: int
    most: int
    cpus: float
    gpus: float

    @property
    def num_workers(self) -> int | tuple[int, int]:
        """As Ray Train wants it: a pair makes the number elastic."""
        return self.most if self.fewest == self.most else (self.fewest, self.most)


def check_workers(config: RunConfig) -> None:
    """Raises InputError when this machine cannot host the workers the configuration asks for."""
    workers, cores = config.workers, usable_cores()
    if workers.fewest > cores and not workers.oversubscribe:
        raise InputError(
            f"{_field(config)}: {workers.fewest} is not allowed; this machine has {counted(cores, 'core')}; "
            f"give at most {cores} or set workers.oversubscribe: true"
        )
    if workers.device == "gpu":
        _refuse_missing_gpus(config, usable_gpus(), "this machine")


def share_of(config: RunConfig, session: RaySession) -> Share:
    """What each worker gets in `session`. Raises InputError naming what is there when it is too little.

    The most workers of an elastic run are limited by this machine; a cluster may grow. One that is oversubscribed gets
    shares of 1/2, 1/4, ... of a core, because Ray counts elastic workers with floating-point division. With
    workers.wait_minutes a cluster may still lack the machines: its autoscaler is left to start them.
    """
    workers, where = config.workers, place_of(session)
    fewest, most = workers.fewest, workers.most
    if workers.wait_minutes is not None and not session.local:
        return Share(fewest, most, 1.0, _gpus_each(config, session))
    if fewest > session.cpus and not workers.oversubscribe:
        raise InputError(
            f"{_field(config)}: {fewest} is not allowed; {where} has {counted(session.cpus, 'core')} and "
            f"{counted(session.gpus, 'GPU')}; give at most {session.cpus:g} or set workers.oversubscribe: true"
        )
    if workers.device == "gpu":
        _refuse_missing_gpus(config, session.gpus, where)
    gpus = _gpus_each(config, session)
    if not workers.elastic:
        return Share(fewest, most, part_of(session.cpus, fewest, local=session.local), gpus)
    cpus = 1.0
    while workers.oversubscribe and cpus * most > session.cpus and cpus > _SMALLEST_ELASTIC_SHARE:
        cpus /= 2
    if cpus * fewest > session.cpus:
        raise InputError(
            f"workers.min: {fewest} is not allowed; {where} has {counted(session.cpus, 'core')}; "
            f"give at most {session.cpus / cpus:g}"
        )
    if session.local:
        most = min(most, int(session.cpus / cpus), int(session.gpus) if gpus else most)
    return Share(fewest, most, cpus, gpus)


def _gpus_each(config: RunConfig, session: RaySession) -> float:
    """1 or 0; with workers.device: auto, GPUs are used where there is one for each worker."""
    workers = config.workers
    if workers.device == "auto" and 0 < session.gpus < workers.fewest:
        _log.warning(
            "the workers use CPU cores: %s is %d, but %s has %s; with workers.device=gpu that is refused",
            *(_field(config), workers.fewest, place_of(session), counted(session.gpus, "GPU")),
        )
    return 1.0 if workers.device == "gpu" or (workers.device == "auto" and session.gpus >= workers.fewest) else 0.0


def part_of(there: float, workers: int, *, local: bool) -> float:
    """CPUs (or GPUs) of each of `workers`: a whole one where there are enough, else a part, so that all find a place.

    Ray counts in steps of 1/10000 and takes a worker's part from one machine: on a cluster only 1/2, 1/3, ... fill any
    machines to the end.
    """
    if workers <= there:
        return 1.0
    part = there / workers if local else 1.0 / math.ceil(workers / there) if there else 0.0
    return math.floor(part * 10_000) / 10_000


def place_of(session: RaySession) -> str:
    return "this machine" if session.local else f"the cluster at {session.address}"


def counted(number: float, noun: str) -> str:
    return f"{number:g} {noun}" + ("" if number == 1 else "s")


def _field(config: RunConfig) -> str:
    return "workers.min" if config.workers.elastic else "workers.count"


def _refuse_missing_gpus(config: RunConfig, gpus: float, where: str) -> None:
    """Also when oversubscribed: NCCL refuses two ranks on one GPU."""
    if config.workers.fewest > gpus:
        raise InputError(
            f"{_field(config)}: {config.workers.fewest} is not allowed with workers.device: gpu; {where} has "
            f"{counted(gpus, 'GPU')}; " + (f"give at most {gpus:g}" if gpus else "set workers.device: cpu")
        )

"""Before training or evaluation: the .beton files that it reads are on each worker's machine."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist

from coe_dist.data.sidecar import SPLITS
from coe_dist.errors import InputError
from coe_dist.parallel.groups import Groups
from coe_dist.storage.datasets import beton_of, is_staged
from coe_dist.training.job import Job

_ROUND_SECONDS = 2.0


def stage_together(job: Job, groups: Groups, device: torch.device) -> None:
    """Returns on all ranks when the last one has its files. Collective.

    A copy may take longer than a collective may wait: therefore a thread copies, and in rounds all tell each other
    whether they are ready. Raises InputError on all ranks where one could not copy.
    """
    if not is_staged(job.config.data):
        return
    problem: list[str] = []
    failed: list[BaseException] = []
    ready = threading.Event()

    def copy() -> None:
        try:
            for split in SPLITS:
                if split != "test" or "test" in job.final_splits or job.task == "evaluate":
                    beton_of(job.config.data, split)
        except InputError as error:
            problem.append(str(error))
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    threading.Thread(target=copy, name="staging", daemon=True).start()
    while True:
        finished = ready.wait(_ROUND_SECONDS)
        if failed:
            raise failed[0]
        busy = torch.tensor([int(not finished)], device=device)
        if not int(groups.world.all_reduce_sum(busy)):
            break
    everyone: list[Any] = [problem]
    if groups.world.handle is not None:
        everyone = [None] * groups.world.size
        with groups.world.naming_failures("copy of the data"):
            dist.all_gather_object(everyone, problem, group=groups.world.handle)
    for found in everyone:
        if found:
            raise InputError(found[0])

"""Run by test_elastic.py in a private network: a cluster of two machines with one core each, as two raylets.

One of them is killed while an elastic run trains, and comes back; then somebody else takes the cores. Prints what came
of it as JSON. Argument: a configuration."""

import json
import logging
import os
import sys
import threading
import time

import ray
from heard import Heard
from ray.cluster_utils import Cluster
from waiting import until

from coe_dist import tracking
from coe_dist.config import load_config
from coe_dist.errors import InputError, TrainingError
from coe_dist.orchestration import ray_train
from coe_dist.orchestration.ray_session import connect
from coe_dist.orchestration.ray_train import run_under_ray
from coe_dist.training.job import Job
from coe_dist.training.stopping import preempted_at, request_stop


def train(job):
    """The worker function, and which images it was given: one line a batch, in ids-<start>-<rank>.jsonl."""
    import torch.distributed as dist

    from coe_dist.training.reading import Data
    from coe_dist.training.worker import run_worker

    batches, when = Data.batches, time.time()

    def noted(self, split, epoch=0, start_step=0):
        with open(f"{job.run_dir}/ids-{when}-{dist.get_rank()}.jsonl", "a") as file:
            for number, batch in enumerate(batches(self, split, epoch, start_step), start_step):
                if split == "train":
                    file.write(json.dumps([epoch, number, batch.ids.tolist()]) + "\n")
                    file.flush()
                yield batch

    Data.batches = noted
    run_worker(job)


def records(run, kind):
    return [record for record in tracking.read_metrics(run) if record["kind"] == kind]


def trained(run, starts):
    """Waits until the given number of starts has been made and the last one has trained some steps; its world size."""
    start = until(lambda: records(run, "start")[starts - 1 :], f"start {starts}")[-1]
    until(lambda: records(run, "train") and records(run, "train")[-1]["step"] > start["step"] + 2, "steps")
    return start


def change_machines(cluster, second, run, seen):
    """Two machines, one, two again, then the wish to stop."""
    try:
        seen["worlds"] = [trained(run, 1)["world_size"]]
        died = time.time()
        second.kill_raylet()
        start = trained(run, 2)
        seen["worlds"].append(start["world_size"])
        seen["shrink_seconds"] = start["time"] - died
        came = time.time()
        cluster._shutdown_at_exit = False  # its handler of SIGTERM and its fate sharing are for the main thread
        cluster.add_node(num_cpus=1)
        start = trained(run, 3)
        seen["worlds"].append(start["world_size"])
        seen["grow_seconds"] = start["time"] - came
    except Exception as error:
        seen["problem"] = repr(error)
    finally:
        request_stop(run)


def refused(job, session):
    before = time.monotonic()
    try:
        run_under_ray(print, job, session=session)
    except (InputError, TrainingError) as error:
        return {"error": type(error).__name__, "message": str(error), "seconds": time.monotonic() - before}
    return None


@ray.remote(num_cpus=1)
class Occupant:
    def here(self):
        return os.getpid()


def main(path):
    heard, found = Heard(), {}
    logging.getLogger("coe_dist.worker").addHandler(heard)
    config = load_config(path)
    run = config.run_dir.absolute()
    run.mkdir(parents=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        found["address"] = cluster.address
        with connect(cluster.address) as session:
            run_id = tracking.start_run(config, run_name="elastic")
            job = Job(task="train", config=config, run_dir=str(run), mlflow_run_id=run_id)
            seen = found["machines"] = {}
            changes = threading.Thread(target=change_machines, args=(cluster, second, run, seen))
            changes.start()
            ray_train.GROW_SECONDS = 1.0
            try:
                run_under_ray(train, job, session=session)
            finally:
                changes.join()
            tracking.finish_run(config, run_id, "KILLED")
            found["preempted"] = preempted_at(run)
            if "problem" in seen:
                raise AssertionError(seen["problem"])

            occupants = [Occupant.remote() for _ in range(2)]
            ray.get([occupant.here.remote() for occupant in occupants], timeout=60)
            ray_train.ROOM_SECONDS = 3.0
            for name, workers in (("fixed", {"min": None, "max": None, "count": 2}), ("elastic", {})):
                changed = config.workers.model_copy(update=workers)
                other = job.model_copy(update={"config": config.model_copy(update={"workers": changed})})
                found[name] = refused(other, session)
    finally:
        cluster.shutdown()
    found["heard"] = heard.lines
    json.dump(found, sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])

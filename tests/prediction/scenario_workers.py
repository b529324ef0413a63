"""Run by test_predict_workers.py: arguments are the exported folder and the pictures; the last line of stdout tells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from coe_dist.config import parse_config
from coe_dist.orchestration.predict import predict
from coe_dist.orchestration.predict_workers import predict_on_workers
from coe_dist.orchestration.ray_session import local_ray
from coe_dist.prediction.files import list_images
from coe_dist.prediction.model import open_model


def workers_of_this_process() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "PredictionWorker" in " ".join(child.cmdline())]


def with_a_death(weights: Path, pictures: Path) -> dict[str, object]:
    """One of two workers is killed after the first rows have come; more than half of the chunks are to be done yet."""
    files = list_images([str(pictures)]).files
    rows, killed = [], 0
    chunks = predict_on_workers(open_model(weights), files, workers=2, address=None, batch=1, top=1)
    for chunk in chunks:
        rows += [row._asdict() for row in chunk]
        if not killed:
            killed = workers_of_this_process()[0]
            os.kill(killed, signal.SIGKILL)
    return {"rows": rows, "killed": killed, "left": workers_of_this_process()}


def in_a_cluster(weights: Path, pictures: Path) -> dict[str, object]:
    """Other processes use a session of this one as their cluster: while it has room, and while it has not."""
    import ray

    def asked(workers: int) -> subprocess.CompletedProcess[str]:
        command = ["predict", str(weights), str(pictures), "--json", "--address", session.address]
        code = "from coe_dist.cli import main; main()"
        argv = [sys.executable, "-c", code, *command, "--workers", str(workers)]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=200)

    class Busy:
        def ready(self) -> bool:
            return True

    with local_ray(parse_config({"name": "cluster"})) as session:
        roomy = asked(1)
        busy = ray.remote(Busy).options(num_cpus=session.cpus).remote()
        ray.get(busy.ready.remote())
        full = asked(1)
    return {"roomy": json.loads(roomy.stdout), "full": [full.returncode, full.stderr.splitlines()[-1]]}


if __name__ == "__main__":
    weights, pictures, csv = (Path(argument) for argument in sys.argv[1:4])
    found = {"death": with_a_death(weights, pictures), "cluster": in_a_cluster(weights, pictures)}
    os.chdir(pictures)  # relative names mean the same to the workers
    spread = predict(weights, ["."], csv=csv, top=3, batch=7, workers=3, keep_rows=False)
    print(json.dumps({**found, "spread": spread}))

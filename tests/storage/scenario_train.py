"""Run by test_train_from_a_store.py in a network of its own: data and run in a store, the run's folder lost between two
trainings. The argument is an empty folder; prints one line of JSON."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from s3_server import BUCKET, Server, s3_server
from small_data import small_config, write_config, write_small

from coe_dist.tracking import read_metrics

STEPS = 4  # of an epoch
COMMAND = [sys.executable, "-c", "from coe_dist.cli import main; main()"]


def run(
    server: Server, folder: Path, *arguments: str, meanwhile: Callable[[subprocess.Popen[str]], None] | None = None
) -> dict[str, object]:
    environment = {
        **os.environ,
        **server.environment,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "XDG_STATE_HOME": str(folder / "state"),
    }
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
    )
    if meanwhile is not None:
        meanwhile(process)
    out, err = process.communicate()
    return {"code": process.returncode, "out": out, "err": err}


def stop_after_a_save(run_dir: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        if any(record["kind"] == "checkpoint" for record in read_metrics(run_dir)):
            process.send_signal(signal.SIGTERM)
            return
        time.sleep(0.1)


def main(folder: Path) -> None:
    with s3_server(folder / "server.log") as server:
        client = server.client()
        for file in sorted(write_small(folder / "written").iterdir()):
            client.upload_file(str(file), BUCKET, f"data/small/{file.name}")
        shutil.rmtree(folder / "written")
        content = small_config(
            Path("unused"),
            folder / "runs",
            data={"folder": f"s3://{BUCKET}/data/small"},
            storage={"url": f"s3://{BUCKET}/runs"},
            training={"epochs": 100_000, "checkpoint_every": 5, "evaluate_every": 5},
            workers={"count": 2, "oversubscribe": True},
            tracking={"enabled": True, "every_steps": 1},
        )
        config = str(write_config(folder / "config.yaml", content))
        answers = {"nowhere": run(server, folder, "train", config, "data.folder=s3://no-such-bucket/data")}
        answers["first"] = run(
            server, folder, "train", config, meanwhile=lambda process: stop_after_a_save(folder / "runs/run", process)
        )
        step = int((folder / "runs/run/checkpoints/latest").read_text().removeprefix("step-"))
        shutil.rmtree(folder / "runs/run")
        answers["second"] = run(server, folder, "train", config, f"training.epochs={step // STEPS + 1}")
        shutil.rmtree(folder / "runs/run")
        answers["report"] = run(server, folder, "report", f"s3://{BUCKET}/runs/run")
        answers["inspect"] = run(server, folder, "inspect", f"s3://{BUCKET}/runs/run", "--json")
        answers["staged"] = run(server, folder, "data", "staged", "--json")
        names = sorted(server.names("runs/"))
        metrics = server.content("runs/run/metrics.jsonl").decode()
    print(json.dumps({"answers": answers, "names": names, "metrics": metrics, "step": step}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

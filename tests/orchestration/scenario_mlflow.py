"""Run by test_mlflow_server.py in a network of its own: `coe-dist train` against cluster/mlflow-server.sh.

The server is killed twice; the first time it comes back while training goes on, the second time after it. Prints what
came of it as JSON. Arguments: a folder, a configuration, the project folder."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from waiting import PATIENCE_SECONDS, until

from coe_dist import tracking
from coe_dist.config import load_config
from coe_dist.tracking.store import read_json
from coe_dist.training.stopping import preempted_at, request_stop

COE = [sys.executable, "-m", "coe_dist"]


class Server:
    def __init__(self, script, folder):
        with open(f"{folder}.log", "a") as log:
            self.process = subprocess.Popen([script, folder, "5000"], stdout=log, stderr=log, start_new_session=True)
        until(self.answers, f"answer of the server (see {folder}.log)", process=self.process)

    def answers(self):
        try:
            with urllib.request.urlopen("http://127.0.0.1:5000/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the server and its workers, nothing else
        self.process.wait()


def main(folder, path, project):
    run = load_config(path).run_dir
    script, store = str(project / "cluster" / "mlflow-server.sh"), str(folder / "store")

    def step():
        return max((record["step"] for record in tracking.read_metrics(run) if record["kind"] == "train"), default=0)

    def sent():
        return read_json(run / "mlflow-sync.json").get("offset", 0)

    def after(steps):
        begun = step()
        until(lambda: step() >= begun + steps or training.poll() is not None, f"{steps} more steps")

    server = Server(script, store)
    training = subprocess.Popen(
        [*COE, "train", str(path)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    found = {}
    try:
        until(lambda: sent() > 0 or training.poll() is not None, "values in MLflow")
        server.kill()
        found["killed_at"] = step()
        after(20)
        offset = sent()
        server = Server(script, store)
        until(lambda: sent() > offset, "values after the server came back")
        found["sent_by_itself"] = True
        server.kill()
        after(20)
        request_stop(run)
        _, found["errors"] = training.communicate(timeout=PATIENCE_SECONDS)
        found["code"], found["done"] = training.returncode, preempted_at(run)
        refused = subprocess.run([*COE, "mlflow", "sync", str(run)], capture_output=True, text=True, check=False)
        found["refused"] = {"code": refused.returncode, "err": refused.stderr}
        server = Server(script, store)
        for name in ("sync", "again"):
            sync = subprocess.run([*COE, "mlflow", "sync", str(run)], capture_output=True, text=True, check=False)
            found[name] = {"code": sync.returncode, "out": sync.stdout, "err": sync.stderr}
    finally:
        training.kill()
        server.kill()
    json.dump(found, sys.stderr)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))

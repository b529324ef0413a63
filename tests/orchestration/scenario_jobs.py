"""Run by test_jobs.py in a network of its own: a real Ray head, and `coe-dist launch`, `jobs`, `logs` and `stop` on it.

Prints what came of every command as JSON. Arguments: a folder, the data, the project folder."""

import http.server
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from ray_head import DASHBOARD, ray_head
from waiting import until

from coe_dist import tracking

COE = [sys.executable, "-m", "coe_dist"]


def coe(*words, **options):
    began = time.monotonic()
    done = subprocess.run([*COE, *words], capture_output=True, text=True, timeout=200, check=False, **options)
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr, "seconds": time.monotonic() - began}


def starts(run):
    return [record for record in tracking.read_metrics(run) if record["kind"] == "start"]


def trained(run):
    return [record["step"] for record in tracking.read_metrics(run) if record["kind"] == "train"]


def main(folder, data, project):
    os.chdir(project)
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    place, found = folder / "shared", {}
    run = place / "runs" / "first"
    settings = ["training.engine=torch", "training.global_batch=32", f"data.folder={data}", "data.limit=64"]
    launch = ["launch", "configs/smoke.yaml", *settings, "--name", "first"]
    endless = [*launch, "training.epochs=100000", "training.evaluate_every=100000"]
    with ray_head(2, token, COE_DIST_FOLDER=str(place)):
        following = subprocess.Popen(
            [*COE, *endless, "--address", DASHBOARD, "--env", "GREETING=hello"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        found["refusals"] = refusals(launch)
        until(lambda: trained(run) or following.poll() is not None, "steps")
        following.send_signal(signal.SIGINT)
        out, err = following.communicate(timeout=60)
        found["detached"] = {"code": following.returncode, "out": out, "err": err}
        found["again"] = coe(*endless, "--env", "GREETING=hello", "--no-wait")
        found["other"] = coe(*launch, "training.epochs=5")
        found["running"] = json.loads(coe("jobs", "--json", "--address", DASHBOARD)["out"])
        found["stop"] = coe("stop", "first", "--address", f"{DASHBOARD}/")
        found["stopped_at"] = json.loads((run / "preempted").read_text())["step"]
        found["stop_again"] = coe("stop", "first")
        epochs = found["stopped_at"] // 2 + 2
        found["resumed"] = coe(*launch, f"training.epochs={epochs}", "training.evaluate_every=100000")
        found["steps"], found["expected_steps"] = max(trained(run)), 2 * epochs
        found["starts"] = [record["step"] for record in starts(run)]
        found["failing"] = coe("launch", "configs/smoke.yaml", "--name", "failing", "--folder", str(folder / "nothing"))
        found["logs"] = coe("logs", "failing")
        found["jobs"] = json.loads(coe("jobs", "--json")["out"])
        found["table"] = coe("jobs")
    found["head_gone"] = coe("jobs")
    json.dump(found, sys.stderr)


def refusals(launch):
    """Each ends before anything is uploaded."""
    answers = {
        "nowhere": coe(*launch, "--address", "http://127.0.0.1:9"),
        "ftp": coe(*launch, "--address", "ftp://127.0.0.1:8265"),
        "token": coe(*launch, env={**os.environ, "RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}),
        "env": coe(*launch, "--env", "NOT_SET_ANYWHERE"),
        "unknown": coe("logs", "nobody"),
    }
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answers["other_server"] = coe("jobs", "--address", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    return answers


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))

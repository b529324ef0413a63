"""A real `ray start --head` for a scenario that runs in a network of its own: with a token, ended completely."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from coe_dist.orchestration.processes import end_marked, marking, new_mark

DASHBOARD = "http://127.0.0.1:8265"
RAY = str(Path(sys.executable).with_name("ray"))


@contextmanager
def ray_head(cpus, token_file, **variables):
    """Until the end of the block; `variables` are the head's environment, and so its jobs'."""
    mark, folder = new_mark(), Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))
    settings = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "COE_DIST_PYTHON": sys.executable,
        **variables,
    }
    command = [RAY, "start", "--head", "--port=6379", f"--num-cpus={cpus}", "--num-gpus=0", f"--temp-dir={folder}"]
    command += ["--dashboard-host=127.0.0.1", "--dashboard-port=8265", f"--object-store-memory={80 * 2**20}"]
    try:
        with marking(mark):
            marks = {name: value for name, value in os.environ.items() if name.startswith("COE_DIST_")}
            subprocess.run(command, env=settings | marks, check=True, stdout=subprocess.DEVNULL)
        _wait_for_dashboard()
        yield
    finally:
        end_marked(mark)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_dashboard(seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{DASHBOARD}/api/authentication_mode", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError("the dashboard of the Ray head does not answer")

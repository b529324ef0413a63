"""MLflow's own page on the recorded runs."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from pathlib import Path

from coe_dist.errors import InputError
from coe_dist.tracking import ui_command
from coe_dist.training.run_folder import load_run_config


def serve(run: Path, port: int) -> int:
    """Runs MLflow's server on 127.0.0.1 until Ctrl-C; returns its exit code."""
    runs_dir = Path(load_run_config(run).runs_dir) if (run / "config.yaml").is_file() else run
    if not (runs_dir / "mlflow.db").is_file():
        raise InputError(f"{runs_dir}: no mlflow.db here; give a run folder or the folder that holds the runs")
    command, environment = ui_command(runs_dir, port=port)
    process = subprocess.Popen(command, env=os.environ | environment)
    try:
        while process.poll() is None and not _answers(port):
            time.sleep(0.3)
        if process.poll() is None:
            print(f"MLflow: http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 0


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False

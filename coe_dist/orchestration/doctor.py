"""What this machine offers and whether every component really works on it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from coe_dist.errors import EXIT_FAILED, EXIT_OK
from coe_dist.orchestration.advice import advice_for
from coe_dist.orchestration.probes import PROBES
from coe_dist.orchestration.processes import end_marked, marking, marking_variable, new_mark
from coe_dist.resources import usable_cores, usable_memory

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = ("torch", "torchvision", "numpy", "numba", "ffcv", "deepspeed", "ray", "mlflow", "timm", "coe-dist")
_TIMEOUT_SECONDS = 180.0  # all probes at once on two busy cores took 70


def collect(*, timeout_seconds: float = _TIMEOUT_SECONDS) -> dict[str, Any]:
    """Versions, what the machine offers (bytes, cores), and one entry per probe; JSON-serialisable.

    Probes: {"name", "ok", "seconds", "problem", "advice"}; `problem` and `advice` are None where all is well.
    Every probe runs in a process of its own, which is ended with all it started after `timeout_seconds`.
    """
    results = _run_probes(timeout_seconds)
    told = {key: value for result in results for key, value in result.pop("told").items()}
    disk, memory = shutil.disk_usage(Path.cwd()), psutil.virtual_memory()
    machine = {
        "system": platform.platform(),
        "cores": usable_cores(),
        "cores_present": os.cpu_count(),
        "memory_bytes": usable_memory(),
        "memory_available_bytes": memory.available,
        "disk_free_bytes": disk.free,
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        "gpus": told.get("gpus", []),
        "distributed_backends": told.get("backends", []),
    }
    return {
        "ok": all(result["ok"] for result in results),
        "versions": versions(),
        "machine": machine,
        "probes": results,
    }


def diagnose(console: Console) -> int:
    """Prints the tables; returns the exit code: 0, or 1 when a component does not work."""
    from coe_dist.orchestration.doctor_tables import show

    with console.status("trying FFCV, DeepSpeed, Ray and MLflow (about a minute) ..."):
        findings = collect()
    show(findings, console)
    return EXIT_OK if findings["ok"] else EXIT_FAILED


def versions() -> dict[str, str | None]:
    """Installed versions by package name, None where missing. FFCV's own __version__ is wrong: metadata only."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _run_probes(timeout_seconds: float) -> list[dict[str, Any]]:
    """All probes, in their order, a few at a time; Ctrl-C ends them at once."""
    mark = new_mark()
    with marking(mark), ThreadPoolExecutor(max_workers=max(2, usable_cores() // 2)) as pool:
        try:
            return list(pool.map(lambda name: run_probe(name, timeout_seconds=timeout_seconds), PROBES))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end_marked(mark, grace_seconds=1.0)
            raise


def run_probe(name: str, *, timeout_seconds: float, command: list[str] | None = None) -> dict[str, Any]:
    """Runs one probe (or `command` in its place) and says how it ended; `told` is what it found out."""
    command = command or [sys.executable, "-m", "coe_dist.orchestration.probes", name]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(_package_parent()), *_search_path()]))
    started, mark = time.monotonic(), new_mark()
    with tempfile.TemporaryDirectory(prefix="coe-doctor-") as folder:
        log = Path(folder) / "output.txt"
        with log.open("wb") as output:
            # Its own session: Ctrl-C reaches the doctor alone, which then ends what carries the mark.
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment | marking_variable(mark),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_marked(mark, grace_seconds=3.0)
                process.wait()
        text = log.read_text(errors="replace")
    problem = _problem(code, text, timeout_seconds)
    return {
        "name": name,
        "ok": problem is None,
        "seconds": round(time.monotonic() - started, 1),
        "problem": problem,
        "advice": None if problem is None else advice_for(name, problem, text),
        "told": _told(text) if problem is None else {},
    }


def _problem(code: int | None, text: str, timeout_seconds: float) -> str | None:
    if code == 0:
        return None
    if code is None:
        return f"no answer within {timeout_seconds:.0f} s"
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else f"ended with exit code {code}"


def _told(text: str) -> dict[str, Any]:
    lines = text.strip().splitlines()
    try:
        told = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _package_parent() -> Path:
    return Path(__file__).resolve().parents[2]


def _search_path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]

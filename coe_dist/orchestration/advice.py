"""What to do about the failures people really meet, by the words they meet them in."""

from __future__ import annotations

import os
import re
from pathlib import Path

# (component or "" for any, pattern in problem or output, what to do); the first that fits is told
_ADVICE = (
    (
        "",
        r"No module named '(?:coe_dist|torch|ffcv|deepspeed|ray|mlflow)'",
        "install the project again in this environment: pip install -e .",
    ),
    (
        "FFCV",
        r"libturbojpeg|turbojpeg",
        "libturbojpeg is missing: apt-get install libturbojpeg0-dev, then pip install --force-reinstall --no-deps ffcv",
    ),
    (
        "FFCV",
        r"libopencv|opencv_imgproc|libGL\.so|libgthread|libglib",
        "OpenCV is incomplete: apt-get install libopencv-imgproc-dev libgl1 libglib2.0-0, then reinstall ffcv",
    ),
    (
        "FFCV",
        r"_libffcv",
        "FFCV's C++ part was not built: install g++, pkg-config, libturbojpeg0-dev and OpenCV, then reinstall ffcv",
    ),
    ("FFCV", r"libgomp|threading layer", "numba's OpenMP layer is missing: apt-get install libgomp1"),
    (
        "Ray",
        r"[Rr]efused|Failed to connect|timed out|unreachable|Network is down",
        "Ray could not reach itself: allow connections to this machine's own address (firewall, VPN; set no_proxy)",
    ),
    (
        "Ray",
        r"ray token|Ray token|AuthenticationError",
        "the Ray token file is not usable: see the line above; remove the file to have a new one made",
    ),
    (
        "MLflow",
        r"readonly|read-only|unable to open database",
        "MLflow cannot write its sqlite file: choose a writable folder or set tracking.uri",
    ),
    (
        "MLflow",
        r"database is locked",
        "another process holds the sqlite file (network file systems do not lock it well): set tracking.uri",
    ),
    ("", r"SIGILL", "a library was built for another processor: reinstall the component on this machine"),
    ("", r"SIGKILL", "the system ended it, most likely for want of memory: free some, or lower workers.count"),
    ("", r"No space left", "the disk is full: free space, or set TMPDIR to another disk"),
)


def advice_for(name: str, problem: str, output: str) -> str:
    """One or two sentences for the user. `output` is everything the probe printed."""
    locks = stale_build_locks() if name == "DeepSpeed" else []
    if locks and problem.startswith("no answer"):
        names = ", ".join(map(str, locks))
        return f"a killed build left a lock that later starts wait for (pytorch#189245); remove {names}"
    for component, pattern, advice in _ADVICE:
        if component in ("", name) and re.search(pattern, f"{problem}\n{output}"):
            return advice
    if problem.startswith("no answer"):
        return "it hangs: look for a process that waits on a lock or a mount, and run coe-dist doctor again"
    return f"run it by hand to see all of it: python -m coe_dist.orchestration.probes {name}"


def stale_build_locks() -> list[Path]:
    """Lock files of torch's extension builds; while none is being built, each is left over from a killed one."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    return sorted(root.rglob("lock")) if root.is_dir() else []

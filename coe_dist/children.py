"""Processes of this package that a process of it starts: what they need to be found, and what is said of their end."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

_END_SECONDS = 5.0


def search_path() -> str:
    """PYTHONPATH for a child: the package of this process first, also where it is not installed."""
    folders = [str(Path(__file__).resolve().parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(filter(None, folders)))


def ending(process: subprocess.Popen[bytes]) -> str:
    """How a child ended that answers no more, in words; waits some seconds for its end."""
    try:
        code = process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        return "it closed its connection"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

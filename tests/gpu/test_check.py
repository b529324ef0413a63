"""The GPU check itself, on the CPU, where nothing but torch, numpy and numba may be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# found by the check and by the ranks it starts: an import of any of these fails
BLOCK = """
import sys
for name in ("pydantic", "omegaconf", "typer", "rich", "ray", "deepspeed", "ffcv", "mlflow", "timm", "torchvision"):
    sys.modules[name] = None
"""


def test_the_gpu_check_runs_where_only_torch_and_numba_are(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    check = Path(__file__).with_name("check.py")
    done = subprocess.run(
        [sys.executable, str(check), "--device", "cpu"],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COE_TEST_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "12 passed, 0 failed"

"""A run folder with records and saves, made without training."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from coe_dist.config import parse_config


def stored_run(folder: Path, name: str = "demo", *, url: str | None = None) -> Path:
    config = parse_config({"name": name, "runs_dir": str(folder), "storage": {"url": url}})
    run = config.run_dir
    (run / "logs").mkdir(parents=True)
    (run / "config.yaml").write_text(config.to_yaml())
    record(run, f"start of {folder}")
    (run / "logs/rank-0000.log").write_text("hello\n")
    # not of the run's copy: a wish, and what is being written
    (run / "stop-requested").touch()
    (run / ".metrics.partial").write_text("half")
    (run / "ray").mkdir()
    (run / "ray/state").write_text("of this moment")
    return run


def record(run: Path, line: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": line}) + "\n")


def save(run: Path, step: int, *, best: bool = False, size: int = 1000) -> Path:
    """As saving.py does it: complete in one moment."""
    checkpoints = run / "checkpoints"
    name = f"step-{step:08d}"
    partial = checkpoints / f".partial-{name}"
    partial.mkdir(parents=True)
    files = {}
    for stem in ("delegator", "expert-0000"):
        content = f"{stem} {step} ".encode() * size
        (partial / f"{stem}.safetensors").write_bytes(content)
        files[f"{stem}.safetensors"] = hashlib.sha256(content).hexdigest()
    (partial / "manifest.json").write_text(json.dumps({"step": step, "files": files}))
    partial.rename(checkpoints / name)
    (checkpoints / "latest").write_text(name)
    if best:
        (checkpoints / "best").write_text(json.dumps({"save": name, "top1": 0.5}))
    return checkpoints / name


def unsave(run: Path, step: int) -> None:
    shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")


def content(run: Path) -> dict[str, bytes]:
    """What the run and its copy share."""
    kept = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_file() and not name.startswith("ray/") and "/." not in f"/{name}" and name != "stop-requested":
            kept[name] = path.read_bytes()
    return kept

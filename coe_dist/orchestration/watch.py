"""Watching a run from its folder alone, wherever it trains: a frame of what metrics.jsonl and the checkpoints say."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from coe_dist.console import table_console
from coe_dist.errors import InputError
from coe_dist.orchestration.progress import bars, render
from coe_dist.orchestration.progress_state import ProgressState, clock, percent
from coe_dist.orchestration.tail import FileTail
from coe_dist.tracking import METRICS_FILE
from coe_dist.tracking.journal import parse_line

EVERY_SECONDS = 1.0
AGAIN_SECONDS = 15.0  # between questions to a store
QUIET_SECONDS = 120.0  # and five times the longest gap between its records: then a run may have died
ROWS = 16  # more experts are told by bars alone


@dataclass
class Watched:
    """What the records say beyond the progress display's figures."""

    progress: ProgressState = field(default_factory=ProgressState)
    start: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    history: dict[int, float] = field(default_factory=dict)  # validation top-1 by epoch
    warning: str = ""
    heard: float | None = None  # when the newest record was written
    gap: float = 0.0  # seconds; the longest time between two records of one start
    ended: str = ""  # how the run ended, if it did

    def read(self, line: str) -> None:
        record = parse_line(line)
        if record is None or not isinstance(record.get("time"), int | float):
            return
        self.progress.read(line)
        kind, before, self.heard = record["kind"], self.heard, float(record["time"])
        if before is not None and kind != "start":
            self.gap = max(self.gap, self.heard - before)
        if kind == "start":
            self.start, self.ended, self.warning = record, "", ""
        elif kind == "checkpoint":
            self.checkpoint = record
        elif kind == "evaluation" and "val/top1" in self.progress.evaluation:
            self.history[self.progress.epoch] = self.progress.evaluation["val/top1"]
        elif kind == "warning":
            self.warning = str(record.get("message", ""))
        elif kind == "preempted":
            self.ended = f"stopped at step {record.get('step')}, resumable"
        elif kind == "end":
            self.ended = "finished"


def watch(
    run: Path, *, once: bool = False, console: Console | None = None, again: Callable[[], object] | None = None
) -> None:
    """Shows a run until it has ended; with `once` a single frame. Ctrl-C ends the watching, never the run.

    Reads only the run folder; again: brings it up to date where it is a copy. Raises InputError where it is none.
    """
    path = run / METRICS_FILE
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder")
    if not path.is_file() and not (run / "config.yaml").is_file():
        raise InputError(f"{run}: not a run folder; it holds neither {METRICS_FILE} nor config.yaml")
    console, watched, tail = console or table_console(), Watched(), FileTail(path, from_start=True)

    def newest() -> Group:
        for line in tail.new_lines():
            watched.read(line)
        return frame(run, watched, time.time())

    if once:
        console.print(newest())
        return
    try:
        with Live(newest(), console=console, auto_refresh=False) as live:
            asked = time.monotonic()
            while not watched.ended:
                time.sleep(EVERY_SECONDS)
                if again is not None and time.monotonic() - asked > AGAIN_SECONDS:
                    with suppress(InputError):  # a store that does not answer now
                        again()
                    asked = time.monotonic()
                live.update(newest(), refresh=True)
    except KeyboardInterrupt:
        pass


def frame(run: Path, watched: Watched, now: float) -> Group:
    """One picture of the run at the time `now` (seconds since 1970)."""
    lines: list[RenderableType] = [
        Text(f"{run}: {_state(watched, now)}", style="bold"),
        render(watched.progress, running=not watched.ended),
    ]
    lines += [
        Text(line) for line in (_history(watched), _where(watched), _saved(watched, now), watched.warning) if line
    ]
    table = _experts(watched.progress)
    return Group(*lines, *([table] if table is not None else []))


def _state(watched: Watched, now: float) -> str:
    if watched.ended:
        return watched.ended
    if watched.heard is None:
        return "nothing recorded yet"
    silent = max(0.0, now - watched.heard)
    if silent > max(QUIET_SECONDS, 5 * watched.gap):
        return f"no word for {clock(silent)}; it may have died"
    return f"running, newest record {clock(silent)} old"


def _history(watched: Watched) -> str:
    values = [watched.history[epoch] for epoch in sorted(watched.history)][-40:]
    if len(values) < 2:
        return ""
    first, last, best = (percent(value) for value in (values[0], values[-1], max(values)))
    return f"top-1 by validation |{bars(values)}| {first} to {last}, best {best}"


def _where(watched: Watched) -> str:
    start = watched.start
    if not start:
        return ""
    workers = int(start.get("world_size", 0))
    parts = [f"{workers} worker{'' if workers == 1 else 's'}"]
    if start.get("task") == "baseline":
        parts.append("one network alone")
    elif "experts" in start:
        seen = start.get("experts_per_sample")
        parts.append(f"{start['experts']} experts" + (f", {seen:g} for each training image" if seen else ""))
    parts.append(f"{int(start.get('images', 0)):,} images")
    if watched.progress.resumed_from:
        parts.append(f"resumed from {watched.progress.resumed_from}")
    return ", ".join(parts)


def _saved(watched: Watched, now: float) -> str:
    save = watched.checkpoint
    if not save:
        return "no checkpoint yet" if watched.start else ""
    figures = save.get("metrics") or {}
    line = f"checkpoint {save.get('save')}, {clock(max(0.0, now - float(save['time'])))} old"
    size, seconds = figures.get("checkpoint/bytes"), figures.get("checkpoint/seconds")
    return line if size is None or seconds is None else f"{line}, {size / 1e6:.1f} MB in {seconds:.1f} s"


def _experts(progress: ProgressState) -> Table | None:
    """Each expert's share of training and validation images, and its top-1 where it is chosen."""
    figures = {
        int(match[1]): {kind: progress.evaluation.get(f"expert/{match[1]}/{kind}") for kind in ("val_load", "accuracy")}
        for name in progress.evaluation
        if (match := re.fullmatch(r"expert/(\d+)/val_load", name))
    }
    if not 0 < len(figures) <= ROWS:
        return None
    table = Table(
        "expert", "assigned in training", "chosen on validation", "top-1 where chosen", box=None, padding=(0, 2)
    )
    for expert, values in sorted(figures.items()):
        assigned = progress.loads[expert] if expert < len(progress.loads) else None
        cells = [assigned, values["val_load"], values["accuracy"]]
        table.add_row(str(expert), *("–" if cell is None else percent(cell) for cell in cells))
    return table

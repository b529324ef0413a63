"""Shows a running job: follows <run_dir>/metrics.jsonl while the workers train elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coe_dist.orchestration.progress_state import ProgressState, clock, percent
from coe_dist.orchestration.tail import FileTail

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_EVERY_SECONDS = 0.3


class ProgressDisplay:
    """A live display in a terminal; one line an epoch where output goes to a file or a pipe.

    Only lines that are appended after start() count, so a resumed run does not replay its past.
    """

    def __init__(self, run_dir: Path | str, console: Console | None = None) -> None:
        self._path = Path(run_dir) / "metrics.jsonl"
        self._console = console or Console()
        self._state = ProgressState()
        self._told_epoch = -1  # the newest epoch that has its line
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread that follows the file, which may not exist yet."""
        tail = FileTail(self._path)
        show = self._show_live if self._console.is_terminal else self._show_lines
        self._thread = threading.Thread(target=show, args=(tail,), name="progress display", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Shows what was appended last and ends the thread. Harmless when called twice or without start()."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _show_live(self, tail: FileTail) -> None:
        with Live(render(self._state), console=self._console, auto_refresh=False) as live:
            ending = False
            while not ending:
                ending = self._stopping.wait(_EVERY_SECONDS)
                for line in tail.new_lines():
                    record = self._state.read(line)
                    if record is not None and record["kind"] == "start" and self._state.resumed_from:
                        self._say(self._state.start_line())  # above the live part, where it stays
                live.update(render(self._state, running=not ending), refresh=True)

    def _show_lines(self, tail: FileTail) -> None:
        ending = False
        while not ending:
            ending = self._stopping.wait(_EVERY_SECONDS)
            for line in tail.new_lines():
                self._tell(line)

    def _tell(self, line: str) -> None:
        """Prints an epoch's line at its evaluation, or when the next epoch begins, and one line at both ends."""
        state = self._state
        before, line_before = state.epoch, state.epoch_line()
        record = state.read(line)
        kind = None if record is None else record["kind"]
        if kind == "start":
            self._told_epoch = -1
            self._say(state.start_line())
        elif kind == "evaluation":
            self._told_epoch = state.epoch
            self._say(state.epoch_line())
        elif (kind == "end" or (kind == "train" and state.epoch > before)) and before > self._told_epoch:
            self._told_epoch = before
            self._say(line_before)
        if kind == "end" and state.seconds is not None and not state.began_at_its_end:
            self._say(f"trained {state.step - state.first_step} steps in {clock(state.seconds)}")

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def render(state: ProgressState, *, running: bool = True) -> Group:
    """The live display: where the run stands, its losses, its newest evaluation, the load of every expert."""
    if state.total_steps == 0 and state.seconds is None:
        return Group(Text("workers are starting ..." if running else ""))
    where = Table.grid(padding=(0, 2))
    cells: list[Text | ProgressBar] = [
        Text(f"epoch {max(state.epoch, 0) + 1}/{state.epochs}"),
        ProgressBar(total=state.total_steps, completed=state.step, width=30),
        Text(f"step {state.step}/{state.total_steps}"),
    ]
    if "train/images_per_second" in state.train:
        cells.append(Text(f"{state.train['train/images_per_second']:,.0f} images/s"))
    if state.seconds is not None:
        cells.append(Text(f"done in {clock(state.seconds)}"))
    elif running and state.seconds_left is not None:
        cells.append(Text(f"{clock(state.seconds_left)} left"))
    where.add_row(*cells)
    lines = [_losses(state), _evaluation(state), _loads(state.loads)]
    return Group(where, *(Text(line) for line in lines if line))


def _losses(state: ProgressState) -> str:
    train = state.train
    if "train/loss" not in train:
        return ""
    parts = [
        f"{name} {train[key]:.3f}"
        for name in ("experts", "delegator", "selection")
        if (key := f"train/loss_{name}") in train
    ]
    line = f"loss {train['train/loss']:.3f}" + (f" ({', '.join(parts)})" if parts else "")
    if "train/top1_delegator" in train:
        line += f", delegator's top-1 {percent(train['train/top1_delegator'])}"
    return line


def _evaluation(state: ProgressState) -> str:
    values = state.evaluation
    if "val/top1" not in values:
        return ""
    names = {"val/top1_delegator": "delegator", "val/top1_oracle": "oracle", "val/exit_rate": "early exits"}
    parts = [f"{name} {percent(values[key])}" for key, name in names.items() if key in values]
    if "val/average_macs" in values:
        parts.append(f"{values['val/average_macs']:,.0f} MACs on average")
    return f"{state.split} top-1 {percent(values['val/top1'])}" + (f" ({', '.join(parts)})" if parts else "")


def _loads(loads: list[float]) -> str:
    """One bar an expert, then the extremes."""
    largest = max(loads, default=0.0)
    if not largest > 0:
        return ""
    return f"expert loads |{bars(loads)}| {percent(min(loads))} to {percent(largest)}"


def bars(values: Sequence[float]) -> str:
    """One bar a value, as high as its share of the largest."""
    largest = max(values, default=0.0)
    return "".join(_EIGHTHS[max(1, round(8 * value / largest))] if value > 0 else _EIGHTHS[0] for value in values)

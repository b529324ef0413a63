"""`coe-dist watch` on the folder of a real run: finished, cut off, and while its records arrive."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from trained_run import real_run
from waiting import until

from coe_dist.errors import InputError
from coe_dist.orchestration import watch as module
from coe_dist.orchestration.watch import Watched, frame, watch


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_run(tmp_path_factory.getbasetemp())


def printed(run: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    watch(run, once=True, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_finished_run(run: Path) -> None:
    text = printed(run)
    end = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert end["kind"] == "end"
    assert ": finished" in text
    assert "epoch 2/2" in text
    assert "step 8/8" in text
    assert "2 workers, 3 experts, 2 for each training image, 101 images" in text
    assert "checkpoint step-00000008, " in text
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "evaluation":
            newest = record["metrics"]
    assert f"validation top-1 {100 * newest['val/top1']:.2f}%" in text
    for expert in range(3):
        assert f"{100 * newest[f'expert/{expert:02d}/val_load']:.2f}%" in text


def test_a_run_that_says_nothing_any_more(run: Path, tmp_path: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # the last one is torn
    watched = Watched()
    for line in lines[:3]:
        watched.read(line)
    assert watched.heard is not None

    def first_line(later: float) -> str:
        console = Console(file=io.StringIO(), width=200)
        console.print(frame(tmp_path, watched, watched.heard + later))  # type: ignore[operator]
        return console.file.getvalue().splitlines()[0]  # type: ignore[attr-defined]

    assert first_line(5).endswith("running, newest record 0:00:05 old")
    assert first_line(5 * watched.gap + 3600).endswith("it may have died")
    assert "no checkpoint yet" in printed(tmp_path)


def test_it_follows_and_ends_with_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.05)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (tmp_path / "config.yaml").touch()  # as training begins: no record yet
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    watching = threading.Thread(target=watch, args=(tmp_path,), kwargs={"console": console}, daemon=True)
    watching.start()
    until(lambda: "nothing recorded yet" in console.file.getvalue(), "first screen")  # type: ignore[attr-defined]
    for record in records:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record | {"time": time.time()}) + "\n")
        time.sleep(0.1)
    watching.join(timeout=30)
    assert not watching.is_alive()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "running, newest record" in text
    assert "finished" in text


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        watch(tmp_path / "nowhere", once=True)
    with pytest.raises(InputError, match="not a run folder"):
        watch(tmp_path, once=True)

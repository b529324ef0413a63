"""Where the router's problems are solved changes nothing about the answers; a router process never ends unnoticed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from ranks import TESTS, run_ranks

from coe_dist.config import parse_config
from coe_dist.errors import InputError, TrainingError
from coe_dist.parallel.process_solver import answer
from coe_dist.parallel.router_process import ChildChannel
from coe_dist.parallel.solvers import Problems

WITH_CHILD = """
import sys, time
from coe_dist.parallel.router_process import ChildChannel
from coe_dist.parallel.solvers import Problems
channel = ChildChannel(Problems(2, "best", 1.0))
print(channel.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which both ranks of place_cases.run left their findings; the ranks assert most things."""
    folder = tmp_path_factory.mktemp("places")
    run_ranks(2, "parallel.place_cases:run", folder)
    return folder


def test_all_places_give_identical_plans(ranks: Path) -> None:
    assert len(list(ranks.glob("places-agreed-*"))) == 2


def test_local_scope_solves_each_ranks_rows_alone(ranks: Path) -> None:
    assert len(list(ranks.glob("local-agreed-*"))) == 2


def test_end_of_the_router_process_ends_the_step_on_every_rank(ranks: Path) -> None:
    found = [json.loads((ranks / f"ended-{rank}.json").read_text()) for rank in range(2)]
    killed = r"router process \(pid \d+\) ended: killed by SIGKILL"
    expected = {
        "between steps": killed,
        "owing labels": killed,
        "afterwards": killed,
        "stopped": r"router process \(pid \d+\) gave no answer in 1 s",
        "no such rule": r"router process \(pid \d+\) failed: ValueError: labels: 'no such rule' is not allowed; .*",
    }
    for name, pattern in expected.items():
        messages = {told[name]["message"] for told in found}
        assert len(messages) == 1, "every rank must tell the same"
        assert re.fullmatch(pattern, messages.pop()), name
    for told in found:  # the collectives' timeout is 60 s, the patience of rank 0 30 s: nobody waited for them
        assert all(told[name]["seconds"] < 25 for name in expected if name != "between steps")


def parent_and_child(code: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    return parent, child


def test_child_ends_with_its_parent() -> None:
    """Also when the parent is killed and another process still holds its end of the connection."""
    parent, child = parent_and_child(WITH_CHILD)
    assert child.is_running()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=60)  # it may still be importing torch
    assert not alive


def test_idle_child_notices_that_it_was_adopted() -> None:
    """The connection stays open here (as if a fork of the parent held it), so only the parent's id can tell."""
    code = WITH_CHILD.replace("time.sleep(600)", "import os\nos.fork()\ntime.sleep(600)")
    parent, child = parent_and_child(code)
    (fork,) = _others(parent.pid, child.pid)
    parent.kill()
    parent.wait()
    try:
        _, alive = psutil.wait_procs([child], timeout=60)
        assert not alive
        assert fork.is_running()
    finally:
        fork.kill()


def _others(parent: int, known: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if found := [child for child in psutil.Process(parent).children() if child.pid != known]:
            return found
        time.sleep(0.05)
    raise AssertionError("no fork appeared")


def test_close_leaves_no_process_and_does_not_wait_for_a_stopped_one() -> None:
    channel = ChildChannel(Problems(2, "best", 1.0))
    child = psutil.Process(channel.pid)
    os.kill(channel.pid, signal.SIGSTOP)
    ticket = channel.submit("assign", (np.zeros((2**20, 2)), np.arange(2**20)))
    channel.close()
    assert not child.is_running()
    with pytest.raises(TrainingError, match="ended: killed by SIGKILL"):
        channel.result(ticket, 1.0)


def test_unknown_request_is_refused() -> None:
    with pytest.raises(ValueError, match="'solve' is not allowed; give assign or labels"):
        answer(Problems(2, "best", 1.0), "solve", ())


@pytest.mark.parametrize("where", ["rank0", "process"])
def test_local_scope_refuses_a_place(where: str) -> None:
    with pytest.raises(InputError, match=f"router.where: {where} is not allowed; router.scope: local solves on every"):
        parse_config({"name": "x", "router": {"scope": "local", "where": where}})

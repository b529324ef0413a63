"""Pieces side by side give what they give one after the other, and leave the process as it was."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from coe_dist.coe.side_by_side import run_pieces

THREADS = 3


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def test_each_piece_meets_its_own_work_wherever_it_runs() -> None:
    places: set[str] = set()

    def piece(factor: int, rows: torch.Tensor) -> torch.Tensor:
        places.add(threading.current_thread().name)
        assert torch.is_inference_mode_enabled()
        return rows * factor

    rows = torch.arange(64.0)
    for sizes in ([8] * 8, [1] * 3, [21, 21, 1, 21], [60, 4], [64]):
        places.clear()
        parts = torch.split(rows[: sum(sizes)], sizes)
        with torch.inference_mode():
            answers = run_pieces(
                [(lambda part, factor=factor: piece(factor, part), part) for factor, part in enumerate(parts)]
            )
        for factor, (answer, part) in enumerate(zip(answers, parts, strict=True)):
            assert torch.equal(answer, part * factor)
        aside = max(sizes) * THREADS <= sum(sizes)
        assert any(name.startswith("expert") for name in places) is aside
    assert run_pieces([]) == []


def test_a_piece_computes_with_one_thread_and_others_as_before() -> None:
    seen = run_pieces([(lambda rows: rows + torch.get_num_threads(), torch.zeros(1)) for _ in range(6)])
    assert [int(answer) for answer in seen] == [1] * 6
    assert torch.get_num_threads() == THREADS
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == THREADS


def test_an_error_in_a_piece_arrives() -> None:
    def refuse(rows: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"rows: {len(rows)}")

    with pytest.raises(ValueError, match="rows: 2"):
        run_pieces([(refuse, torch.zeros(2))] * 3)


def test_a_forked_child_starts_threads_of_its_own() -> None:
    code = (
        "import os, torch\n"
        "from coe_dist.coe.side_by_side import run_pieces\n"
        "torch.set_num_threads(2)\n"
        "def answers(): return [int(a) for a in run_pieces([(lambda rows: rows + 1, torch.zeros(1))] * 4)]\n"
        "assert answers() == [1] * 4\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if answers() == [1] * 4 else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)

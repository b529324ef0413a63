"""The router benchmark's smallest cases run, agree with their exact peers and have the promised form."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from coe_dist.bench.record import case, machine, timed, versions
from coe_dist.bench.router import run_router_bench, scores_of
from coe_dist.bench.router_peers import Problem, base_auction, ortools_flow, pot_emd, scipy_assignment
from coe_dist.errors import InputError


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ot" else find(name, *rest))
    with pytest.raises(InputError, match=r"^bench router needs the package ot; run: pip install -e '\.\[bench\]' "):
        run_router_bench(quick=True)


def test_quick_run_has_every_peer_and_no_gap_to_the_exact_ones() -> None:
    record = json.loads(json.dumps(run_router_bench(quick=True)))
    assert record["name"] == "router"
    assert set(record["machine"]) == {"processor", "cores", "memory_gib", "system", "python"}
    solved, placed = record["cases"][:6], record["cases"][6:]
    assert [c["case"]["kind"] for c in solved] == ["dense"] * 3 + ["sparse"] * 3
    for measured in solved:
        dense = measured["case"]["kind"] == "dense"
        assert set(measured["peers"]) == ({"pot_emd", "scipy", "ortools", "auction"} if dense else {"ortools"})
        assert measured["ours"]["gap"] == 0.0
        assert measured["ours"]["seconds"] > 0
        assert measured["ours"]["seconds_cold"] > 0
        for name, peer in measured["peers"].items():
            assert peer["ratio"] == peer["seconds"] / measured["ours"]["seconds"]
            assert 0 <= peer["gap"] < 0.2 if name == "auction" else peer["gap"] == 0
    assert [c["case"] for c in placed] == [
        {"where": where, "samples": 256, "experts": 4, "world_size": 2} for where in ("replicated", "rank0", "process")
    ]
    assert all(
        set(c["ours"]) == {"seconds", "spread", "added_seconds", "cpu_seconds"} and c["peers"] == {} for c in placed
    )


@pytest.mark.parametrize("solver", [pot_emd, scipy_assignment, ortools_flow, base_auction])
def test_peers_solve_a_problem_with_a_known_answer(solver) -> None:
    values_NE = np.array([[9, 0], [8, 0], [7, 6], [9, 7]]) << 20  # rows 0 and 1 need expert 0
    problem = Problem(values_NE, np.broadcast_to(np.arange(2), (4, 2)), 2)
    expert_N = solver(problem)
    assert expert_N.tolist() == [0, 0, 1, 1]
    assert problem.objective(expert_N) == 30 << 20


def test_problem_refuses_an_assignment_with_wrong_loads() -> None:
    problem = Problem(np.zeros((4, 2), np.int64), np.broadcast_to(np.arange(2), (4, 2)), 2)
    with pytest.raises(ValueError, match="loads from 1 to 3"):
        problem.objective(np.array([0, 0, 0, 1]))


def test_trained_scores_are_log_probabilities_that_differ_by_seed() -> None:
    first_NE, second_NE = (scores_of("trained", 50, 4, seed) for seed in (0, 1))
    assert np.allclose(np.exp(first_NE).sum(1), 1, atol=1e-5)
    assert not np.allclose(first_NE, second_NE)


def test_record_parts() -> None:
    assert versions("numpy", "no-such-package-here") == {
        "numpy": np.__version__,
        "no-such-package-here": "not installed",
    }
    assert machine()["cores"] >= 1
    calls: list[int] = []
    median, spread = timed(lambda: calls.append(1), 3)
    assert len(calls) == 3
    assert median >= 0
    assert spread >= 0
    assert case({"n": 1}, {"seconds": 2.0}, {"peer": {"seconds": 8.0}})["peers"]["peer"] == {
        "seconds": 8.0,
        "ratio": 4.0,
    }

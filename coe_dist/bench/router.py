"""The router's transportation solver against POT, scipy, OR-tools and the auction of BASE layers.

Every case is one batch of scores. "seconds" is our time with the prices of an earlier batch (warm, as in training),
"seconds_cold" without; both include rounding the scores and checking the certificate, one thread. gap is the distance
to the best objective found, relative to it, on the same integer scores. A peer is left out of a case that is too large
for it (router_peers.PEERS has the limits). An exact peer that disagrees with us is an error, not a row.
router_places.py compares the places where the problems of a step can be solved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coe_dist.bench.record import Record, case, machine, timed, versions
from coe_dist.bench.router_peers import PEERS, Problem
from coe_dist.bench.router_places import place_cases
from coe_dist.coe.transport import SCORE_UNIT, Assignment, balanced_assignment, balanced_assignment_sparse
from coe_dist.extras import require

SIZES = [(1024, 16), (4096, 16), (16384, 64), (65536, 64)]
KINDS = ["trained", "random", "tied"]


def run_router_bench(*, quick: bool = False) -> Record:
    """Measures all sections; quick: only their smallest cases (for a test). record.py has the answer's form."""
    require("bench router", ("ot", "ortools"), "bench")
    cases = [measured for section in SECTIONS for measured in section(quick)]
    packages = versions("coe-dist", "numpy", "numba", "POT", "scipy", "ortools")
    return {"name": "router", "machine": machine(), "versions": packages, "cases": cases}


def dense_cases(quick: bool) -> list[Record]:
    """Weight generation: every sample may go to every expert."""
    sizes = [(256, 8)] if quick else SIZES
    return [_dense_case(samples, experts, kind) for samples, experts in sizes for kind in KINDS]


def sparse_cases(quick: bool) -> list[Record]:
    """Label generation with k = 2: a sample may go to one of its two dispatched experts."""
    sizes = [(256, 8)] if quick else SIZES
    return [_sparse_case(samples, experts, kind) for samples, experts in sizes for kind in KINDS]


# Functions of `quick` that return cases.
SECTIONS: list[Callable[[bool], list[Record]]] = [dense_cases, sparse_cases, place_cases]


def scores_of(kind: str, samples: int, experts: int, seed: int) -> NDArray[np.float32]:
    """Scores [N,E] of a batch.

    trained: log-softmax of confident logits with class structure, classes of unequal size, the same classes for every
    seed; random: standard normal; tied: 0, 1 or 2.
    """
    generator = np.random.default_rng([seed, samples, experts])
    if kind == "tied":
        return generator.integers(0, 3, (samples, experts)).astype(np.float32)
    scores_NE = generator.standard_normal((samples, experts))
    if kind == "trained":
        classes = np.random.default_rng(experts)
        frequency, centre = classes.dirichlet(np.ones(100)), 3 * classes.standard_normal((100, experts))
        scores_NE += centre[generator.choice(100, samples, p=frequency)]
        scores_NE -= scores_NE.max(1, keepdims=True)
        scores_NE -= np.log(np.exp(scores_NE).sum(1, keepdims=True))
    return scores_NE.astype(np.float32)


def _dense_case(samples: int, experts: int, kind: str) -> Record:
    scores_NE, ids_N = scores_of(kind, samples, experts, 1), np.arange(samples)
    before = balanced_assignment(scores_of(kind, samples, experts, 0), ids_N)

    def solve(warm: bool) -> Assignment:
        return balanced_assignment(scores_NE, ids_N, warm_prices_E=before.prices_E if warm else None)

    edges_NE = np.broadcast_to(np.arange(experts), scores_NE.shape)
    return _measure("dense", kind, Problem(_whole(scores_NE), edges_NE, experts), solve)


def _sparse_case(samples: int, experts: int, kind: str) -> Record:
    ids_N = np.arange(samples)
    home_N = ids_N % experts
    shift_N = np.random.default_rng(2).integers(1, experts, samples)
    edges_Nk = np.stack([home_N, (home_N + shift_N) % experts], 1)

    def solve_batch(seed: int, prices_E: NDArray[np.int64] | None) -> Assignment:
        scores_Nk = np.take_along_axis(scores_of(kind, samples, experts, seed), edges_Nk, 1)
        return balanced_assignment_sparse(
            scores_Nk, edges_Nk, experts, ids_N, feasible_N=home_N, warm_prices_E=prices_E
        )

    before = solve_batch(0, None)
    scores_Nk = np.take_along_axis(scores_of(kind, samples, experts, 1), edges_Nk, 1)

    def solve(warm: bool) -> Assignment:
        prices_E = before.prices_E if warm else None
        return balanced_assignment_sparse(
            scores_Nk, edges_Nk, experts, ids_N, feasible_N=home_N, warm_prices_E=prices_E
        )

    return _measure("sparse", kind, Problem(_whole(scores_Nk), edges_Nk, experts), solve)


def _whole(scores: NDArray[Any]) -> NDArray[np.int64]:
    return np.rint(np.clip(scores.astype(np.float64), -128, 128) / SCORE_UNIT).astype(np.int64)


def _measure(form: str, kind: str, problem: Problem, solve: Callable[[bool], Assignment]) -> Record:
    answer = solve(True)  # also compiles
    objectives = {"ours": problem.objective(answer.expert_N)}
    edges = problem.values_Nk.size
    seconds, spread = timed(lambda: solve(True), 15 if edges <= 2**17 else 5)
    seconds_cold, spread_cold = timed(lambda: solve(False), 15 if edges <= 2**17 else 5)
    peers: dict[str, Record] = {}
    for name, (solver, exact, dense_limit, sparse_limit) in PEERS.items():
        if edges > (dense_limit if form == "dense" else sparse_limit):
            continue
        objectives[name] = problem.objective(solver(problem))  # also imports
        if exact and objectives[name] != objectives["ours"]:
            raise AssertionError(f"router bench: {name} found {objectives[name]}, we found {objectives['ours']}")
        peer_seconds, peer_spread = timed(partial(solver, problem), 5 if edges <= 2**16 else 1)
        peers[name] = {"seconds": peer_seconds, "spread": peer_spread, "exact": exact}
    best = max(objectives.values())
    for name, peer in peers.items():
        peer["gap"] = _gap(objectives[name], best)
    ours = {
        "seconds": seconds,
        "spread": spread,
        "seconds_cold": seconds_cold,
        "spread_cold": spread_cold,
        "gap": _gap(objectives["ours"], best),
    }
    fields = {"samples": problem.samples, "experts": problem.experts, "scores": kind, "kind": form}
    return case(fields, ours, peers)


def _gap(objective: int, best: int) -> float:
    return (best - objective) / max(abs(best), 1)

"""Other ways to solve the router's problem: POT, scipy, OR-tools and the auction of BASE layers.

Each takes a Problem and returns an assignment [N], int64. They get the integer scores ready made; our own solver's time
includes making them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
FORBIDDEN = -(2**36)  # value of a missing edge in a dense matrix: below any sum that an optimum would give up for it


@dataclass(frozen=True)
class Problem:
    """N samples, E experts, E divides N. values_Nk int64 [N,k] along edges_Nk [N,k] (k = E: all edges, in order)."""

    values_Nk: Ints
    edges_Nk: Ints
    experts: int

    @property
    def samples(self) -> int:
        return int(self.values_Nk.shape[0])

    @property
    def capacity(self) -> int:
        return self.samples // self.experts

    @cached_property
    def dense(self) -> NDArray[np.float64]:
        """values [N,E] as float64 (exact: below 2^53); made once, before a peer is timed."""
        values_NE = np.full((self.samples, self.experts), float(FORBIDDEN))
        np.put_along_axis(values_NE, self.edges_Nk, self.values_Nk.astype(np.float64), 1)
        return values_NE

    def objective(self, expert_N: Ints) -> int:
        """Sum of values of an assignment. Raises ValueError if a load or an edge is wrong."""
        loads_E = np.bincount(expert_N, minlength=self.experts)
        chosen_Nk = self.edges_Nk == expert_N[:, None]
        if (loads_E != self.capacity).any() or not (chosen_Nk.sum(1) == 1).all():
            raise ValueError(f"assignment: loads from {loads_E.min()} to {loads_E.max()} or an edge are not allowed")
        return int(self.values_Nk[chosen_Nk].sum())


def pot_emd(problem: Problem) -> Ints:
    """POT's network simplex, on costs = largest value - value."""
    import ot

    values_NE = problem.dense
    supply, demand = np.ones(problem.samples), np.full(problem.experts, float(problem.capacity))
    plan_NE: NDArray[Any] = ot.emd(supply, demand, values_NE.max() - values_NE, numItermax=10**8)
    return np.asarray(plan_NE.argmax(1), np.int64)


def scipy_assignment(problem: Problem) -> Ints:
    """scipy's linear_sum_assignment with every expert's column repeated N/E times."""
    from scipy.optimize import linear_sum_assignment

    columns = linear_sum_assignment(np.repeat(problem.dense, problem.capacity, axis=1), maximize=True)[1]
    return np.asarray(columns // problem.capacity, np.int64)


def ortools_flow(problem: Problem) -> Ints:
    """OR-tools' SimpleMinCostFlow (cost scaling push-relabel) on one arc per edge; building the graph is included."""
    from ortools.graph.python import min_cost_flow

    samples, k = problem.values_Nk.shape
    solver = min_cost_flow.SimpleMinCostFlow()
    tails, heads = np.repeat(np.arange(samples), k), samples + problem.edges_Nk.ravel()
    arcs = solver.add_arcs_with_capacity_and_unit_cost(
        tails, heads, np.ones(samples * k, np.int64), -problem.values_Nk.ravel()
    )
    nodes = np.arange(samples + problem.experts)
    solver.set_nodes_supplies(nodes, np.where(nodes < samples, 1, -problem.capacity))
    if solver.solve() != solver.OPTIMAL:
        raise RuntimeError("OR-tools: the flow was not solved to optimality")
    flows_Nk = np.asarray(solver.flows(arcs)).reshape(samples, k)
    return np.asarray(problem.edges_Nk[flows_Nk == 1], np.int64)


def base_auction(problem: Problem, *, rounds: int = 500) -> Ints:
    """The auction of BASE layers (Lewis et al., 2021) in our own numpy words; approximate.

    Every expert bids for the N/E samples it values most after prices; its bid for each is how much better that sample
    is than the best one left out, plus epsilon = range / 50. A sample goes to its highest bidder and its price rises by
    the bid. An expert keeps what it holds at a bid of epsilon. After `rounds` rounds what has no holder is dealt out.
    """
    values_EN = np.ascontiguousarray(problem.dense.T)
    experts, capacity = problem.experts, problem.capacity
    epsilon = max((values_EN.max() - values_EN.min()) / 50, 1.0)
    price_N, holder_N = np.zeros(problem.samples), np.full(problem.samples, -1)
    everyone_N = np.arange(problem.samples)
    rows_E1 = np.arange(experts)[:, None]
    for _ in range(rounds):
        net_EN = values_EN - price_N
        held_N = everyone_N[holder_N >= 0]
        net_EN[holder_N[held_N], held_N] = np.inf
        order_EN = np.argpartition(-net_EN, capacity, axis=1)
        wanted_Ec = order_EN[:, :capacity]
        left_out_E1 = net_EN[rows_E1, order_EN[:, capacity : capacity + 1]]
        bids_EN = np.full_like(net_EN, -np.inf)
        raises_Ec = np.minimum(net_EN[rows_E1, wanted_Ec], 2.0**60) - np.minimum(left_out_E1, 2.0**60) + epsilon
        bids_EN[rows_E1, wanted_Ec] = raises_Ec
        bids_EN[holder_N[held_N], held_N] = epsilon
        holder_N = bids_EN.argmax(0)
        best_N = bids_EN[holder_N, everyone_N]
        holder_N[np.isneginf(best_N)] = -1
        if (holder_N >= 0).all():
            return np.asarray(holder_N, np.int64)
        price_N += np.maximum(best_N, 0.0)
    for i in everyone_N[holder_N < 0]:
        free_E = np.bincount(holder_N[holder_N >= 0], minlength=experts) < capacity
        holder_N[i] = int(np.where(free_E, values_EN[:, i], -np.inf).argmax())
    return np.asarray(holder_N, np.int64)


Solver = Callable[[Problem], Ints]
# name: (solver, exact, largest N * k with all edges (dense), largest N * k with k < E); more would take a peer minutes
PEERS: dict[str, tuple[Solver, bool, int, int]] = {
    "pot_emd": (pot_emd, True, 2**20, 0),
    "scipy": (scipy_assignment, True, 2**14, 0),
    "ortools": (ortools_flow, True, 2**20, 2**17),
    "auction": (base_auction, False, 2**16, 0),
}

"""The repair of transport.py: rows move along shortest paths of the exchange graph, whose nodes are the experts.

Problems, prices and NONE are as in transport_core.py; the ground is node E.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coe_dist.coe.transport_core import NONE, Ints, compiled, home_values

FAR = 2**62  # cost of a move that does not exist


@compiled
def _cheapest(
    values_NK: Ints, experts_NK: Ints, value_N: Ints, member: Ints, begin: int, load: int, to: int, bound: int
) -> Any:
    """The smallest loss of moving one of `load` members to expert `to`, and its row; stops at a loss of `bound`."""
    best, who = FAR, -1
    dense = experts_NK.size == 0
    for slot in range(begin, begin + load):
        i = member[slot]
        there = NONE
        if dense:
            there = values_NK[i, to]
        else:
            for c in range(experts_NK.shape[1]):
                if experts_NK[i, c] == to:
                    there = values_NK[i, c]
        if there != NONE and value_N[i] - there < best:
            best, who = value_N[i] - there, i
            if best <= bound:
                break
    return best, who


@compiled
def _cheapest_of_all(values_NK: Ints, experts_NK: Ints, value_N: Ints, home_N: Ints, nodes: int) -> tuple[Ints, Ints]:
    """_cheapest for every ordered pair of experts: losses and rows [E+1,E+1], FAR and -1 where there is no edge."""
    cost_MM = np.full((nodes, nodes), FAR, np.int64)
    mover_MM = np.full((nodes, nodes), -1, np.int64)
    dense = experts_NK.size == 0
    for i in range(home_N.size):
        j = home_N[i]
        for c in range(values_NK.shape[1]):
            to = c if dense else experts_NK[i, c]
            if value_N[i] - values_NK[i, c] < cost_MM[j, to] and values_NK[i, c] != NONE and to != j:
                cost_MM[j, to] = value_N[i] - values_NK[i, c]
                mover_MM[j, to] = i
    return cost_MM, mover_MM


@compiled
def _nearest_sink(cost_MM: Ints, prices: Ints, excess_M: Ints, distance_M: Ints, parent_M: Ints) -> int:
    """Dijkstra with the prices as potentials from all nodes with excess to the first node with a deficit; -1 if none.

    Distances of nodes farther than the sink are left at some value >= its own.
    """
    nodes = prices.size
    done_M = np.zeros(nodes, np.bool_)
    near, least = -1, FAR
    for v in range(nodes):
        parent_M[v] = -1
        distance_M[v] = 0 if excess_M[v] > 0 else FAR
        if excess_M[v] > 0:
            near, least = v, 0
    while near >= 0:
        if excess_M[near] < 0:
            return near
        u = near
        done_M[u] = True
        base = distance_M[u] - prices[u]
        near, least = -1, FAR
        for v in range(nodes):
            if done_M[v]:
                continue
            if cost_MM[u, v] < FAR:
                through = base + cost_MM[u, v] + prices[v]
                if through < distance_M[v]:
                    distance_M[v] = through
                    parent_M[v] = u
            if distance_M[v] < least or (distance_M[v] == least and least < FAR and excess_M[v] < 0):
                near, least = v, distance_M[v]
    return -1


@compiled
def repair(
    values_NK: Ints,
    experts_NK: Ints,
    lower_E: Ints,
    upper_E: Ints,
    slots_E: Ints,
    prices: Ints,
    home_N: Ints,
    load_E: Ints,
) -> bool:
    """Moves rows along shortest exchange paths until every expert holds its slots (step 3 of transport.py).

    Changes slots_E, prices, home_N and load_E in place. Returns False when some excess has nowhere to go, that is when
    no assignment exists.
    """
    samples, columns = values_NK.shape
    experts = lower_E.size
    ground = experts
    nodes = experts + 1
    dense = experts_NK.size == 0
    # Members of j: member[begin[j] : begin[j] + load[j]]. A load never passes max(its start, its upper bound).
    begin_E = np.empty(experts, np.int64)
    room = 0
    for j in range(experts):
        begin_E[j] = room
        room += max(load_E[j], upper_E[j]) + 1
    member = np.empty(room, np.int64)
    where_N = np.empty(samples, np.int64)
    fill_E = begin_E.copy()
    for i in range(samples):
        member[fill_E[home_N[i]]] = i
        where_N[i] = fill_E[home_N[i]]
        fill_E[home_N[i]] += 1

    value_N = home_values(values_NK, experts_NK, home_N)
    cost_MM, mover_MM = _cheapest_of_all(values_NK, experts_NK, value_N, home_N, nodes)
    excess_M = np.zeros(nodes, np.int64)
    remaining = 0
    for j in range(experts):
        excess_M[j] = load_E[j] - slots_E[j]
        remaining += max(excess_M[j], 0)
        cost_MM[j, ground] = 0 if slots_E[j] < upper_E[j] else FAR
        cost_MM[ground, j] = 0 if slots_E[j] > lower_E[j] else FAR

    distance_M = np.empty(nodes, np.int64)
    parent_M = np.empty(nodes, np.int64)
    while remaining > 0:
        sink = _nearest_sink(cost_MM, prices, excess_M, distance_M, parent_M)
        if sink < 0:
            return False
        reach = distance_M[sink]
        for v in range(nodes):
            if distance_M[v] < reach:
                prices[v] += reach - distance_M[v]
        source = sink
        while parent_M[source] >= 0:
            source = parent_M[source]
        # The same path is used again while all its edges stay tight: ties move in bulk, without a new search.
        while excess_M[source] > 0 and excess_M[sink] < 0:
            tight = True
            to = sink
            while to != source:
                j = parent_M[to]
                if cost_MM[j, to] >= FAR or cost_MM[j, to] + prices[to] - prices[j] != 0:
                    tight = False
                    break
                to = j
            if not tight:
                break
            excess_M[source] -= 1
            excess_M[sink] += 1
            remaining -= 1
            to = sink
            while to != source:  # from the sink back, so that no move disturbs the mover of an edge still to come
                j = parent_M[to]
                if to == ground or j == ground:
                    e = j if to == ground else to
                    slots_E[e] += 1 if to == ground else -1
                    cost_MM[e, ground] = 0 if slots_E[e] < upper_E[e] else FAR
                    cost_MM[ground, e] = 0 if slots_E[e] > lower_E[e] else FAR
                    to = j
                    continue
                i = mover_MM[j, to]
                load_E[j] -= 1
                last = member[begin_E[j] + load_E[j]]
                member[where_N[i]] = last
                where_N[last] = where_N[i]
                where_N[i] = begin_E[to] + load_E[to]
                member[where_N[i]] = i
                load_E[to] += 1
                home_N[i] = to
                value_N[i] -= cost_MM[j, to]
                for c in range(columns):
                    other = c if dense else experts_NK[i, c]
                    if values_NK[i, c] == NONE:
                        continue
                    if other != j and mover_MM[j, other] == i:
                        bound = prices[j] - prices[other]
                        cost_MM[j, other], mover_MM[j, other] = _cheapest(
                            values_NK, experts_NK, value_N, member, begin_E[j], load_E[j], other, bound
                        )
                    if other != to and value_N[i] - values_NK[i, c] < cost_MM[to, other]:
                        cost_MM[to, other] = value_N[i] - values_NK[i, c]
                        mover_MM[to, other] = i
                to = j
    return True

"""The compiled parts of transport.py other than the repair: scores, ties, starts and the certificate.

A problem here is `values_NK` int64 (NONE marks an edge that does not exist), `experts_NK` int64 naming the expert of
each column (an array of size 0 when column j is expert j), and load bounds `lower_E`, `upper_E`. Prices have E + 1
entries: the last is the ground's. |values| < 2^46 and |prices| < 2^58 keep every sum inside int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
F = TypeVar("F", bound=Callable[..., Any])

NONE = -(2**62)  # value of a forbidden edge: minus any price it stays below every other edge, without overflow
SCALE = 2.0**20  # integer units in a score of 1
LIMIT = 128.0  # scores are clipped to [-LIMIT, LIMIT]


def compiled(function: F) -> F:
    """numba's njit, cached on disk and without the interpreter lock (numba itself is untyped)."""
    return numba.njit(cache=True, nogil=True)(function)  # type: ignore[no-any-return]


@compiled
def integer_scores(scores_NK: NDArray[Any], values_NK: Ints) -> int:
    """Fills values_NK with rint(clip(score) * 2^20); returns the first row with a non-finite score, or -1."""
    for i in range(scores_NK.shape[0]):
        finite = True
        for c in range(scores_NK.shape[1]):
            score = np.float64(scores_NK[i, c])
            finite &= np.isfinite(score)
            values_NK[i, c] = np.int64(np.rint(min(max(score, -LIMIT), LIMIT) * SCALE))
        if not finite:
            return i
    return -1


@compiled
def _mix(word: np.uint64) -> np.uint64:
    """The splitmix64 step: a bijection of 64-bit words that looks random."""
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@compiled
def _tie_value(sample_word: np.uint64, expert: int) -> np.int64:
    """The secondary value of an edge, 0 <= value < 2^44; sample_word: _mix of the sample's id."""
    return np.int64(_mix(sample_word ^ (np.uint64(expert) * np.uint64(0xD6E8FEB86659FD93))) >> np.uint64(20))


@compiled
def sample_mask(ids_N: Ints, level: int) -> NDArray[np.bool_]:
    """A pseudo-random quarter of the rows, nested in the quarter of level - 1; a function of the ids alone."""
    mask_N = np.empty(ids_N.size, np.bool_)
    for i in range(ids_N.size):
        mask_N[i] = (_mix(_mix(np.uint64(ids_N[i]))) >> np.uint64(2 * level)) & np.uint64(3) == np.uint64(0)
    return mask_N


@compiled
def best_edges(values_NK: Ints, experts_NK: Ints, prices: Ints) -> tuple[Ints, Ints, Ints]:
    """For every row the largest value - price, how many of its edges reach it, and the expert of the last of them, each
    [N]."""
    samples, columns = values_NK.shape
    best_N = np.empty(samples, np.int64)
    count_N = np.empty(samples, np.int64)
    expert_N = np.empty(samples, np.int64)
    if experts_NK.size == 0:  # loops of their own, without branches: the compiler turns them into vector instructions
        for i in range(samples):
            best, count, expert = 2 * NONE, 0, 0
            for j in range(columns):
                best = max(best, values_NK[i, j] - prices[j])
            for j in range(columns):
                hit = values_NK[i, j] - prices[j] == best
                count += 1 if hit else 0
                expert = max(expert, j if hit else 0)
            best_N[i], count_N[i], expert_N[i] = best, count, expert
    else:
        for i in range(samples):
            best, count, expert = 2 * NONE, 0, 0
            for c in range(columns):
                net = values_NK[i, c] - prices[experts_NK[i, c]]
                if net >= best:
                    count = count + 1 if net == best else 1
                    best, expert = net, experts_NK[i, c]
            best_N[i], count_N[i], expert_N[i] = best, count, expert
    return best_N, count_N, expert_N


@compiled
def home_values(values_NK: Ints, experts_NK: Ints, home_N: Ints) -> Ints:
    """The value of each row's edge to its home, [N]; NONE if there is none."""
    value_N = np.full(home_N.size, NONE, np.int64)
    if experts_NK.size == 0:
        for i in range(home_N.size):
            value_N[i] = values_NK[i, home_N[i]]
    else:
        for i in range(home_N.size):
            for c in range(experts_NK.shape[1]):
                if experts_NK[i, c] == home_N[i]:
                    value_N[i] = values_NK[i, c]
    return value_N


@compiled
def grant_slots(prices: Ints, lower_E: Ints, upper_E: Ints, samples: int) -> Ints:
    """How many samples each expert is to hold (sum = samples): the lower bound, the dearest ones more.

    Sets the ground's price, prices[E], so that granted and refused slots are complementary to it.
    """
    slots_E = lower_E.copy()
    left = samples - lower_E.sum()
    prices[-1] = np.int64(0)
    first = True
    for j in np.argsort(-prices[:-1]):
        if lower_E[j] == upper_E[j]:
            continue
        if left == 0:
            if first:
                prices[-1] = prices[j]
            break
        given = min(left, upper_E[j] - lower_E[j])
        slots_E[j] += given
        left -= given
        prices[-1] = prices[j]
        first = False
    return slots_E


@compiled
def choose_homes(values_NK: Ints, experts_NK: Ints, prices: Ints, slots_E: Ints) -> tuple[Ints, Ints, int]:
    """Every row goes to an expert that maximises value - price; ties go to the least filled one.

    Returns the homes [N], the loads [E] and the excess: how many rows sit above their expert's slots.
    """
    samples, columns = values_NK.shape
    dense = experts_NK.size == 0
    best_N, count_N, home_N = best_edges(values_NK, experts_NK, prices)
    room_E = slots_E.copy()
    for i in range(samples):
        if count_N[i] == 1:
            room_E[home_N[i]] -= 1
    for i in range(samples):
        if count_N[i] == 1:
            continue
        most, choice = 2 * NONE, 0
        for c in range(columns):
            j = c if dense else experts_NK[i, c]
            room = room_E[j] if values_NK[i, c] - prices[j] == best_N[i] else 2 * NONE
            choice = j if room > most else choice
            most = max(room, most)
        home_N[i] = choice
        room_E[choice] -= 1
    return home_N, slots_E - room_E, np.maximum(-room_E, 0).sum()


@compiled
def certify(
    values_NK: Ints, experts_NK: Ints, lower_E: Ints, upper_E: Ints, prices: Ints, home_N: Ints
) -> tuple[bool, int, int]:
    """Checks an answer from nothing but the problem, the prices and the homes.

    Returns (optimal, primal, dual). optimal: every row has an edge to its home, loads are within the bounds, and each
    of the non-negative terms of dual - primal is zero (each row's home maximises value - price, an expert with a price
    above the ground's is full, one below it is at its lower bound). The objectives hold while they fit int64.
    """
    best_N = best_edges(values_NK, experts_NK, prices)[0]
    value_N = home_values(values_NK, experts_NK, home_N)
    load_E = np.zeros(lower_E.size, np.int64)
    optimal = True
    primal, dual = 0, 0
    for i in range(home_N.size):
        load_E[home_N[i]] += 1
        optimal &= value_N[i] != NONE and value_N[i] - prices[home_N[i]] == best_N[i]
        primal += value_N[i]
        dual += best_N[i] + prices[-1]
    for j in range(lower_E.size):
        price = prices[j] - prices[-1]
        bound = upper_E[j] if price > 0 else lower_E[j]
        optimal &= lower_E[j] <= load_E[j] <= upper_E[j] and (
            price == 0 or load_E[j] == bound or lower_E[j] == upper_E[j]
        )
        dual += price * bound
    return optimal, primal, dual


@compiled
def tied_rows(
    values_NK: Ints, experts_NK: Ints, prices: Ints, home_N: Ints, ids_N: Ints, experts: int
) -> tuple[Ints, Ints, Ints]:
    """The secondary problem of optimal prices and homes.

    Returns the rows with more than one maximiser of value - price [T], their tie values on exactly those edges [T,K]
    (NONE elsewhere), and the loads of all other rows [E].
    """
    samples, columns = values_NK.shape
    dense = experts_NK.size == 0
    best_N, count_N, _ = best_edges(values_NK, experts_NK, prices)
    rows_T = np.flatnonzero(count_N > 1)
    fixed_E = np.zeros(experts, np.int64)
    for i in range(samples):
        fixed_E[home_N[i]] += count_N[i] == 1
    values_TK = np.empty((rows_T.size, columns), np.int64)
    for t in range(rows_T.size):
        i = rows_T[t]
        word = _mix(np.uint64(ids_N[i]))
        for c in range(columns):
            j = c if dense else experts_NK[i, c]
            values_TK[t, c] = _tie_value(word, j) if values_NK[i, c] - prices[j] == best_N[i] else NONE
    return rows_T, values_TK, fixed_E

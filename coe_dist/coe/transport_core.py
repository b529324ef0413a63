"""The compiled parts of transport.py other than the repair: scores, ties, starts and the certificate.

A problem here is `values_NK` int64 (NONE marks an edge that does not exist), `experts_NK` int64 naming the expert of
each column (an array of size 0 when column j is expert j), and load bounds `lower_E`, `upper_E`. Prices have E + 1
entries: the last is the ground's. |values| < 2^46 and |prices| < 2^61 keep every sum inside int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
F = TypeVar("F", bound=Callable[..., Any])

NONE = -(2**63)  # value of a forbidden edge
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
def tie_value(sample_id: int, expert: int) -> np.int64:
    """The secondary value of an edge, 0 <= value < 2^44, a hash of (sample id, expert)."""
    return _tie_value(_mix(np.uint64(sample_id)), expert)


@compiled
def _tie_value(sample_word: np.uint64, expert: int) -> np.int64:
    return np.int64(_mix(sample_word ^ (np.uint64(expert) * np.uint64(0xD6E8FEB86659FD93))) >> np.uint64(20))


@compiled
def sample_mask(ids_N: Ints, level: int) -> NDArray[np.bool_]:
    """A pseudo-random eighth of the rows, nested in the eighth of level - 1; a function of the ids alone."""
    mask_N = np.empty(ids_N.size, np.bool_)
    for i in range(ids_N.size):
        mask_N[i] = (_mix(_mix(np.uint64(ids_N[i]))) >> np.uint64(3 * level)) & np.uint64(7) == np.uint64(0)
    return mask_N


@compiled
def edge_value(values_NK: Ints, experts_NK: Ints, i: int, expert: int) -> Any:
    """The value (int64) of the edge from row i to an expert, NONE if there is none."""
    if experts_NK.size == 0:
        return values_NK[i, expert]
    for c in range(experts_NK.shape[1]):
        if experts_NK[i, c] == expert:
            return values_NK[i, c]
    return NONE


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
    home_N = np.full(samples, -1, np.int64)
    tied_N = np.empty(samples, np.int64)
    ties = 0
    load_E = np.zeros(slots_E.size, np.int64)
    for i in range(samples):
        best, choice, again = NONE, -1, False
        for c in range(columns):
            if values_NK[i, c] == NONE:
                continue
            j = c if dense else experts_NK[i, c]
            net = values_NK[i, c] - prices[j]
            if net > best:
                best, choice, again = net, j, False
            elif net == best:
                again = True
        if again:
            tied_N[ties] = i
            ties += 1
        else:
            load_E[choice] += 1
        home_N[i] = choice
    for t in range(ties):
        i = tied_N[t]
        best = edge_value(values_NK, experts_NK, i, home_N[i]) - prices[home_N[i]]
        room = NONE
        for c in range(columns):
            if values_NK[i, c] == NONE:
                continue
            j = c if dense else experts_NK[i, c]
            if values_NK[i, c] - prices[j] == best and slots_E[j] - load_E[j] > room:
                room = slots_E[j] - load_E[j]
                home_N[i] = j
        load_E[home_N[i]] += 1
    return home_N, load_E, np.maximum(load_E - slots_E, 0).sum()


@compiled
def certify(
    values_NK: Ints, experts_NK: Ints, lower_E: Ints, upper_E: Ints, prices: Ints, home_N: Ints
) -> tuple[bool, int, int, int]:
    """Checks an answer from nothing but the problem, the prices and the homes.

    Returns (optimal, primal, dual, ties). optimal: every row has an edge to its home, loads are within the bounds, and
    each of the non-negative terms of dual - primal is zero (each row's home maximises value - price, an expert with a
    price above the ground's is full, one below it is at its lower bound). ties: rows with more than one maximiser. The
    two objectives are meaningful while they fit int64.
    """
    samples, columns = values_NK.shape
    dense = experts_NK.size == 0
    load_E = np.zeros(lower_E.size, np.int64)
    optimal = True
    primal, dual, ties = 0, 0, 0
    for i in range(samples):
        best, tied = NONE, 0
        for c in range(columns):
            if values_NK[i, c] != NONE:
                net = values_NK[i, c] - (prices[c if dense else experts_NK[i, c]] - prices[-1])
                if net > best:
                    best, tied = net, 1
                elif net == best:
                    tied += 1
        j = home_N[i]
        value = edge_value(values_NK, experts_NK, i, j)
        optimal &= value != NONE and value - (prices[j] - prices[-1]) == best
        load_E[j] += 1
        ties += tied > 1
        primal += value
        dual += best
    for j in range(lower_E.size):
        price = prices[j] - prices[-1]
        bound = upper_E[j] if price > 0 else lower_E[j]
        optimal &= lower_E[j] <= load_E[j] <= upper_E[j] and (
            price == 0 or load_E[j] == bound or lower_E[j] == upper_E[j]
        )
        dual += price * bound
    return optimal, primal, dual, ties


@compiled
def tied_rows(
    values_NK: Ints, experts_NK: Ints, prices: Ints, home_N: Ints, ids_N: Ints, ties: int, experts: int
) -> tuple[Ints, Ints, Ints]:
    """The secondary problem: rows with more than one maximiser of value - price [T], their tie values on exactly those
    edges [T,K] (NONE elsewhere), and the loads of all other rows [E]."""
    samples, columns = values_NK.shape
    dense = experts_NK.size == 0
    rows_T = np.empty(ties, np.int64)
    values_TK = np.full((ties, columns), NONE, np.int64)
    fixed_E = np.zeros(experts, np.int64)
    t = 0
    for i in range(samples):
        best = edge_value(values_NK, experts_NK, i, home_N[i]) - prices[home_N[i]]
        tied = 0
        for c in range(columns):
            if values_NK[i, c] != NONE:
                tied += values_NK[i, c] - prices[c if dense else experts_NK[i, c]] == best
        if tied == 1:
            fixed_E[home_N[i]] += 1
            continue
        word = _mix(np.uint64(ids_N[i]))
        for c in range(columns):
            j = c if dense else experts_NK[i, c]
            if values_NK[i, c] != NONE and values_NK[i, c] - prices[j] == best:
                values_TK[t, c] = _tie_value(word, j)
        rows_T[t] = i
        t += 1
    return rows_T, values_TK, fixed_E

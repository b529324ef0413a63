"""f(x) of pwlu.py and its gradients for float32 on the CPU, over flat arrays (pwlu_loops.py has the loops)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from coe_dist.coe.pwlu_loops import Doubles, Floats, backward, forward, tables
from coe_dist.coe.pwlu_pairs import compiled

_PER_THREAD = 1 << 18  # values for which a thread of its own is worth its start


@compiled
def _slopes(inverse: Floats, lines: Floats) -> Floats:
    pieces = lines.shape[0] // (2 * inverse.shape[0])
    slopes = np.empty(lines.shape[0] // 2, np.float32)
    for c in range(inverse.shape[0]):
        for k in range(c * pieces, (c + 1) * pieces):
            slopes[k] = lines[2 * k + 1] * inverse[c]
    return slopes


@compiled
def _parameter_gradients(sums: Doubles, slopes: Floats, inverse: Floats) -> Any:
    """Gradients of (left, right, values, left slope, right slope) from the sums of (g, g * u) per piece."""
    channels = inverse.shape[0]
    pieces = slopes.shape[0] // channels
    points = pieces - 1
    left, right = np.empty(channels, np.float32), np.empty(channels, np.float32)
    left_slope, right_slope = np.empty(channels, np.float32), np.empty(channels, np.float32)
    values = np.empty(channels * points, np.float32)
    for c in range(channels):
        at, width = c * pieces, 1.0 / np.float64(inverse[c])
        last = at + pieces - 1
        left_slope[c] = width * sums[2 * at + 1]
        right_slope[c] = width * (sums[2 * last + 1] - (points - 1) * sums[2 * last])
        to_left = -slopes[at] * sums[2 * at]
        to_right = -slopes[last] * sums[2 * last]
        carried = sums[2 * at]  # what the piece to the left adds to this point's value
        for i in range(points - 1):
            plain, moment = sums[2 * (at + i + 1)], sums[2 * (at + i + 1) + 1]
            rising = moment - i * plain  # sum of g * t, t from 0 to 1 across the interval
            values[c * points + i] = carried + plain - rising
            carried = rising
            share = moment / (points - 1)  # sum of g * (x - B_L) / (B_R - B_L)
            to_left -= slopes[at + i + 1] * (plain - share)
            to_right -= slopes[at + i + 1] * share
        values[c * points + points - 1] = carried + sums[2 * last]
        left[c], right[c] = to_left, to_right
    return left, right, values, left_slope, right_slope


@compiled
def _evaluate_alone(
    x: Floats, out: Floats, neighbours: int, left: Floats, right: Floats, values: Floats, low: Floats, high: Floats
) -> None:
    inverse, lines = tables(left, right, values, low, high)
    forward(x, out, neighbours, left, inverse, lines)


@compiled
def _differentiate_alone(
    x: Floats,
    g: Floats,
    out: Floats,
    neighbours: int,
    left: Floats,
    right: Floats,
    values: Floats,
    low: Floats,
    high: Floats,
) -> Any:
    inverse, lines = tables(left, right, values, low, high)
    slopes = _slopes(inverse, lines)
    sums = np.zeros(lines.shape[0])
    backward(x, g, out, neighbours, left, inverse, slopes, sums)
    return _parameter_gradients(sums, slopes, inverse)


def evaluate(x: Floats, out: Floats, neighbours: int, parameters: tuple[Floats, ...], *, threads: int) -> None:
    """Fills `out` with f(x); both flat float32, rows of [C, neighbours] in memory. parameters, float32: left [C], right
    [C], values [C * (N + 1)], left slope [C], right slope [C]."""
    parts = _parts(x.shape[0], neighbours, parameters[0].shape[0], threads)
    if len(parts) == 1:  # one call: calls cost microseconds, which small inputs feel
        _evaluate_alone(x, out, neighbours, *parameters)
        return
    inverse, lines = tables(*parameters)
    _in_threads([partial(forward, x[p], out[p], neighbours, parameters[0], inverse, lines) for p in parts])


def differentiate(
    x: Floats, gradient: Floats, out: Floats, neighbours: int, parameters: tuple[Floats, ...], *, threads: int
) -> tuple[Floats, ...]:
    """Fills `out` with the gradient of x; returns those of the parameters, in their order. Otherwise as evaluate. The
    sums' last bits depend on `threads`."""
    parts = _parts(x.shape[0], neighbours, parameters[0].shape[0], threads)
    result: tuple[Floats, ...]
    if len(parts) == 1:
        result = _differentiate_alone(x, gradient, out, neighbours, *parameters)
        return result
    inverse, lines = tables(*parameters)
    slopes = _slopes(inverse, lines)
    sums = np.zeros((len(parts), lines.shape[0]))
    _in_threads(
        [
            partial(backward, x[p], gradient[p], out[p], neighbours, parameters[0], inverse, slopes, own)
            for p, own in zip(parts, sums, strict=True)
        ]
    )
    result = _parameter_gradients(sums.sum(0), slopes, inverse)
    return result


def _parts(size: int, neighbours: int, channels: int, threads: int) -> list[slice]:
    """Whole rows for each thread; one part where the input is too small to share."""
    row = neighbours * channels if channels > 1 else 1
    rows = size // row
    count = max(1, min(threads, rows, size // _PER_THREAD))
    edges = [row * (rows * k // count) for k in range(count + 1)]
    return [slice(edges[k], edges[k + 1]) for k in range(count)]


def _in_threads(jobs: list[Callable[[], None]]) -> None:
    # threads of their own, not numba's: its OpenMP does not survive a fork, its other layer no second caller
    others = [threading.Thread(target=job) for job in jobs[1:]]
    for thread in others:
        thread.start()
    jobs[0]()
    for thread in others:
        thread.join()

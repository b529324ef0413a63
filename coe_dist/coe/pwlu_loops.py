"""The compiled loops over the values of a piecewise linear unit's input, forward and backward.

1. Layout. The input is read in the order of its memory as rows of C channels with L neighbours each. So are NCHW
   (L = H * W), channels-last and pooled features (L = 1), and one function for the whole layer (C = 1).
2. Position. u = (x - B_L) / d says where a value lies, in intervals. It belongs to one of N + 2 pieces: left of the
   bounds (piece 0), interval i (piece i + 1), right of them (piece N + 1). On each piece f(x) = intercept + slope * u.
3. Forward. Positions and pieces of a chunk go to scratch memory (vector instructions); then each value looks up its
   piece's intercept and slope, two neighbouring floats.
4. Backward. g * slope / d is the input's gradient. The gradients of all parameters follow from two sums per piece, of
   g and of g * u, again neighbours; two sets of sums take turns, because adding twice to one place has to wait.

Sums are float32 within a few thousand values and float64 beyond.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from coe_dist.coe.pwlu_function import NARROWEST
from coe_dist.coe.pwlu_pairs import add_pair, compiled, line

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_CHUNK = 256  # values whose positions and pieces stay in the first-level cache
_FEW = 128  # fewer neighbours than this make no loop of their own
_FLUSH = 4096  # values per channel after which the float32 sums move on to float64


@compiled
def tables(left: Floats, right: Floats, values: Floats, left_slope: Floats, right_slope: Floats) -> Any:
    """Per channel 1/d [C], and per channel and piece (intercept, slope) in units of u, flat [C * (N + 2) * 2]."""
    channels = left.shape[0]
    points = values.shape[0] // channels
    inverse = np.empty(channels, np.float32)
    lines = np.empty(channels * (points + 1) * 2, np.float32)
    for c in range(channels):
        width = max(right[c] - left[c], np.float32(NARROWEST)) / np.float32(points - 1)
        inverse[c] = np.float32(1.0) / width
        first, at = c * points, c * (points + 1) * 2
        lines[at], lines[at + 1] = values[first], left_slope[c] * width
        for i in range(points - 1):
            rise = values[first + i + 1] - values[first + i]
            lines[at + 2 * i + 2], lines[at + 2 * i + 3] = values[first + i] - np.float32(i) * rise, rise
        last = right_slope[c] * width
        lines[at + 2 * points] = values[first + points - 1] - np.float32(points - 1) * last
        lines[at + 2 * points + 1] = last
    return inverse, lines


@compiled
def _piece(position: np.float32, end: np.float32) -> np.int32:
    """The piece of a position; a NaN, which is in none, gets the first."""
    low = np.float32(-1.0)
    inside = position if position > low else low
    inside = inside if inside < end else end
    return np.int32(inside + np.float32(1.0))


@compiled
def _pattern(left: Floats, inverse: Floats, neighbours: int, pieces: int) -> Any:
    """For inputs whose neighbours are few: B_L, 1/d and first piece by position, for as many rows as make a chunk.

    Loops over a handful of neighbours would spend their time on starting; the pattern goes on over the channels.
    """
    channels = left.shape[0]
    row = channels * neighbours
    length = row * ((_CHUNK + row - 1) // row)
    bounds, factors = np.empty(length, np.float32), np.empty(length, np.float32)
    firsts = np.empty(length, np.int32)
    at = 0
    while at < length:
        for c in range(channels):
            bound, factor, first = left[c], inverse[c], np.int32(c * pieces)
            for k in range(at, at + neighbours):
                bounds[k], factors[k], firsts[k] = bound, factor, first
            at += neighbours
    return bounds, factors, firsts


@compiled
def forward(x: Floats, out: Floats, neighbours: int, left: Floats, inverse: Floats, lines: Floats) -> None:
    """Fills `out` with f(x), both flat; inverse and lines as `tables` makes them."""
    channels = left.shape[0]
    pieces = lines.shape[0] // (2 * channels)
    places, positions = np.empty(_CHUNK, np.int32), np.empty(_CHUNK, np.float32)
    end = np.float32(pieces - 2)
    patterned = neighbours < _FEW and channels > 1
    bounds, factors, firsts = _pattern(left, inverse, neighbours if patterned else 1, pieces)
    length = bounds.shape[0] if patterned else neighbours
    within, c, size = 0, 0, x.shape[0]
    at = np.uintp(0)
    while at < size:
        count = min(_CHUNK, length - within, size - np.int64(at))
        if patterned:
            for k in range(count):
                h = np.uintp(within) + np.uintp(k)
                u = (x[at + np.uintp(k)] - bounds[h]) * factors[h]
                positions[np.uintp(k)] = u
                places[np.uintp(k)] = _piece(u, end) + firsts[h]
        else:
            bound, factor, first = left[c], inverse[c], np.int32(c * pieces)
            for k in range(count):
                u = (x[at + np.uintp(k)] - bound) * factor
                positions[np.uintp(k)] = u
                places[np.uintp(k)] = _piece(u, end) + first
        for k in range(count):
            j = np.uintp(places[np.uintp(k)])
            out[at + np.uintp(k)] = line(lines, j + j, positions[np.uintp(k)])
        at += np.uintp(count)
        within += count
        if within == length:
            within = 0
            c = c + 1 if c + 1 < channels else 0


@compiled
def backward(
    x: Floats, g: Floats, out: Floats, neighbours: int, left: Floats, inverse: Floats, slopes: Floats, sums: Doubles
) -> None:
    """Fills `out` with the input's gradient (slopes: of x, flat [C * (N + 2)]); adds per channel and piece the sums of
    (g, g * u) to `sums`, flat [C * (N + 2) * 2]."""
    channels = left.shape[0]
    pieces = slopes.shape[0] // channels
    places, pairs = np.empty(_CHUNK, np.int32), np.empty(2 * _CHUNK, np.float32)
    even, odd = np.zeros(sums.shape[0], np.float32), np.zeros(sums.shape[0], np.float32)
    end = np.float32(pieces - 2)
    patterned = neighbours < _FEW and channels > 1
    bounds, factors, firsts = _pattern(left, inverse, neighbours if patterned else 1, pieces)
    length = bounds.shape[0] if patterned else neighbours
    within, c, held, size = 0, 0, 0, x.shape[0]
    at, one = np.uintp(0), np.uintp(1)
    while at < size:
        count = min(_CHUNK, length - within, size - np.int64(at))
        if patterned:
            for k in range(count):
                h = np.uintp(within) + np.uintp(k)
                u = (x[at + np.uintp(k)] - bounds[h]) * factors[h]
                gradient = g[at + np.uintp(k)]
                pairs[np.uintp(k) + np.uintp(k)] = gradient
                pairs[np.uintp(k) + np.uintp(k) + one] = gradient * u
                places[np.uintp(k)] = _piece(u, end) + firsts[h]
        else:
            bound, factor, first = left[c], inverse[c], np.int32(c * pieces)
            for k in range(count):
                u = (x[at + np.uintp(k)] - bound) * factor
                gradient = g[at + np.uintp(k)]
                pairs[np.uintp(k) + np.uintp(k)] = gradient
                pairs[np.uintp(k) + np.uintp(k) + one] = gradient * u
                places[np.uintp(k)] = _piece(u, end) + first
        for half in range(count >> 1):
            k0 = np.uintp(half) + np.uintp(half)
            j0 = np.uintp(places[k0])
            out[at + k0] = g[at + k0] * slopes[j0]
            add_pair(even, j0 + j0, pairs, k0 + k0)
            k1 = k0 + one
            j1 = np.uintp(places[k1])
            out[at + k1] = g[at + k1] * slopes[j1]
            add_pair(odd, j1 + j1, pairs, k1 + k1)
        if count & 1:
            k0 = np.uintp(count - 1)
            j0 = np.uintp(places[k0])
            out[at + k0] = g[at + k0] * slopes[j0]
            add_pair(even, j0 + j0, pairs, k0 + k0)
        at += np.uintp(count)
        within += count
        if within == length:
            within = 0
            c = c + 1 if c + 1 < channels else 0
        held += count
        if held >= _FLUSH * channels:
            _flush(even, odd, sums)
            held = 0
    _flush(even, odd, sums)


@compiled
def _flush(even: Floats, odd: Floats, sums: Doubles) -> None:
    for k in range(sums.shape[0]):
        sums[k] += np.float64(even[k]) + np.float64(odd[k])
        even[k] = 0
        odd[k] = 0

"""The compiled loops of pwlu.py for float32 on the CPU.

1. Layout. The input is read in the order of its memory as rows of C channels with L neighbours each. So are NCHW
   (L = H * W), channels-last and pooled features (L = 1), and one function for the whole layer (C = 1).
2. Position. u = (x - B_L) / d says where a value lies, in intervals. It belongs to one of N + 2 pieces: left of the
   bounds (piece 0), interval i (piece i + 1), right of them (piece N + 1). On each piece f(x) = intercept + slope * u.
3. Forward. Positions and pieces of a chunk go to scratch memory (vector instructions); then each value looks up its
   piece's intercept and slope, two neighbouring floats.
4. Backward. g * slope / d is the input's gradient. The gradients of all parameters follow from two sums per piece, of
   g and of g * u, again neighbours; two sets of sums take turns, because adding twice to one place has to wait.

Without the pairs (one load or store instead of two) forward took 1.3 times and backward 1.2 times as long: the
processor's limit is its loads. Sums are float32 within a few thousand values and float64 beyond.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
F = TypeVar("F", bound=Callable[..., Any])

NARROWEST = 1e-4  # B_R - B_L counts as at least this: learned bounds that meet must not divide by zero (our own rule)
_CHUNK = 256  # values whose positions and pieces stay in the first-level cache
_FEW = 128  # fewer neighbours than this make no loop of their own
_FLUSH = 4096  # values per channel after which the float32 sums move on to float64
_PER_THREAD = 1 << 18  # values for which a thread of its own is worth its start
_PAIR = ir.VectorType(ir.FloatType(), 2)


def _compiled(function: F) -> F:
    # NaN and infinity keep their meaning ("nnan" and "ninf" are left out): a network that diverged must show
    flags = {"contract", "nsz", "arcp", "reassoc"}
    decorate = numba.njit(cache=True, nogil=True, fastmath=flags, error_model="numpy")
    return decorate(function)  # type: ignore[no-any-return]


def _pair_at(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _PAIR.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def _line(context: Any, table: Any, index: Any, position: Any) -> Any:
    """table[index] + table[index + 1] * position, with one load."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, index, position = arguments
        pair = builder.load(_pair_at(context, builder, signature.args[0], table, index), align=4)
        intercept, slope = (builder.extract_element(pair, ir.IntType(32)(place)) for place in (0, 1))
        flags = ("contract", "nsz")
        return builder.fadd(intercept, builder.fmul(slope, position, flags=flags), flags=flags)

    return types.float32(table, index, position), generate


@intrinsic  # type: ignore[untyped-decorator]
def _add_pair(context: Any, sums: Any, index: Any, pairs: Any, other: Any) -> Any:
    """sums[index : index + 2] += pairs[other : other + 2], with one store."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target = _pair_at(context, builder, signature.args[0], arguments[0], arguments[1])
        source = _pair_at(context, builder, signature.args[2], arguments[2], arguments[3])
        builder.store(builder.fadd(builder.load(target, align=4), builder.load(source, align=4)), target, align=4)
        return context.get_dummy_value()

    return types.void(sums, index, pairs, other), generate


@_compiled
def _tables(left: Floats, right: Floats, values: Floats, left_slope: Floats, right_slope: Floats) -> Any:
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


@_compiled
def _piece(position: np.float32, end: np.float32) -> np.int32:
    """The piece of a position; a NaN, which is in none, gets the first."""
    low = np.float32(-1.0)
    inside = position if position > low else low
    inside = inside if inside < end else end
    return np.int32(inside + np.float32(1.0))


@_compiled
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


@_compiled
def _forward(x: Floats, out: Floats, neighbours: int, left: Floats, inverse: Floats, lines: Floats) -> None:
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
            out[at + np.uintp(k)] = _line(lines, j + j, positions[np.uintp(k)])
        at += np.uintp(count)
        within += count
        if within == length:
            within = 0
            c = c + 1 if c + 1 < channels else 0


@_compiled
def _backward(
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
            _add_pair(even, j0 + j0, pairs, k0 + k0)
            k1 = k0 + one
            j1 = np.uintp(places[k1])
            out[at + k1] = g[at + k1] * slopes[j1]
            _add_pair(odd, j1 + j1, pairs, k1 + k1)
        if count & 1:
            k0 = np.uintp(count - 1)
            j0 = np.uintp(places[k0])
            out[at + k0] = g[at + k0] * slopes[j0]
            _add_pair(even, j0 + j0, pairs, k0 + k0)
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


@_compiled
def _flush(even: Floats, odd: Floats, sums: Doubles) -> None:
    for k in range(sums.shape[0]):
        sums[k] += np.float64(even[k]) + np.float64(odd[k])
        even[k] = 0
        odd[k] = 0


@_compiled
def _slopes(inverse: Floats, lines: Floats) -> Floats:
    pieces = lines.shape[0] // (2 * inverse.shape[0])
    slopes = np.empty(lines.shape[0] // 2, np.float32)
    for c in range(inverse.shape[0]):
        for k in range(c * pieces, (c + 1) * pieces):
            slopes[k] = lines[2 * k + 1] * inverse[c]
    return slopes


@_compiled
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


@_compiled
def _evaluate_alone(
    x: Floats, out: Floats, neighbours: int, left: Floats, right: Floats, values: Floats, low: Floats, high: Floats
) -> None:
    inverse, lines = _tables(left, right, values, low, high)
    _forward(x, out, neighbours, left, inverse, lines)


@_compiled
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
    inverse, lines = _tables(left, right, values, low, high)
    slopes = _slopes(inverse, lines)
    sums = np.zeros(lines.shape[0])
    _backward(x, g, out, neighbours, left, inverse, slopes, sums)
    return _parameter_gradients(sums, slopes, inverse)


def evaluate(x: Floats, out: Floats, neighbours: int, parameters: tuple[Floats, ...], *, threads: int) -> None:
    """Fills `out` with f(x); both flat, rows of [C, neighbours] in memory. parameters: left [C], right [C], values
    [C * (N + 1)], left slope [C], right slope [C]."""
    parts = _parts(x.shape[0], neighbours, parameters[0].shape[0], threads)
    if len(parts) == 1:  # one call: calls cost microseconds, which small inputs feel
        _evaluate_alone(x, out, neighbours, *parameters)
        return
    inverse, lines = _tables(*parameters)
    _in_threads([partial(_forward, x[p], out[p], neighbours, parameters[0], inverse, lines) for p in parts])


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
    inverse, lines = _tables(*parameters)
    slopes = _slopes(inverse, lines)
    sums = np.zeros((len(parts), lines.shape[0]))
    _in_threads(
        [
            partial(_backward, x[p], gradient[p], out[p], neighbours, parameters[0], inverse, slopes, own)
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

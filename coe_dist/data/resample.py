"""Crop, resize, shift, mirror and channels first in one pass over an image (our own kernel; the filter is Pillow's).

The filter is the antialiased bilinear one of Pillow and torchvision (a triangle as wide as two output pixels), so that
the pixels are theirs to within one level.

1. A block of eight output rows is formed from the rows of the crop, over its whole width, the eight rows innermost.
2. Each output column of the block is a weighted sum of columns, eight rows at a time.

Both inner loops are elementwise, so that the compiler vectorises them, and no sum is reordered: the same image gives
the same bytes on every machine.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

ROWS = 8  # output rows of a block; step 2 is written out for this number


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def resample(
    image: Any, top: int, left: int, height: int, width: int, down: int, right: int, mirrored: bool, out: Any
) -> None:
    """out[c,y,x] (uint8 [C,H,W], C at most 3) = the crop of image (uint8 [h,w,3], contiguous) as H x W pixels, moved by
    (down, right) with zero fill, then mirrored."""
    channels, out_height, out_width = out.shape
    first_row, row_taps, row_weights = _weights(height, out_height)
    first_column, column_taps, column_weights = _weights(width, out_width)
    pixels, stride, wide = image.reshape(-1), image.shape[1] * 3, width * 3
    sums = np.empty(wide, np.float32)
    block = np.zeros((wide, ROWS), np.float32)
    part = np.empty((channels, ROWS, out_width), np.uint8)
    if down != 0 or right != 0:
        out[:] = 0
    for y in range(0, out_height, ROWS):
        rows = min(ROWS, out_height - y)
        _weighted_rows(pixels, top, left, stride, y, rows, first_row, row_taps, row_weights, sums, block)
        begin, end = max(0, -(y + down)), min(rows, out_height - (y + down))
        if end - begin == ROWS:
            columns = out[:, y + down : y + down + ROWS]
            _weighted_columns(block, first_column, column_taps, column_weights, right, mirrored, columns)
        elif end > begin:
            part[:] = 0
            _weighted_columns(block, first_column, column_taps, column_weights, right, mirrored, part)
            out[:, y + down + begin : y + down + end] = part[:, begin:end]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _weights(source: int, target: int) -> Any:
    """Of each output pixel along one side: its first source pixel, how many there are, and their weights (sum 1)."""
    scale = source / target
    support = max(scale, 1.0)
    first = np.zeros(target, np.int64)
    taps = np.zeros(target, np.int64)
    weights = np.zeros((target, 2 * int(np.ceil(support)) + 1), np.float32)
    for i in range(target):
        centre = (i + 0.5) * scale
        first[i] = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), source) - first[i]
        total = 0.0
        for k in range(count):
            weights[i, k] = max(1 - abs(first[i] + k + 0.5 - centre) / support, 0.0)
            total += weights[i, k]
        while count > 1 and weights[i, count - 1] == 0:
            count -= 1
        for k in range(count):
            weights[i, k] /= total
        taps[i] = count
    return first, taps, weights


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _weighted_rows(
    pixels: Any,
    top: int,
    left: int,
    stride: int,
    y: int,
    rows: int,
    first: Any,
    taps: Any,
    weights: Any,
    sums: Any,
    block: Any,
) -> None:
    wide = len(sums)
    for r in range(rows):
        start = (top + first[y + r]) * stride + left * 3
        row, weight = pixels[start : start + wide], weights[y + r, 0]
        for j in range(wide):
            sums[j] = weight * np.float32(row[j])
        for k in range(1, taps[y + r]):
            start += stride
            row, weight = pixels[start : start + wide], weights[y + r, k]
            for j in range(wide):
                sums[j] += weight * np.float32(row[j])
        for j in range(wide):
            block[j, r] = sums[j]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _weighted_columns(
    block: Any, first: Any, taps: Any, weights: Any, right: int, mirrored: bool, out_CRW: Any
) -> None:
    channels, _, width = out_CRW.shape
    for x in range(max(0, -right), min(width, width - right)):
        place = width - 1 - (x + right) if mirrored else x + right
        begin, count, column_weights = first[x], taps[x], weights[x]
        for channel in range(channels):
            a = b = c = d = e = f = g = h = np.float32(0.5)  # becoming whole numbers, the sums are rounded to nearest
            for k in range(count):
                weight, values = column_weights[k], block[(begin + k) * 3 + channel]
                a += weight * values[0]
                b += weight * values[1]
                c += weight * values[2]
                d += weight * values[3]
                e += weight * values[4]
                f += weight * values[5]
                g += weight * values[6]
                h += weight * values[7]
            to = out_CRW[channel, :, place]
            to[0], to[1], to[2], to[3] = np.uint8(a), np.uint8(b), np.uint8(c), np.uint8(d)
            to[4], to[5], to[6], to[7] = np.uint8(e), np.uint8(f), np.uint8(g), np.uint8(h)

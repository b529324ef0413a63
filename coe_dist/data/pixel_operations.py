"""Compiled changes of uint8 images [C,H,W], C 1 or 3: colours by a table or a blend, shapes by the nearest pixel.

What an operation does at strength s, -1 to 1 (a = |s|; grey is the luma of ITU-R 601, as in Pillow; our own ranges):

    identity     nothing
    brightness   blend of black (share -0.9 s) and the image: 1 + 0.9 s times the image
    contrast     the same with the image's mean grey in place of black
    saturation   the same with each pixel's own grey; nothing for one channel
    posterize    keeps the upper 8 - round(4 a) bits
    solarize     inverts values from 256 - round(192 a) on
    autocontrast stretches each channel to 0..255; whatever s
    shear_x, _y  by 0.3 s
    translate_x, _y  by round(0.45 s side) pixels
    rotate       by 30 s degrees about the centre

Where nothing of the image lies, and in the erased rectangle, it becomes mid-grey.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

KINDS = (
    *("identity", "brightness", "contrast", "saturation", "posterize", "solarize", "autocontrast"),
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
)
GREY = 128

_BRIGHTNESS, _CONTRAST, _SATURATION, _POSTERIZE, _SOLARIZE, _AUTOCONTRAST = range(1, 7)
_SHEAR_X, _SHEAR_Y, _TRANSLATE_X, _TRANSLATE_Y, _ROTATE = range(7, 12)

_compiled = numba.njit(nogil=True, cache=True)


@_compiled  # type: ignore[untyped-decorator]
def alter(images_BCHW: Any, kinds_BO: Any, strengths_BO: Any, boxes_B4: Any) -> None:
    """Applies O operations to each image and erases its box (see random_operations.py), in place."""
    scratch_CHW = np.empty(images_BCHW.shape[1:], np.uint8)
    for b in range(images_BCHW.shape[0]):
        image_CHW = images_BCHW[b]
        for o in range(kinds_BO.shape[1]):
            kind, strength = kinds_BO[b, o], strengths_BO[b, o]
            if kind == _SATURATION:
                _saturate(image_CHW, strength)
            elif _BRIGHTNESS <= kind <= _AUTOCONTRAST:
                _recolour(image_CHW, kind, strength)
            elif kind >= _SHEAR_X:
                _reshape(image_CHW, scratch_CHW, kind, strength)
        top, left, height, width = boxes_B4[b]
        image_CHW[:, top : top + height, left : left + width] = GREY


@_compiled  # type: ignore[untyped-decorator]
def _grey(image_CHW: Any, y: int, x: int) -> int:
    if image_CHW.shape[0] == 1:
        return int(image_CHW[0, y, x])
    red, green, blue = int(image_CHW[0, y, x]), int(image_CHW[1, y, x]), int(image_CHW[2, y, x])
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@_compiled  # type: ignore[untyped-decorator]
def _blend(base: float, value: float, strength: float) -> int:
    """The value at strength 0, `base` at -1/0.9; rounded to 0..255."""
    return int(min(max(base + (value - base) * (1.0 + 0.9 * strength), 0.0), 255.0) + 0.5)


@_compiled  # type: ignore[untyped-decorator]
def _saturate(image_CHW: Any, strength: float) -> None:
    channels, height, width = image_CHW.shape
    if channels == 1:
        return
    for y in range(height):
        for x in range(width):
            grey = _grey(image_CHW, y, x)
            for c in range(channels):
                image_CHW[c, y, x] = _blend(grey, image_CHW[c, y, x], strength)


@_compiled  # type: ignore[untyped-decorator]
def _recolour(image_CHW: Any, kind: int, strength: float) -> None:
    """What maps each value of a channel to another one."""
    channels, height, width = image_CHW.shape
    base = 0.0
    if kind == _CONTRAST:
        total = 0
        for y in range(height):
            for x in range(width):
                total += _grey(image_CHW, y, x)
        base = math.floor(total / (height * width) + 0.5)
    mask = 0xFF & ~((1 << int(4 * abs(strength) + 0.5)) - 1)
    turn = 256 - int(192 * abs(strength) + 0.5)
    table = np.empty(256, np.uint8)
    for c in range(channels):
        plane_HW = image_CHW[c]
        low, high = 0, 255
        if kind == _AUTOCONTRAST:
            low, high = int(plane_HW.min()), int(plane_HW.max())
        for value in range(256):
            if kind == _POSTERIZE:
                table[value] = value & mask
            elif kind == _SOLARIZE:
                table[value] = value if value < turn else 255 - value
            elif kind == _AUTOCONTRAST:
                stretched = value if high <= low else (value - low) * 255 // (high - low)
                table[value] = min(max(stretched, 0), 255)
            else:
                table[value] = _blend(base, value, strength)
        for y in range(height):
            for x in range(width):
                plane_HW[y, x] = table[plane_HW[y, x]]


@_compiled  # type: ignore[untyped-decorator]
def _reshape(image_CHW: Any, scratch_CHW: Any, kind: int, strength: float) -> None:
    """Each pixel takes the value of the place that an affine map gives for its centre; the map keeps the image's centre
    but for translations."""
    channels, height, width = image_CHW.shape
    across_x, across_y, down_x, down_y, right, down = 1.0, 0.0, 0.0, 1.0, 0.0, 0.0
    if kind == _SHEAR_X:
        across_y = 0.3 * strength
    elif kind == _SHEAR_Y:
        down_x = 0.3 * strength
    elif kind == _TRANSLATE_X:
        right = np.rint(0.45 * strength * width)
    elif kind == _TRANSLATE_Y:
        down = np.rint(0.45 * strength * height)
    else:
        angle = math.radians(30.0 * strength)
        across_x, across_y, down_x, down_y = math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)
    scratch_CHW[:] = image_CHW
    for y in range(height):
        for x in range(width):
            centred_x, centred_y = x + 0.5 - width / 2, y + 0.5 - height / 2
            source_x = math.floor(across_x * centred_x + across_y * centred_y + right + width / 2)
            source_y = math.floor(down_x * centred_x + down_y * centred_y + down + height / 2)
            inside = 0 <= source_x < width and 0 <= source_y < height
            for c in range(channels):
                image_CHW[c, y, x] = scratch_CHW[c, source_y, source_x] if inside else GREY

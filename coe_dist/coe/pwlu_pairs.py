"""Two neighbouring float32 at once, for the loops of pwlu_loops.py, and how those are compiled.

Without the pairs (one load or store instead of two) forward took 1.3 times and backward 1.2 times as long: the
processor's limit is its loads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

_PAIR = ir.VectorType(ir.FloatType(), 2)


def compiled(function: F) -> F:
    """numba's njit, cached on disk, without the interpreter lock and with sums in any order."""
    # NaN and infinity keep their meaning ("nnan" and "ninf" are left out): a network that diverged must show
    flags = {"contract", "nsz", "arcp", "reassoc"}
    decorate = numba.njit(cache=True, nogil=True, fastmath=flags, error_model="numpy")
    return decorate(function)  # type: ignore[no-any-return]


def _pair_at(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _PAIR.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def line(context: Any, table: Any, index: Any, position: Any) -> Any:
    """table[index] + table[index + 1] * position, with one load."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, index, position = arguments
        pair = builder.load(_pair_at(context, builder, signature.args[0], table, index), align=4)
        intercept, slope = (builder.extract_element(pair, ir.IntType(32)(place)) for place in (0, 1))
        flags = ("contract", "nsz")
        return builder.fadd(intercept, builder.fmul(slope, position, flags=flags), flags=flags)

    return types.float32(table, index, position), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_pair(context: Any, sums: Any, index: Any, pairs: Any, other: Any) -> Any:
    """sums[index : index + 2] += pairs[other : other + 2], with one store."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target = _pair_at(context, builder, signature.args[0], arguments[0], arguments[1])
        source = _pair_at(context, builder, signature.args[2], arguments[2], arguments[3])
        builder.store(builder.fadd(builder.load(target, align=4), builder.load(source, align=4)), target, align=4)
        return context.get_dummy_value()

    return types.void(sums, index, pairs, other), generate

"""Which axes of an array a transposed, reshaped, repeated or sliced view of it is made of.

An index along an axis is written in mixed radix, as one or more digits: digit ``(axis, size, stride)`` of index i is
``i // stride % size``. Each axis of a view is a sequence of digits of the root array, major to minor. Transposing
permutes them, reshaping regroups and splits them; a reshape that cuts across the axes, as (4, 6) -> (3, 8), has no
such form. Digits of axes that the root does not have (negative numbers) run over copies of it, or over the axes of an
array of indices that picked from it.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jprune.annotations import Array, Shaped
from jprune.trace.jaxpr import IDENTITIES

COPIES = -1000
"""The axis of digits that run over copies of the root. Axes -1, -2, ... are those of an array of indices."""


class Digit(NamedTuple):
    """A digit of the index along an axis of the root array."""

    axis: int
    size: int
    stride: int


Axes = tuple[tuple[Digit, ...], ...]


@functools.cache
def whole(shape: tuple[int, ...]) -> Axes:
    """An array as the view of itself."""
    return tuple((Digit(axis, size, 1),) for axis, size in enumerate(shape))


def follow(equation: Any, axes: Axes, *, copies: bool = False) -> Axes | None:
    """The axes of an equation's result if it is a view of its first operand, which has `axes`; else None.

    One that repeats elements is a view only if `copies` says so.
    """
    params = equation.params
    match equation.primitive.name:
        case name if name in IDENTITIES:
            return axes
        case "transpose":
            return tuple(axes[i] for i in params["permutation"])
        case "squeeze":
            return tuple(digits for i, digits in enumerate(axes) if i not in params["dimensions"])
        case "reshape" if params["dimensions"] is None:
            return regroup((d for digits in axes for d in digits), equation.outvars[0].aval.shape)
        case "broadcast_in_dim":
            source = dict(zip(params["broadcast_dimensions"], range(len(axes))))
            before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            repeated = [i for i, n in enumerate(after) if n != (before[source[i]] if i in source else 1)]
            if repeated and not copies:
                return None
            given = tuple(axes[source[i]] if i in source else () for i in range(len(after)))
            return tuple((Digit(COPIES, n, 1),) if i in repeated else given[i] for i, n in enumerate(after))
    return None


def restrict(axes: Axes, dim: int, start: int, stop: int) -> tuple[Axes, Digit | None, tuple[int, int]] | None:
    """Axis `dim` of a view cut to start:stop: its axes, and which digit of the root is cut to which range.

    The digit is None where nothing is cut; the result is None where the cut leaves no range of one axis of the root.
    """
    digits = axes[dim]
    size = int(np.prod([d.size for d in digits], dtype=int))
    if (start, stop) == (0, size):
        return axes, None, (0, 0)
    top, minor = digits[0], size // digits[0].size
    if start % minor or stop % minor:
        return None
    low, high = start // minor, stop // minor
    rest = (Digit(top.axis, high - low, top.stride), *digits[1:])
    return (*axes[:dim], tuple(d for d in rest if d.size > 1), *axes[dim + 1 :]), top, (low, high)


def regroup(digits: Iterable[Digit], sizes: Iterable[int]) -> Axes | None:
    """Digits regrouped into axes of the given sizes (same product), split where necessary; None if none fits."""
    rest = [d for d in digits if d.size > 1][::-1]
    groups = []
    for size in sizes:
        group: list[Digit] = []
        while size > 1:
            if not rest:
                return None  # an empty array
            digit = rest.pop()
            if digit.size % size == 0:
                minor = digit.size // size
                if minor > 1:
                    rest.append(Digit(digit.axis, minor, digit.stride))
                digit = Digit(digit.axis, size, digit.stride * minor)
            elif size % digit.size:
                return None
            group.append(digit)
            size //= digit.size
        groups.append(tuple(group))
    return tuple(groups)


def join(digits: Iterable[Digit]) -> tuple[Digit, ...]:
    """The same digits with neighbours that continue each other made one, and those of size one left out."""
    joined: list[Digit] = []
    for digit in digits:
        if digit.size == 1:
            continue
        if joined and joined[-1].axis == digit.axis and joined[-1].stride == digit.size * digit.stride:
            digit = Digit(digit.axis, joined.pop().size * digit.size, digit.stride)
        joined.append(digit)
    return tuple(joined)


def matrix(x: Shaped[Array | np.ndarray, "..."], columns: Sequence[Digit]) -> Shaped[Array | np.ndarray, "tokens d_in"]:
    """`x` as a matrix: the digits in `columns` number the columns, in their order; all others number the rows."""
    digits = [d for axis, size in enumerate(x.shape) for d in all_digits(axis, size, columns)]
    order = [i for i, d in enumerate(digits) if d not in columns] + [digits.index(d) for d in columns]
    d_in = int(np.prod([d.size for d in columns], dtype=int))
    return x.reshape([d.size for d in digits]).transpose(order).reshape(x.size // d_in, d_in)


def all_digits(axis: int, size: int, given: Iterable[Digit]) -> list[Digit]:
    """Digits that number an axis completely, major to minor, the given ones among them."""
    digits, stride = [], 1
    for digit in sorted((d for d in given if d.axis == axis), key=lambda d: d.stride):
        if digit.stride > stride:
            digits.append(Digit(axis, digit.stride // stride, stride))
        digits.append(digit)
        stride = digit.stride * digit.size
    if size > stride:
        digits.append(Digit(axis, size // stride, stride))
    return digits[::-1]

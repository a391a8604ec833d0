"""What the rules have in common: axes that are made one, replaced or frozen, with the reason."""

from collections.abc import Iterable, Sequence

from jprune.trace.coupling.atoms import ONE, Axis, atom, freeze, unify
from jprune.trace.jaxpr import Equation, Var, where_written

Axes = tuple[Axis | None, ...]
"""The axes of a value; None is an axis along which all elements are the same."""


def reason(what: str, equation: Equation) -> str:
    """Why an atom is frozen, with the source line."""
    return f"{what} {equation.primitive.name} at {where_written(equation)}"


def opaque(equation: Equation, operands: Iterable[Axes], what: str) -> list[Axes]:
    """Nothing is known but the shapes: all atoms are frozen."""
    why = reason(what, equation)
    for axes in operands:
        for axis in axes:
            if axis is not None:
                freeze(axis, why)
    return [tuple(atom(n, why) for n in x.aval.shape) for x in equation.outvars]


def tie(a: Axis | None, b: Axis | None) -> Axis | None:
    """Makes two axes one unless one of them is a broadcast; the axis they are now. Frozen if that cannot be."""
    if a is None or b is None:
        return a if b is None else b
    unify(a, b)
    return a


def elementwise(shape: Sequence[int], operands: Iterable[Axes]) -> Axes:
    """Axes of an operand are those of the result, or of size one, or the operand is a scalar."""
    result: list[Axis | None] = [None] * len(shape)
    for axes in operands:
        if axes:
            for i, axis in enumerate(axes):
                if axis is not ONE:
                    result[i] = tie(result[i], axis)
    return tuple(result)


def replaced(axes: Axes, i: int, axis: Axis | None) -> Axes:
    """The axes with another one in place of the i-th."""
    return (*axes[:i], axis, *axes[i + 1 :])


def concrete(x: Var, axes: Axes) -> tuple[Axis, ...]:
    """Axes of a value of which none is a broadcast any more."""
    return tuple(atom(n) if axis is None else axis for n, axis in zip(x.aval.shape, axes, strict=True))


def freeze_known(axis: Axis | None, why: str) -> None:
    """Freezes an axis; where all elements along it are the same there is nothing to freeze."""
    if axis is not None:
        freeze(axis, why)

"""Traces f again with larger parameters, to see which of its numbers come from the length of an axis.

Where f reads its sizes from its arrays, the second trace settles what `jprune.trace.lengths` can only suspect: a number
that is another one now does come from a length, and all others do not. Larger and not smaller, because code treats
axes of size one differently; by different factors for different kinds of axes, so that their ratios show too. Where
sizes are written into f (a Linen module, ``reshape(batch, time, heads, d)``) it fails or does something else, and
suspicions stand.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jprune.trace.atoms import PRODUCT, SUM, Axis, find
from jprune.trace.elementwise import Number, apply
from jprune.trace.jaxpr import IDENTITIES, Equation, PyTree, Trace, Var, trace, where_written
from jprune.trace.layout import POINTWISE, Layout
from jprune.trace.removed import Removed, close, number_of

FACTORS = (2, 3, 5, 7, 11, 13)
MOST_EQUATIONS = 60_000
"""To trace in search of the kind of axis that a number comes from; a decoder layer has about eighty."""


def confirmed(
    f: Callable,
    params: PyTree,
    args: tuple[PyTree, ...],
    flat: Trace,
    layout: Layout,
    removed: Removed,
    free: Mapping[Axis, Hashable],
    suspected: Mapping[Axis, str],
) -> dict[Axis, str]:
    """The atoms of `free` (each with its role; roles are tried together) that numbers in f freeze, with the reasons."""
    suspected = {leaf: reason for leaf, reason in suspected.items() if leaf in free}
    if not free:
        return {}
    check = _Check(f, params, args, flat, layout, removed)
    roles = list(dict.fromkeys(free.values()))
    factor = dict(zip(roles, itertools.cycle(FACTORS)))
    grown = {leaf: factor[role] for leaf, role in free.items()}
    if check(grown) == "":
        return {}
    guilty = {free[leaf] for leaf in suspected}
    innocent = {leaf: n for leaf, n in grown.items() if free[leaf] not in guilty}
    frozen = dict(suspected)
    if guilty and innocent and check(innocent) == "":
        return frozen
    if len(roles) * len(flat.equations) > MOST_EQUATIONS:
        return frozen
    for role in roles:
        atoms = [leaf for leaf in free if free[leaf] == role]
        verdict = check({leaf: factor[role] for leaf in atoms})
        if verdict == "":
            for leaf in atoms:
                frozen.pop(leaf, None)
        elif verdict is not None:
            frozen.update(dict.fromkeys(atoms, verdict))
    return frozen


class _Check:
    def __init__(
        self, f: Callable, params: PyTree, args: tuple[PyTree, ...], flat: Trace, layout: Layout, removed: Removed
    ):
        self.f, self.params, self.args = f, params, args
        self.flat, self.layout = flat, layout
        self.numbers = _Numbers(flat)
        self.means = {id(e): mean.total for mean in removed.means.values() for e in mean.quotients}

    def __call__(self, grown: Mapping[Axis, int]) -> str | None:
        """Traces with atoms grown by these factors: "" if no number changes, which one does, None if not comparable."""
        shapes = [
            tuple(n if axis is None else _size(axis, grown) for n, axis in zip(var.aval.shape, self.layout.axes[var]))
            for var in self.flat.params.values()
        ]
        leaves = [
            jax.ShapeDtypeStruct(shape, var.aval.dtype, weak_type=var.aval.weak_type)
            for shape, var in zip(shapes, self.flat.params.values(), strict=True)
        ]
        try:
            larger = trace(self.f, jax.tree.unflatten(self.flat.params_tree, leaves), *self.args)
        except Exception:  # sizes are written into f: whatever it raises, it cannot be compared
            return None
        return self._compare(larger, grown)

    def _compare(self, larger: Trace, grown: Mapping[Axis, int]) -> str | None:
        if len(larger.equations) != len(self.flat.equations):
            return None
        numbers = _Numbers(larger)
        changed = ""
        for a, b in zip(self.flat.equations, larger.equations, strict=True):
            if a.primitive is not b.primitive or len(a.invars) != len(b.invars):
                return None
            if not self._as_expected(a, b, grown):
                return None
            if all(self.numbers.of(x) is not None for x in a.invars):
                continue  # what it makes is looked at where it is used
            for x, y in zip(a.invars, b.invars):
                old, new = self.numbers.of(x), numbers.of(y)
                if old != new and not self._is_length(a, old, new, grown):
                    changed = changed or _words(a, old, new)
            for key in ("y", "exponent", "limit_indices") if a.primitive.name == "integer_pow" else ():
                if a.params.get(key) != b.params.get(key):
                    changed = changed or _words(a, a.params.get(key), b.params.get(key))
        return changed

    def _as_expected(self, a: Equation, b: Equation, grown: Mapping[Axis, int]) -> bool:
        """Whether the results have the shapes that their atoms give."""
        for x, y in zip(a.outvars, b.outvars):
            if x.aval.ndim != y.aval.ndim:
                return False
            for n, axis in zip(y.aval.shape, self.layout.axes[x]):
                if axis is not None and n != _size(axis, grown):
                    return False
        return True

    def _is_length(self, equation: Equation, old: Number, new: Number, grown: Mapping[Axis, int]) -> bool:
        """Whether a number is the divisor of a mean, and has changed as the length of that mean has."""
        total = self.means.get(id(equation))
        if total is None or old is None or new is None:
            return False
        axes = self.layout.read(total.invars[0])
        length = math.prod(
            n if (axis := axes[i]) is None else _size(axis, grown)
            for i, n in enumerate(total.invars[0].aval.shape)
            if i in total.params["axes"]
        )
        return close(new, length if equation.primitive.name == "div" else 1 / length, equation)


class _Numbers:
    """The values of a trace that consist of one number, folded from its literals and constants."""

    def __init__(self, flat: Trace):
        self.known: dict[Var, Number] = {}
        for var, value in flat.constants.items():
            if np.size(value) == 1:
                self.known[var] = number_of(value)
        for equation in flat.equations:
            name = equation.primitive.name
            if name in POINTWISE or name in IDENTITIES or name in ("broadcast_in_dim", "reshape", "squeeze"):
                numbers = [self.of(x) for x in equation.invars]
                if None not in numbers:
                    (x,) = equation.outvars
                    pointwise = name in POINTWISE or name in IDENTITIES
                    self.known[x] = apply(equation, numbers) if pointwise else numbers[0]

    def of(self, x: Any) -> Number:
        return number_of(x.val) if isinstance(x, jex.Literal) else self.known.get(x)


def _size(axis: Axis, grown: Mapping[Axis, int]) -> int:
    """The size of an axis whose atoms have grown."""
    axis = find(axis)
    if axis.kind == PRODUCT:
        return math.prod(_size(x, grown) for x in axis.parts)
    if axis.kind == SUM:
        return sum(_size(x, grown) for x in axis.parts)
    return axis.size * grown.get(axis, 1)


def _words(equation: Equation, old: Any, new: Any) -> str:
    return (
        f"a number in {equation.primitive.name} at {where_written(equation)} comes from its length: "
        f"it is {old}, and {new} for a larger one"
    )

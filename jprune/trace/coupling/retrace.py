"""Traces f again with larger parameters, to see which of its numbers come from the length of an axis.

Where f reads its sizes from its arrays, the second trace settles what `jprune.trace.coupling.lengths` can only suspect:
a number that is another one now does come from a length, and all others do not. Larger and not smaller, because code
treats axes of size one differently; by different factors for different kinds of axes, so that their ratios show too.
Where sizes are written into f (a Linen module, ``reshape(batch, time, heads, d)``) it fails or does something else, and
suspicions stand.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jprune.trace.coupling.atoms import ONE, PRODUCT, SUM, Axis, find
from jprune.trace.coupling.elementwise import Number, fold
from jprune.trace.coupling.layout import Layout
from jprune.trace.coupling.removed import Removed, close
from jprune.trace.coupling.states import number_of, uniform
from jprune.trace.jaxpr import Equation, PyTree, Trace, Var, trace, where_written

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
    if guilty and check(innocent) == "":
        roles = [role for role in roles if role in guilty]
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
            larger = trace(self.f, self.flat.params_tree.fill(leaves), *self.args)
        except Exception:  # sizes are written into f: whatever it raises, it cannot be compared
            return None
        return self._compare(larger, grown)

    def _compare(self, larger: Trace, grown: Mapping[Axis, int]) -> str | None:
        if len(larger.equations) != len(self.flat.equations):
            return None
        numbers = _Numbers(larger)
        changed = self._constants(larger)
        if changed is None:
            return None
        for a, b in zip(self.flat.equations, larger.equations, strict=True):
            if a.primitive is not b.primitive or len(a.invars) != len(b.invars):
                return None
            if not self._as_expected(a, b, grown):
                return None
            if all(self.numbers.of(x) is not None for x in a.invars):
                continue  # what it makes is looked at where it is used
            for x, y in zip(a.invars, b.invars):
                old, new = self.numbers.of(x), numbers.of(y)
                if id(a) in self.means and old is not None:  # the divisor of a mean must change as the length does
                    if not self._is_length(a, new, grown):
                        changed = changed or _words(a, old, new)
                elif not _same(old, new):
                    changed = changed or _words(a, old, new)
            if self._terms(a, a) != self._terms(a, b):
                changed = changed or _words(a, self._terms(a, a), self._terms(a, b))
            if a.params.get("y") != b.params.get("y"):  # the exponent of integer_pow
                changed = changed or _words(a, a.params.get("y"), b.params.get("y"))
        return changed

    def _constants(self, larger: Trace) -> str | None:
        """Compares the arrays that f closes over, as `_compare` does equations."""
        if len(self.flat.constants) != len(larger.constants):
            return None
        for var, (a, b) in zip(self.flat.constants, zip(self.flat.constants.values(), larger.constants.values())):
            same = np.shape(a) == np.shape(b)
            varies = any(axis is not None and axis is not ONE for axis in self.layout.axes[var])
            if not same and varies:
                return None
            if same and varies and not _equal(a, b):
                return "an array that f closes over or computes from numbers depends on its length"
        return ""

    def _terms(self, a: Equation, b: Equation) -> int:
        """Number of equal terms that `b`, which is equation `a` with other sizes, adds up or multiplies."""
        name, params = a.primitive.name, a.params
        if name in ("reduce_sum", "reduce_prod", "reduce_xor"):
            axes = [params["axes"]]
        elif name == "dot_general":
            axes = list(params["dimension_numbers"][0])
        else:
            return 1
        layouts = [self.layout.read(x) for x in a.invars]
        shape = b.invars[0].aval.shape
        return math.prod(
            shape[its[0]] for its in zip(*axes) if all(layouts[side][i] is None for side, i in enumerate(its))
        )

    def _as_expected(self, a: Equation, b: Equation, grown: Mapping[Axis, int]) -> bool:
        """Whether the results have the shapes that their atoms give."""
        for x, y in zip(a.outvars, b.outvars):
            if x.aval.ndim != y.aval.ndim:
                return False
            for n, axis in zip(y.aval.shape, self.layout.axes[x]):
                if axis is not None and n != _size(axis, grown):
                    return False
        return True

    def _is_length(self, equation: Equation, new: Number, grown: Mapping[Axis, int]) -> bool:
        """Whether the divisor of a mean is its length when its atoms have grown."""
        total = self.means[id(equation)]
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
            self.known[var] = uniform(value)
        for equation in flat.equations:
            numbers = [self.of(x) for x in equation.invars]
            if numbers and None not in numbers and len(equation.outvars) == 1:
                self.known[equation.outvars[0]] = fold(equation, numbers)

    def of(self, x: Any) -> Number:
        return number_of(x.val) if isinstance(x, jex.Literal) else self.known.get(x)


def _same(a: Number, b: Number) -> bool:
    return a == b or (a is not None and b is not None and a != a and b != b)


def _equal(a: Any, b: Any) -> bool:
    """Whether two constants are the same."""
    if a is b or a.dtype != b.dtype:
        return a is b
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


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
        f"a number in {equation.primitive.name} at {where_written(equation)} does not go with its length: "
        f"it is {old}, and {new} when it is larger"
    )

"""Traces f again with parameters of other lengths, to see which of its numbers come from the length of an axis.

The second trace settles what `lengths.py` can only suspect: a number that is another one now does come from a length,
and all others do not. It counts only if it is equation by equation the first trace, with the shapes that the atoms'
new sizes give; otherwise f does something else at these lengths, or fails, and nothing is learnt.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jprune.trace.coupling.atoms import LEAF, ONE, PRODUCT, SUM, Axis, find
from jprune.trace.coupling.elementwise import Number, fold
from jprune.trace.coupling.held import Key, replaced
from jprune.trace.coupling.layout import Layout
from jprune.trace.coupling.removed import Removed, close
from jprune.trace.coupling.states import number_of, uniform
from jprune.trace.jaxpr import (
    Atom,
    Equation,
    PyTree,
    Trace,
    Var,
    flat_body,
    scan_counts,
    trace,
    where_written,
)

Sizes = Mapping[Axis, int]
"""The new sizes of some atoms."""

_OF_SHAPES = {
    *("shape", "new_sizes", "sizes", "start_indices", "limit_indices", "slice_sizes", "feature_group_count"),
    *("sharding", "out_sharding", "axis_size", "branches", "y"),
}
"""Parameters of equations that go with shapes, which are compared themselves, or that are compared by name."""
_SIMPLE = (int, float, str, tuple, type(None))
_LEAF = object()


class Incomparable(Exception):
    """The other trace does not correspond to the first."""


class Retrace:
    """Traces f at other sizes and compares."""

    def __init__(self, f: Callable, args: tuple[PyTree, ...], flat: Trace, layout: Layout, removed: Removed):
        self.f, self.args = f, args
        self.flat, self.layout = flat, layout
        self.numbers = _Numbers()
        self.numbers.constants(flat.constants)
        self.numbers.run(flat.equations)
        self.means = {id(e): mean.total for mean in removed.means.values() for e in mean.quotients}
        self.uniform = [uniform(value) for value in flat.constants.values()]
        """The numbers that arrays which f closes over consist of; None for those that do not."""
        # What is in a tree beside arrays, as the static fields of a module, is as good as held by f.
        self.held = f, flat.params_tree.fill([_LEAF] * len(flat.params)), args

    def __call__(self, sizes: Sizes, held: Mapping[Key, int] | None = None) -> str | None:
        """Traces with other sizes of atoms, and other numbers in place of those that f holds.

        Returns:
          "" if no number changes, the words for one that does, None if the traces cannot be compared.
        """
        shapes = [
            tuple(n if axis is None else size(axis, sizes) for n, axis in zip(var.aval.shape, self.layout.axes[var]))
            for var in self.flat.params.values()
        ]
        leaves = [
            jax.ShapeDtypeStruct(shape, var.aval.dtype, weak_type=var.aval.weak_type)
            for shape, var in zip(shapes, self.flat.params.values(), strict=True)
        ]
        try:
            params = replaced(self.flat.params_tree.fill(leaves), held or {})
            args = replaced(self.args, held or {})
            other = trace(replaced(self.f, held or {}), params, *args)
        except Exception:  # sizes are written into f: whatever it raises, it cannot be compared
            return None
        try:
            return _Comparison(self, sizes).of(other)
        except Incomparable:
            return None


class _Comparison:
    """One other trace beside the first."""

    def __init__(self, first: Retrace, sizes: Sizes):
        self.first, self.layout, self.sizes = first, first.layout, sizes
        self.ours, self.theirs = first.numbers, _Numbers()
        self.changed = ""

    def of(self, other: Trace) -> str:
        """What is to be said; raises `Incomparable`."""
        self.theirs.constants(other.constants)
        self.theirs.run(other.equations)
        self.constants(self.first.flat.constants, other.constants)
        self.equations(self.first.flat.equations, other.equations)
        return self.changed

    def constants(self, ours: Mapping[Var, Any], theirs: Mapping[Var, Any], *, followed: bool = True) -> None:
        """Arrays that f closes over."""
        if len(ours) != len(theirs):
            raise Incomparable
        for (var, a), b in zip(ours.items(), theirs.values(), strict=True):
            axes = self.layout.axes[var] if followed else (None,)
            varies = any(axis is not None and axis is not ONE for axis in axes) or not followed
            same = np.shape(a) == np.shape(b)
            if not same and varies:
                raise Incomparable
            if same and varies and not _equal(a, b):
                self.found("an array that f closes over or computes from numbers depends on its length")

    def equations(self, ours: Sequence[Equation], theirs: Sequence[Equation], *, followed: bool = True) -> None:
        """Corresponding lists; `followed` where the walk knows the axes of each value."""
        if len(ours) != len(theirs):
            raise Incomparable
        for a, b in zip(ours, theirs, strict=True):
            ours_ndim, theirs_ndim = ([x.aval.ndim for x in (*e.invars, *e.outvars)] for e in (a, b))
            if a.primitive is not b.primitive or ours_ndim != theirs_ndim:
                raise Incomparable
            if followed:
                self.shapes(a, b)
            self.parameters(a, b)
            self.inside(a, b)
            if all(self.ours.of(x) is not None for x in a.invars):
                continue  # what it makes is looked at where it is used
            for x, y in zip(a.invars, b.invars, strict=True):
                old, new = self.ours.of(x), self.theirs.of(y)
                if id(a) in self.first.means and old is not None:  # a mean's divisor must change as the length does
                    if not self.is_length(a, new):
                        divides = f"the number {_short(old)} in {_where(a)} divides a mean"
                        self.found(f"{divides} and does not go with its length: {_was(old, new)}")
                elif not _same(old, new):
                    self.found(f"the number {_short(old)} in {_where(a)} comes from its length: {_was(old, new)}")
            if followed and (terms := self.terms(a, a)) != (now := self.terms(a, b)):
                self.found(f"the number of terms in {_where(a)} comes from its length: {_was(terms, now)}")

    def found(self, words: str) -> None:
        self.changed = self.changed or words

    def shapes(self, a: Equation, b: Equation) -> None:
        """Results have the shapes that their atoms give, and slices begin where their atoms do."""
        for x, y in zip(a.outvars, b.outvars, strict=True):
            if x.aval.dtype != y.aval.dtype:
                raise Incomparable
            for n, axis in zip(y.aval.shape, self.layout.axes[x]):
                if axis is not None and n != size(axis, self.sizes):
                    raise Incomparable
        if a.primitive.name == "slice":
            axes = self.layout.read(a.invars[0])
            for axis, old, new in zip(axes, a.params["start_indices"], b.params["start_indices"]):
                if new != (old if axis is None else offset(axis, old, self.sizes)):
                    raise Incomparable

    def parameters(self, a: Equation, b: Equation) -> None:
        for name, old in a.params.items():
            if name in _OF_SHAPES or not isinstance(old, _SIMPLE):
                continue
            if type(old) is not type(new := b.params.get(name)) or not _same(old, new):
                raise Incomparable
        if a.params.get("y") != b.params.get("y"):  # the exponent of integer_pow
            old, new = a.params["y"], b.params["y"]
            self.found(f"the number {old} in {_where(a)} comes from its length: {_was(old, new)}")

    def inside(self, a: Equation, b: Equation) -> None:
        """Bodies of control flow. Those of a scan are followed; through others no axis goes that is not frozen."""
        if id(a) in self.layout.bodies:
            n, (one, two) = scan_counts(a)[0], (self.layout.bodies[id(a)], flat_body(b.params["jaxpr"]))
            pairs = [(one, two, a.invars[:n], b.invars[:n], True)]
        else:
            nested = [list(jex.jaxprs_in_params(e.params)) for e in (a, b)]
            if len(nested[0]) != len(nested[1]):
                raise Incomparable
            # Operands of a loop become others in its course; those of a branch stay.
            known = (a.invars[1:], b.invars[1:]) if a.primitive.name == "cond" else ([], [])
            pairs = [(flat_body(one), flat_body(two), *known, False) for one, two in zip(*nested, strict=True)]
        for one, two, xs, ys, followed in pairs:
            for numbers, body, operands in ((self.ours, one, xs), (self.theirs, two, ys)):
                numbers.known.update((inner, numbers.of(x)) for inner, x in zip(body.inputs, operands))
                numbers.constants(body.constants)
                numbers.run(body.equations)
            self.constants(one.constants, two.constants, followed=followed)
            self.equations(one.equations, two.equations, followed=followed)
            if not all(_same(self.ours.of(x), self.theirs.of(y)) for x, y in zip(one.outputs, two.outputs)):
                self.found(f"a number that is a result in {_where(a)} comes from its length")

    def terms(self, a: Equation, b: Equation) -> int:
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

    def is_length(self, equation: Equation, new: Number) -> bool:
        """Whether the divisor of a mean is its length at the new sizes."""
        total = self.first.means[id(equation)]
        axes = self.layout.read(total.invars[0])
        length = math.prod(
            n if (axis := axes[i]) is None else size(axis, self.sizes)
            for i, n in enumerate(total.invars[0].aval.shape)
            if i in total.params["axes"]
        )
        return close(new, length if equation.primitive.name == "div" else 1 / length, equation)


class _Numbers:
    """The values of a trace that consist of one number, folded from its literals and constants."""

    def __init__(self) -> None:
        self.known: dict[Var, Number] = {}

    def constants(self, values: Mapping[Var, Any]) -> None:
        for var, value in values.items():
            self.known[var] = uniform(value)

    def run(self, equations: Sequence[Equation]) -> None:
        for equation in equations:
            numbers = [self.of(x) for x in equation.invars]
            if numbers and None not in numbers and len(equation.outvars) == 1:
                self.known[equation.outvars[0]] = fold(equation, numbers)

    def of(self, x: Atom) -> Number:
        return number_of(x.val) if isinstance(x, jex.Literal) else self.known.get(x)


def size(axis: Axis, sizes: Sizes) -> int:
    """The size of an axis whose atoms have other sizes."""
    axis = find(axis)
    if axis.kind == PRODUCT:
        return math.prod(size(x, sizes) for x in axis.parts)
    if axis.kind == SUM:
        return sum(size(x, sizes) for x in axis.parts)
    return sizes.get(axis, axis.size)


def offset(axis: Axis, at: int, sizes: Sizes) -> int:
    """Where the atom that begins at an index begins when atoms have other sizes; raises `Incomparable` for no atom."""
    axis = find(axis)
    if at in (0, axis.size):
        return size(axis, sizes) if at else 0
    if axis.kind == LEAF or axis is ONE:
        raise Incomparable
    if axis.kind == SUM:
        start = 0
        for x in axis.parts:
            if at < x.size:
                return start + offset(x, at, sizes)
            at, start = at - x.size, start + size(x, sizes)
        return start
    major, *minor = axis.parts
    inner = math.prod(x.size for x in minor)
    if at % inner:
        raise Incomparable
    return offset(major, at // inner, sizes) * math.prod(size(x, sizes) for x in minor)


def _same(a: Any, b: Any) -> bool:
    """Equal, or both nan."""
    return a == b or (a != a and b != b)


def _equal(a: Any, b: Any) -> bool:
    """Whether two constants are the same."""
    if a is b or a.dtype != b.dtype:
        return a is b
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


def _where(equation: Equation) -> str:
    return f"{equation.primitive.name} at {where_written(equation)}"


def _short(number: Any) -> str:
    return f"{number:.6g}" if isinstance(number, int | float) else str(number)


def _was(old: Any, new: Any) -> str:
    return f"it is {_short(old)}, and {_short(new)} at another length"

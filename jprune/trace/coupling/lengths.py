"""Numbers in f that may come from the length of an axis, as the 1 / sqrt(head_dim) of attention scores.

If they do, the smaller function has another number there, so masked and smaller differ. Whether a number comes from a
length cannot be seen in a jaxpr; it is suspected where a value is multiplied or divided by a number that is a simple
power of the size of one of its axes, or of what was summed over to make it. `jprune.trace.coupling.retrace` clears
suspicions.
"""

import math
from collections.abc import Iterable

import jax.numpy as jnp
from jax.extend import core as jex

from jprune.trace.coupling.atoms import Axis
from jprune.trace.coupling.elementwise import Number
from jprune.trace.coupling.layout import Layout
from jprune.trace.coupling.removed import Removed
from jprune.trace.coupling.rules import REDUCTIONS
from jprune.trace.jaxpr import Atom, Equation, Trace, Var, scan_counts, where_written

POWERS = (0.25, 0.5, 1.0, 1.5, 2.0)
"""Powers of a length, and of its reciprocal, that are looked for."""

Sums = frozenset[tuple[Axis, ...]]  # the atoms that were summed over together


def suspects(trace: Trace, layout: Layout, removed: Removed) -> dict[Axis, str]:
    """The atoms whose length f seems to hold as a number, each with a reason."""
    walk = _Walk(layout, removed)
    walk.run(trace.equations)
    for equation, n in removed.repeats:
        for axis in (x for var in trace.params.values() for x in layout.axes[var]):
            for leaf in removed.leaves(axis):
                if n in (leaf.size, axis.size if axis is not None else n):
                    walk.suspect([leaf], n, equation)
    return walk.found


class _Walk:
    def __init__(self, layout: Layout, removed: Removed):
        self.layout, self.removed = layout, removed
        self.sums: dict[Var, Sums] = {}
        self.found: dict[Axis, str] = {}
        self.means = {id(e) for mean in removed.means.values() for e in mean.quotients}

    def run(self, equations: Iterable[Equation]) -> None:
        for equation in equations:
            name, params = equation.primitive.name, equation.params
            if name == "scan":
                body = self.layout.bodies[id(equation)]
                inputs = zip(body.inputs, equation.invars, strict=True)
                self.sums.update((x, self.read(y)) for x, y in inputs)
                self.run(body.equations)
                # What the carry has summed over it has summed over in the next step too.
                first, n_carry = scan_counts(equation)
                for x, y in zip(body.inputs[first : first + n_carry], body.outputs):
                    self.sums[x] |= self.read(y)
                self.run(body.equations)
                self.sums.update(zip(equation.outvars, map(self.read, body.outputs), strict=True))
                continue
            before: Sums = frozenset().union(*(self.read(x) for x in equation.invars))
            if name in ("mul", "div"):
                self.scaling(equation)
            elif name in ("dot_general", "conv_general_dilated"):
                before = self.contraction(equation)
            elif name in REDUCTIONS:
                operand = self.layout.read(equation.invars[0])
                over = tuple(leaf for i in params["axes"] for leaf in self.removed.leaves(operand[i]))
                before |= {over} if over else set()
            self.sums.update(dict.fromkeys(equation.outvars, before))

    def read(self, x: Atom) -> Sums:
        return frozenset() if isinstance(x, jex.Literal) else self.sums.get(x, frozenset())

    def scaling(self, equation: Equation) -> None:
        """A value times or divided by a number."""
        if id(equation) in self.means:
            return
        for x, y in (equation.invars, equation.invars[::-1]):
            number = self.removed.read(y).everywhere
            if number is not None and self.removed.read(x).everywhere is None:
                carried = {tuple(self.removed.leaves(axis)) for axis in self.layout.read(x)}
                self.compare(number, self.read(x) | carried, equation)

    def contraction(self, equation: Equation) -> Sums:
        """What a matmul sums over; its operand may consist of one number."""
        if equation.primitive.name == "dot_general":
            (axes, _), _ = equation.params["dimension_numbers"]
            side = 0
        else:
            axes, side = (equation.params["dimension_numbers"].rhs_spec[1],), 1
        pairs = self.layout.read(equation.invars[side])
        if equation.primitive.name == "dot_general" and any(pairs[i] is None for i in axes):
            (_, axes), _ = equation.params["dimension_numbers"]
            pairs = self.layout.read(equation.invars[1])
        over = tuple(leaf for i in axes for leaf in self.removed.leaves(pairs[i]))
        result: Sums = frozenset({over} if over else ())
        for x in equation.invars:
            self.compare(self.removed.read(x).everywhere, result, equation)
        return result

    def compare(self, number: Number, sums: Iterable[tuple[Axis, ...]], equation: Equation) -> None:
        """Suspects the atoms of which the number may be the length."""
        if number is None or not math.isfinite(number) or abs(number) in (0, 1):
            return
        dtype = equation.outvars[0].aval.dtype
        rounding = 2 * float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 1e-6
        magnitude = abs(math.log(abs(number)))
        for atoms in sums:
            together = math.prod(x.size for x in atoms)
            for suspected, size in ((atoms, together), *(((x,), x.size) for x in atoms)):
                if size > 1 and any(abs(magnitude - p * math.log(size)) <= rounding for p in POWERS):
                    self.suspect(suspected, number, equation)

    def suspect(self, atoms: Iterable[Axis], number: Number, equation: Equation) -> None:
        for leaf in atoms:
            self.found.setdefault(
                leaf,
                f"the number {number:g}, which seems to come from its length, in {equation.primitive.name} "
                f"at {where_written(equation)}",
            )

"""Numbers in f that may come from the length of an axis, as the 1 / sqrt(head_dim) of attention scores.

If they do, the smaller function has another number there, so masked and smaller differ. Whether a number comes from a
length cannot be seen in a jaxpr; it is suspected where an equation joins it with a value that has the axis, or that was
summed over it, and the number has a form in the length (`forms.py`). Elsewhere in f such a number is a doubt only. So
is one that is the root of another axis' length there, which explains it better: that is how sums are scaled.
`evidence.py` clears what it can.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
from jax.extend import core as jex

from jprune.trace.coupling.atoms import ONE, Axis
from jprune.trace.coupling.elementwise import POINTWISE, Number
from jprune.trace.coupling.forms import Form, exponent, form
from jprune.trace.coupling.layout import Layout
from jprune.trace.coupling.removed import Removed
from jprune.trace.coupling.rules import REDUCTIONS
from jprune.trace.jaxpr import Atom, Equation, Trace, Var, scan_counts, where_written

Lengths = frozenset[tuple[tuple[Axis, ...], int]]
"""Atoms of an axis, or of axes that were summed over together, and the length of these."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suspicion:
    """A number that may come from the length of an atom."""

    number: float
    words: str
    """The number, its form and where it stands."""
    doubt: bool
    """Not enough to freeze: it stands elsewhere, is common, or comes from another length more likely."""
    explained: bool = False
    """It comes from another length more likely."""


class Suspicions:
    """The walk; its results are `found`, `divisors` and `numbers`."""

    def __init__(self, trace: Trace, layout: Layout, removed: Removed):
        self.layout, self.removed = layout, removed
        self.sums: dict[Var, Lengths] = {}
        self.by_number: dict[Axis, dict[float, Suspicion]] = defaultdict(dict)
        self.met: dict[tuple[float, float], Equation] = {}
        """Every number that something unknown meets, with its rounding, and the first equation that has it."""
        self.means = {id(e) for mean in removed.means.values() for e in mean.quotients}
        self.near: dict[Axis, set[float]] = defaultdict(set)
        """For each atom the numbers that meet a value which has it, or was summed over it."""
        self.roots: set[float] = set()
        """Numbers that are the root of a length where they stand."""
        self.divisors = list(self._divisors())
        """Of the atoms that a mean is taken over, what it divides by."""
        self._run(trace.equations)
        self._counted(trace)
        self.found = {leaf: sorted(its.values(), key=lambda s: s.doubt) for leaf, its in self.by_number.items()}
        """For each atom the numbers that may come from its length, what freezes first."""
        self.numbers = {number for number, _ in self.met} | {s.number for _, s in self.divisors}
        """All numbers in f that a value meets."""

    def _divisors(self) -> Iterator[tuple[Axis, Suspicion]]:
        for mean in self.removed.means.values():
            operand = self.layout.read(mean.total.invars[0])
            leaves = [leaf for i in mean.total.params["axes"] for leaf in self.removed.leaves(operand[i])]
            for quotient in mean.quotients:
                numbers = [self.removed.read(x).everywhere for x in quotient.invars]
                for number in (x for x in numbers if x is not None):
                    words = f"the number {number:g} in {quotient.primitive.name} at {where_written(quotient)}"
                    for leaf in leaves:
                        yield leaf, Suspicion(number=float(number), words=words, doubt=True)

    def _counted(self, trace: Trace) -> None:
        """Lengths of sums over what f makes by itself, and numbers anywhere in f."""
        axes = [axis for var in trace.params.values() for axis in self.layout.axes[var] if axis is not None]
        atoms = dict.fromkeys(leaf for axis in axes for leaf in self.removed.leaves(axis))
        for equation, n in self.removed.repeats:
            for axis in axes:
                for leaf in self.removed.leaves(axis):
                    if n in (leaf.size, axis.size):
                        self._suspect(leaf, n, equation, Form("w", 1), doubt=False)
        for leaf in atoms:
            for (number, rounding), equation in self.met.items():
                found = form(number, leaf.size, rounding)
                if found is not None and found.rank < 3 and not _of_indices(equation):
                    self._suspect(leaf, number, equation, found, doubt=True)

    def _run(self, equations: Iterable[Equation]) -> None:
        for equation in equations:
            name, params = equation.primitive.name, equation.params
            if name == "scan":
                self._scan(equation)
                continue
            before: Lengths = frozenset().union(*(self._read(x) for x in equation.invars))
            if name in POINTWISE:
                self._pointwise(equation, before)
            elif name in ("dot_general", "conv_general_dilated"):
                before = self._contraction(equation)
            elif name in REDUCTIONS:
                operand = self.layout.read(equation.invars[0])
                before |= self._together([operand[i] for i in params["axes"]])
            self.sums.update(dict.fromkeys(equation.outvars, before))

    def _scan(self, equation: Equation) -> None:
        body = self.layout.bodies[id(equation)]
        inputs = zip(body.inputs, equation.invars, strict=True)
        self.sums.update((x, self._read(y)) for x, y in inputs)
        self._run(body.equations)
        # What the carry has summed over it has summed over in the next step too.
        first, n_carry = scan_counts(equation)
        for x, y in zip(body.inputs[first : first + n_carry], body.outputs):
            self.sums[x] |= self._read(y)
        self._run(body.equations)
        self.sums.update(zip(equation.outvars, map(self._read, body.outputs), strict=True))

    def _read(self, x: Atom) -> Lengths:
        return frozenset() if isinstance(x, jex.Literal) else self.sums.get(x, frozenset())

    def _together(self, axes: Iterable[Axis | None]) -> Lengths:
        """Axes that are summed over at once."""
        known = [axis for axis in axes if axis is not None and axis is not ONE]
        leaves = tuple(dict.fromkeys(leaf for axis in known for leaf in self.removed.leaves(axis)))
        return frozenset({(leaves, math.prod(axis.size for axis in known))} if leaves else ())

    def _pointwise(self, equation: Equation, before: Lengths) -> None:
        """Values that meet a number, as a factor, an addend, a bound, an exponent."""
        if id(equation) in self.means:
            return
        numbers = [self.removed.read(x).everywhere for x in equation.invars]
        values = [x for x, number in zip(equation.invars, numbers) if number is None]
        if not values:
            return
        carried = frozenset().union(*(self._together([axis]) for x in values for axis in self.layout.read(x)))
        for number in dict.fromkeys(numbers):
            self._compare(number, before | carried, equation)
        if equation.primitive.name == "integer_pow":
            for atoms, length in carried:
                for leaf in atoms:
                    for size in (length, leaf.size):
                        self._suspect(leaf, equation.params["y"], equation, exponent(equation.params["y"], size))

    def _contraction(self, equation: Equation) -> Lengths:
        """What a matmul sums over; its operand may consist of one number."""
        if equation.primitive.name == "dot_general":
            (left, right), _ = equation.params["dimension_numbers"]
            sides = [[self.layout.read(x)[i] for i in axes] for x, axes in zip(equation.invars, (left, right))]
            over = [b if a is None else a for a, b in zip(*sides)]
        else:
            over = [self.layout.read(equation.invars[1])[equation.params["dimension_numbers"].rhs_spec[1]]]
        result = self._together(over)
        for x in equation.invars:
            self._compare(self.removed.read(x).everywhere, result, equation)
        return result

    def _compare(self, number: Number, lengths: Lengths, equation: Equation) -> None:
        """Suspects the atoms of which the number may be the length."""
        if number is None or isinstance(number, bool) or not math.isfinite(number) or abs(number) in (0, 1):
            return
        rounding = _rounding(equation)
        self.met.setdefault((float(number), rounding), equation)
        forms: dict[Axis, Form] = {}
        for atoms, length in lengths:
            for leaf in atoms:
                self.near[leaf].add(float(number))
                for size in {length, leaf.size}:
                    found = form(float(number), size, rounding)
                    if found is not None and (leaf not in forms or found.rank < forms[leaf].rank):
                        forms[leaf] = found
        if any(found.rank == 0 for found in forms.values()):
            self.roots.add(float(number))
        for leaf, found in forms.items():
            explained = float(number) in self.roots and found.rank > 0
            self._suspect(leaf, float(number), equation, found, doubt=found.rank == 3 or explained)

    def _suspect(
        self, leaf: Axis, number: float, equation: Equation, found: Form | None, *, doubt: bool | None = None
    ) -> None:
        if found is None:
            return
        doubt = found.rank == 3 if doubt is None else doubt
        before = self.by_number[leaf].get(number)
        if before is None or (before.doubt and not doubt):
            words = f"the number {number:g} in {equation.primitive.name} at {where_written(equation)}"
            self.by_number[leaf][number] = Suspicion(
                number=number,
                words=f"{words}, which is {found.words} for a length w",
                doubt=doubt,
                explained=doubt and number in self.roots,
            )


def _rounding(equation: Equation) -> float:
    """The relative error of a number computed in the precision of an equation's operands."""
    dtypes = [x.aval.dtype for x in (*equation.invars, *equation.outvars)]
    return max((4 * float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.floating)), default=1e-6)


def _of_indices(equation: Equation) -> bool:
    """Whether an equation computes with whole numbers or truth values only."""
    return not any(jnp.issubdtype(x.aval.dtype, jnp.inexact) for x in (*equation.invars, *equation.outvars))

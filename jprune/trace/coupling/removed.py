"""What every value is where a unit has been removed, and which atoms that freezes.

Removing unit i of an atom means: the parameters' slices at i are zero. From there the walk follows one number per value
and atom: what all elements at i are then. It knows that 0 * x = 0 and f(0) for each elementwise f; where it does not
know, the number is None, and nan stands for "perhaps not finite", as in 0 / 0. With it, each equation that goes over
an atom can be judged: a matmul wants 0 at i in one of its operands, a sum wants 0, a maximum -inf. Where an equation
does not get that, leaving out i would change the elements that stay, so the atom is frozen. Only for a mean there is
a way out: its operand is masked and its divisor replaced (`Means`), and the atom is marked as renormalised.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
from jax.extend import core as jex

from jprune.trace.coupling.atoms import Axis
from jprune.trace.coupling.elementwise import IDEMPOTENT, Number, fold
from jprune.trace.coupling.layout import Layout
from jprune.trace.coupling.rules import CUMULATIVE, REDUCTIONS, WINDOWS, untouched
from jprune.trace.coupling.states import State, States, Where, known
from jprune.trace.jaxpr import CASTS, IDENTITIES, Atom, Equation, Trace, Var, scan_counts, variables, where_written

NEUTRAL = {
    **{"reduce_sum": 0, "cumsum": 0, "reduce_prod": 1, "cumprod": 1, "reduce_and": True, "reduce_or": False},
    **{"reduce_max": -math.inf, "cummax": -math.inf, "cumlogsumexp": -math.inf, "reduce_min": math.inf},
    **{"cummin": math.inf, "reduce_xor": False},
}
"""What an element must be to make no difference to a reduction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """A sum that is divided by the number of its terms."""

    total: Equation
    quotients: tuple[Equation, ...]
    """The equations that divide by the length, or multiply with its reciprocal; the constant is operand 0 or 1."""


class Removed(States):
    """The walk; its results are `reasons` (why an atom is frozen), `means` and the states."""

    def __init__(self, trace: Trace, layout: Layout):
        super().__init__(layout)
        self.reasons: dict[Axis, str] = {}
        self.means: dict[int, Mean] = {}
        """By the identity of the equation that sums."""
        self.renormalised: set[Axis] = set()
        self.repeats: list[tuple[Equation, int]] = []
        """Sums over n elements that f has made by itself, as n ones or 0 to n - 1: n is a number in f."""
        self.users: dict[Var, list[Equation]] = {}
        self.makers: dict[Var, Equation] = {}
        for equations in (trace.equations, *(body.equations for body in layout.bodies.values())):
            for equation in equations:
                self.makers.update(dict.fromkeys(equation.outvars, equation))
                for x in set(variables(equation)):
                    self.users.setdefault(x, []).append(equation)
        for var in trace.params.values():
            zero: tuple[Where, ...] = tuple({leaf: 0 for leaf in self.leaves(axis)} for axis in layout.axes[var])
            self.states[var] = State(None, zero)
        for var in trace.args:
            self.states[var] = State(None, ({},) * len(var.aval.shape))
        inputs = (*trace.params.values(), *trace.args)
        owned = {leaf for var in inputs for axis in layout.axes[var] for leaf in self.leaves(axis)}
        self._made = {leaf for axis in layout.made for leaf in self.leaves(axis)} - owned
        self.constants(trace.constants)
        self._walk(trace.equations)

    def _walk(self, equations: Iterable[Equation]) -> None:
        for equation in equations:
            operands = [self.read(x) for x in equation.invars]
            for x, state in zip(equation.outvars, self._rule(equation, operands), strict=True):
                self.states[x] = state

    def _freeze(self, atoms: Iterable[Axis], reason: str, equation: Equation) -> None:
        for leaf in atoms:
            self.reasons.setdefault(leaf, f"{reason} {equation.primitive.name} at {where_written(equation)}")

    def _rule(self, equation: Equation, operands: list[State]) -> Sequence[State]:
        name = equation.primitive.name
        states = self.simple(equation, operands)
        if states is not None:
            return states
        if name == "scan":
            return self._scan(equation, operands)
        if name == "dot_general":
            return [self._dot_general(equation, operands)]
        if name == "conv_general_dilated" and equation.params["batch_group_count"] == 1:
            return [self._convolution(equation, operands)]
        if name in REDUCTIONS:
            return [self._reduce(equation, operands[0])]
        if name in CUMULATIVE:
            return [self._cumulative(equation, operands[0])]
        if name in WINDOWS:
            return [self._windows(equation, operands[0])]
        return [self.worst(x, operands) for x in equation.outvars]

    def _reduce(self, equation: Equation, state: State) -> State:
        name, axes = equation.primitive.name, equation.params["axes"]
        operand = self.layout.read(equation.invars[0])
        kept = [i for i in range(len(operand)) if i not in axes]
        over = {i: self.leaves(operand[i]) for i in axes}
        mean = self._mean(equation, over) if name == "reduce_sum" else None
        for i, atoms in over.items():
            for leaf in atoms:
                number = state.where(i, leaf)
                if mean is not None and not (number is not None and number != number):
                    self.renormalised.add(leaf)
                elif number != NEUTRAL[name]:
                    what = "it may not be finite in" if number is not None and number != number else "it is not zero in"
                    self._freeze([leaf], what if NEUTRAL[name] == 0 else "changed by", equation)
        if mean is not None:
            self.means[id(equation)] = mean
        idempotent, shape = name in IDEMPOTENT, equation.invars[0].aval.shape
        if state.everywhere is not None:
            return State(fold(equation, [state.everywhere]), tuple({} for _ in kept))
        self._counted(equation, [shape[i] for i in axes if operand[i] is None and not idempotent], over.values())
        # A sum of one number is that number only if it is neutral; a maximum of it always is.
        return State(
            None,
            tuple(
                {a: c for a, c in state.at[i].items() if idempotent or c == NEUTRAL[name] or (c is not None and c != c)}
                for i in kept
            ),
        )

    def _counted(self, equation: Equation, sizes: Sequence[int], atoms: Iterable[Sequence[Axis]]) -> None:
        """Remembers the lengths of axes that an equation goes over and that neither parameters nor arguments have."""
        own = [leaf.size for its in atoms for leaf in its if leaf in self._made]
        self.repeats += [(equation, n) for n in {*sizes, math.prod(sizes), *own} if n > 1]

    def _mean(self, total: Equation, over: Mapping[int, list[Axis]]) -> Mean | None:
        """The mean that a sum is part of, if it is divided by the length of the axes it goes over."""
        if not any(over.values()):
            return None
        length = math.prod(total.invars[0].aval.shape[i] for i in total.params["axes"])
        quotients, queue = [], list(total.outvars)
        while queue:
            x = queue.pop()
            for user in self.users.get(x, ()):
                name = user.primitive.name
                if (
                    name in CASTS
                    or name in IDENTITIES
                    or name in ("squeeze", "reshape", "transpose", "broadcast_in_dim")
                ):
                    if user.outvars[0].aval.size == x.aval.size:
                        queue.append(user.outvars[0])
                elif name == "div" and user.invars[0] is x and close(self._constant(user.invars[1]), length, user):
                    quotients.append(user)
                elif name == "mul":
                    other = user.invars[1] if user.invars[0] is x else user.invars[0]
                    if close(self._constant(other), 1 / length, user):
                        quotients.append(user)
        if not quotients:
            return None
        return Mean(total=total, quotients=tuple(quotients))

    def _constant(self, x: Atom) -> Number:
        """The one number that a value consists of; computed ahead of the walk where it has not come so far."""
        if isinstance(x, jex.Literal) or x in self.states:
            return self.read(x).everywhere
        maker = self.makers.get(x)
        if maker is None or maker.primitive.name == "scan":
            return None
        numbers = [self._constant(y) for y in maker.invars]
        return fold(maker, numbers) if numbers and None not in numbers else None

    def _cumulative(self, equation: Equation, state: State) -> State:
        at, name = equation.params["axis"], equation.primitive.name
        operand = self.layout.read(equation.invars[0])
        for leaf in self.leaves(operand[at]):
            if state.where(at, leaf) != NEUTRAL[name]:
                self._freeze([leaf], "changed by", equation)
        return State(
            None,
            tuple(
                {}
                if i == at
                else {
                    a: c
                    for a in self.leaves(axis)
                    if (c := state.where(i, a)) is not None and (c == NEUTRAL[name] or c != c)
                }
                for i, axis in enumerate(operand)
            ),
        )

    def _windows(self, equation: Equation, state: State) -> State:
        sums = equation.primitive.name == "reduce_window_sum"
        return State(
            None,
            tuple(
                {a: c for a, c in where.items() if not sums or c == 0 or (c is not None and c != c)}
                if untouched(equation.params, i)
                else {}
                for i, where in enumerate(state.at)
            ),
        )

    def _dot_general(self, equation: Equation, operands: list[State]) -> State:
        (contract, batch) = equation.params["dimension_numbers"]
        left, right = operands
        axes = [self.layout.read(x) for x in equation.invars]
        for i, j in zip(*contract, strict=True):
            self._contract(equation, left, i, axes[0][i], right, j, axes[1][j])
        at: list[Where] = []
        for i, j in zip(*batch, strict=True):
            both = self.leaves(axes[0][i] if axes[0][i] is not None else axes[1][j])
            at.append(known({a: _product(left.where(i, a), right.where(j, a)) for a in both}))
        for side, state in enumerate(operands):
            at += [
                known({a: _product(state.where(i, a), None) for a in self.leaves(axis)})
                for i, axis in enumerate(axes[side])
                if i not in contract[side] and i not in batch[side]
            ]
        zero = left.everywhere == 0 or right.everywhere == 0
        return State(0 if zero else None, tuple(at))

    def _contract(
        self, equation: Equation, left: State, i: int, a: Axis | None, right: State, j: int, b: Axis | None
    ) -> None:
        atoms = self.leaves(b if a is None else a)
        self._counted(equation, [equation.invars[0].aval.shape[i]] if a is None and b is None else [], [atoms])
        for leaf in atoms:
            if _product(left.where(i, leaf), right.where(j, leaf)) != 0:
                self._freeze([leaf], "neither operand is zero for it in", equation)

    def _convolution(self, equation: Equation, operands: list[State]) -> State:
        (image, kernel), (x,) = operands, equation.outvars
        numbers = equation.params["dimension_numbers"]
        axes = [self.layout.read(y) for y in equation.invars]
        features, inputs = numbers.lhs_spec[1], numbers.rhs_spec[1]
        # The image's features are groups x inputs; the groups are among the outputs and only the inputs are summed.
        for leaf in self.leaves(axes[1][inputs]):
            if _product(image.where(features, leaf), kernel.where(inputs, leaf)) != 0:
                self._freeze([leaf], "neither operand is zero for it in", equation)
        at: list[Where] = [{} for _ in range(x.aval.ndim)]
        at[numbers.out_spec[0]] = known(
            {a: _product(image.where(numbers.lhs_spec[0], a), None) for a in self.leaves(axes[0][numbers.lhs_spec[0]])}
        )
        outputs = numbers.rhs_spec[0]
        at[numbers.out_spec[1]] = known(
            {a: _product(kernel.where(outputs, a), image.where(features, a)) for a in self.leaves(axes[1][outputs])}
        )
        return State(None, tuple(at))

    def _scan(self, equation: Equation, operands: list[State]) -> Sequence[State]:
        """The body is walked until the carry's states stay; they only ever become less known."""
        body = self.layout.bodies[id(equation)]
        n_consts, n_carry = scan_counts(equation)
        self.constants(body.constants)
        carry = operands[n_consts : n_consts + n_carry]
        inputs = body.inputs
        rows = [State(s.everywhere, s.at[1:]) for s in operands[n_consts + n_carry :]]
        carry = [self.spread(x, s) for x, s in zip(inputs[n_consts:], carry)]
        while True:
            self.states.update(zip(inputs, [*operands[:n_consts], *carry, *rows], strict=True))
            self._walk(body.equations)
            results = [self.read(x) for x in body.outputs]
            after = [self.joined(x, a, b) for x, a, b in zip(inputs[n_consts:], carry, results)]
            if after == carry:
                break
            carry = after
        return [*carry, *(State(s.everywhere, ({}, *s.at)) for s in results[n_carry:])]


def _product(a: Number, b: Number) -> Number:
    """0 times anything finite; what else a product is does not matter."""
    if (a is not None and not math.isfinite(a)) or (b is not None and not math.isfinite(b)):
        return math.nan
    return 0 if a == 0 or b == 0 else None


def close(number: Number, expected: int | float, equation: Equation) -> bool:
    """Equal up to the rounding of the equation's dtype."""
    if number is None:
        return False
    dtype = equation.outvars[0].aval.dtype
    rounding = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0
    return abs(number - expected) <= rounding * abs(expected)

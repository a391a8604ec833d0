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
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jprune.trace.atoms import ONE, Axis, find, leaves
from jprune.trace.elementwise import Number, apply
from jprune.trace.jaxpr import CASTS, IDENTITIES, Atom, Equation, Trace, Var, variables, where_written
from jprune.trace.layout import CUMULATIVE, POINTWISE, REDUCTIONS, WINDOWS, Layout, untouched

NEUTRAL = {
    **{"reduce_sum": 0, "cumsum": 0, "reduce_prod": 1, "cumprod": 1, "reduce_and": True, "reduce_or": False},
    **{"reduce_max": -math.inf, "cummax": -math.inf, "cumlogsumexp": -math.inf, "reduce_min": math.inf},
    **{"cummin": math.inf, "reduce_xor": False},
}
"""What an element must be to make no difference to a reduction."""

Where = dict[Axis, Number]  # for an axis: per atom, what the elements at a removed index are


@dataclasses.dataclass(frozen=True)
class State:
    """What is known of a value's elements."""

    everywhere: Number
    at: tuple[Where, ...]

    def where(self, axis: int, atom: Axis) -> Number:
        """The elements at a removed index of the atom along an axis; the same for an axis that has not that atom."""
        if self.everywhere is not None or not self.at:
            return self.everywhere
        return self.at[axis].get(atom)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """A sum that is divided by the number of its terms."""

    total: Equation
    atoms: tuple[tuple[Axis, ...], ...]
    """Per axis of the sum's operand, the atoms that it goes over; () for the other axes."""
    quotients: tuple[Equation, ...]
    """The equations that divide by the length, or multiply with its reciprocal; the constant is operand 0 or 1."""


class Removed:
    """The walk; its results are `reasons` (why an atom is frozen), `means` and the states."""

    def __init__(self, trace: Trace, layout: Layout):
        self.layout = layout
        self.states: dict[Var, State] = {}
        self.reasons: dict[Axis, str] = {}
        self.means: dict[int, Mean] = {}
        """By the identity of the equation that sums."""
        self.renormalised: set[Axis] = set()
        self.repeats: list[tuple[Equation, int]] = []
        """Sums over n equal elements: n is a number in f."""
        self._leaves: dict[int, list[Axis]] = {}
        self.users: dict[Var, list[Equation]] = {}
        self.makers: dict[Var, Equation] = {}
        for equations in (trace.equations, *(body.equations for body in layout.bodies.values())):
            for equation in equations:
                self.makers.update(dict.fromkeys(equation.outvars, equation))
                for x in set(variables(equation)):
                    self.users.setdefault(x, []).append(equation)
        for var in trace.params.values():
            zero = tuple({leaf: 0 for leaf in self.leaves(axis)} for axis in layout.axes[var])
            self.states[var] = State(None, zero)
        for var in trace.args:
            self.states[var] = self._unknown(var)
        self._constants(trace.constants)
        self._walk(trace.equations)

    def leaves(self, axis: Axis | None) -> list[Axis]:
        """The different atoms of an axis."""
        if axis is None or axis is ONE:
            return []
        axis = find(axis)
        if id(axis) not in self._leaves:
            self._leaves[id(axis)] = list(dict.fromkeys(leaves(axis)))
        return self._leaves[id(axis)]

    def read(self, x: Atom) -> State:
        """The state of an operand."""
        if not isinstance(x, jex.Literal):
            return self.states[x]
        return State(number_of(x.val), ({},) * len(x.aval.shape))

    def _unknown(self, x: Var) -> State:
        return State(None, ({},) * len(x.aval.shape))

    def _constants(self, constants: Mapping[Var, Any]) -> None:
        for var, value in constants.items():
            alike = all(axis is None or axis is ONE for axis in self.layout.axes[var])
            first = np.asarray(value).flat[0] if alike and np.size(value) else None
            self.states[var] = State(number_of(first), ({},) * len(var.aval.shape))

    def _walk(self, equations: Iterable[Equation]) -> None:
        for equation in equations:
            operands = [self.read(x) for x in equation.invars]
            for x, state in zip(equation.outvars, self._rule(equation, operands), strict=True):
                self.states[x] = state

    def _freeze(self, atoms: Iterable[Axis], reason: str, equation: Equation) -> None:
        for leaf in atoms:
            self.reasons.setdefault(leaf, f"{reason} {equation.primitive.name} at {where_written(equation)}")

    def _rule(self, equation: Equation, operands: list[State]) -> Sequence[State]:
        name, params = equation.primitive.name, equation.params
        if name in POINTWISE or name in IDENTITIES:
            return [self._elementwise(equation, operands)]
        if name in REDUCTIONS:
            return [self._reduce(equation, operands[0])]
        if name in ("argmax", "argmin"):
            kept = tuple({} for _ in equation.outvars[0].aval.shape)
            return [State(None, kept)]
        if name in CUMULATIVE:
            return [self._cumulative(equation, operands[0])]
        if name in WINDOWS:
            return [self._windows(equation, operands[0])]
        if name == "scan":
            return self._scan(equation, operands)
        if name not in _RULES:
            return [self._worst(x, operands) for x in equation.outvars]
        return getattr(self, f"_{name}")(equation, operands, params)

    def _worst(self, x: Var, operands: Iterable[State]) -> State:
        """Nothing is known of a result; something that is not finite stays so."""
        bad = {leaf for s in operands for where in s.at for leaf, c in where.items() if c is not None and c != c}
        axes = self.layout.axes[x]
        return State(None, tuple({leaf: math.nan for leaf in self.leaves(a) if leaf in bad} for a in axes))

    def _elementwise(self, equation: Equation, operands: Sequence[State]) -> State:
        (x,) = equation.outvars
        everywhere = apply(equation, [s.everywhere for s in operands])
        if everywhere is not None:
            return State(everywhere, ({},) * x.aval.ndim)
        at: list[Where] = []
        for i, axis in enumerate(self.layout.axes[x]):
            where: Where = {}
            for leaf in self.leaves(axis):
                number = apply(equation, [s.where(i, leaf) for s in operands])
                if number is not None:
                    where[leaf] = number
            at.append(where)
        return State(None, tuple(at))

    def _move(self, x: Var, source: State, axes: Sequence[int | None]) -> State:
        """A result whose axes are those of its operand (None: another axis, along which nothing is known)."""
        return State(source.everywhere, tuple({} if i is None else source.at[i] for i in axes))

    def _broadcast_in_dim(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        source = {j: i for i, j in enumerate(params["broadcast_dimensions"])}
        (x,) = equation.outvars
        return [self._move(x, operands[0], [source.get(j) for j in range(x.aval.ndim)])]

    def _transpose(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        return [self._move(equation.outvars[0], operands[0], params["permutation"])]

    def _squeeze(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        kept = [i for i in range(len(operands[0].at)) if i not in params["dimensions"]]
        return [self._move(equation.outvars[0], operands[0], kept)]

    def _reshape(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        """An atom of several axes is known on the result only if it is known, and the same, on each of them."""
        (x,), (state, *_) = equation.outvars, operands
        if state.everywhere is not None:
            return [State(state.everywhere, ({},) * x.aval.ndim)]
        known: Where = {}
        for axis, where in zip(self.layout.read(equation.invars[0]), state.at):
            for leaf in self.leaves(axis):
                known[leaf] = _join(known[leaf], where.get(leaf)) if leaf in known else where.get(leaf)
        return [
            State(None, tuple(_known({a: known.get(a) for a in self.leaves(axis)}) for axis in self.layout.axes[x]))
        ]

    def _concatenate(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        """Along the axis: an atom is known if it is in every piece that has it. Along the others: if in all pieces."""
        (x,) = equation.outvars
        at: list[Where] = []
        for i, axis in enumerate(self.layout.axes[x]):
            where = {}
            for leaf in self.leaves(axis):
                pieces = [
                    s.where(i, leaf)
                    for s, y in zip(operands, equation.invars)
                    if i != params["dimension"] or self._has(y, i, leaf)
                ]
                where[leaf] = pieces[0] if pieces else None
                for number in pieces[1:]:
                    where[leaf] = _join(where[leaf], number)
            at.append(_known(where))
        everywhere = operands[0].everywhere
        for s in operands[1:]:
            everywhere = _join(everywhere, s.everywhere)
        return [State(everywhere, tuple(at))]

    def _has(self, x: Atom, axis: int, leaf: Axis) -> bool:
        """Whether the atom is on an axis of an operand; a broadcast may have become any atom."""
        its = self.layout.read(x)[axis]
        return its is None or leaf in self.leaves(its)

    def _pad(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        """The other axes see the padding; along the padded one there are atoms of the padding's own."""
        state, value = operands
        padded = [tuple(c) != (0, 0, 0) for c in params["padding_config"]]
        at = []
        for i, where in enumerate(state.at):
            elsewhere = any(p for j, p in enumerate(padded) if j != i)
            at.append(_known({a: _join(c, value.everywhere) if elsewhere else c for a, c in where.items()}))
        return [State(_join(state.everywhere, value.everywhere), tuple(at))]

    def _slice(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        return [self._part(x, operands[0]) for x in equation.outvars]

    def _dynamic_slice(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        return [self._part(x, operands[0]) for x in equation.outvars]

    def _split(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        return [self._part(x, operands[0]) for x in equation.outvars]

    def _part(self, x: Var, source: State) -> State:
        return State(
            source.everywhere,
            tuple(
                {a: where[a] for a in self.leaves(axis) if a in where}
                for axis, where in zip(self.layout.axes[x], source.at, strict=True)
            ),
        )

    def _rev(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        return [operands[0]]

    def _dynamic_update_slice(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        old, new = operands[:2]
        (x,) = equation.outvars
        return [
            State(
                _join(old.everywhere, new.everywhere),
                tuple(
                    _known({a: _join(old.where(i, a), new.where(i, a)) for a in self.leaves(axis)})
                    for i, axis in enumerate(self.layout.axes[x])
                ),
            )
        ]

    def _gather(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        numbers = params["dimension_numbers"]
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        follow = iter([where for i, where in enumerate(operands[0].at) if i not in gone])
        (x,) = equation.outvars
        at = [next(follow) if i in numbers.offset_dims else {} for i in range(x.aval.ndim)]
        # Batching axes of the operand lie among those of the indices; nothing is claimed about them but finiteness.
        worst = self._worst(x, [operands[0]]).at if numbers.operand_batching_dims else at
        return [State(None, tuple({**b, **a} for a, b in zip(at, worst)))]

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
        idempotent = name in ("reduce_max", "reduce_min", "reduce_and", "reduce_or")
        everywhere, shape = state.everywhere, equation.invars[0].aval.shape
        if everywhere is not None:
            # Of a repeated number, so the number of repetitions may show in the result.
            everywhere = everywhere if idempotent else _repeated(name, everywhere, math.prod(shape[i] for i in axes))
            return State(everywhere, tuple({} for _ in kept))
        repeated = math.prod(n for i, n in enumerate(shape) if i in axes and operand[i] is None)
        if repeated > 1 and not idempotent:
            self.repeats.append((equation, repeated))
        # A sum of one number is that number only if it is neutral; a maximum of it always is.
        return State(
            None,
            tuple(
                {a: c for a, c in state.at[i].items() if idempotent or c == NEUTRAL[name] or (c is not None and c != c)}
                for i in kept
            ),
        )

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
        atoms = tuple(tuple(over.get(i, ())) for i in range(total.invars[0].aval.ndim))
        return Mean(total=total, atoms=atoms, quotients=tuple(quotients))

    def _constant(self, x: Atom) -> Number:
        """The one number that a value consists of; computed ahead of the walk where it has not come so far."""
        if isinstance(x, jex.Literal) or x in self.states:
            return self.read(x).everywhere
        maker = self.makers.get(x)
        if maker is None or maker.primitive.name not in POINTWISE | IDENTITIES | {"broadcast_in_dim", "reshape"}:
            return None
        numbers = [self._constant(y) for y in maker.invars]
        if None in numbers:
            return None
        return apply(maker, numbers) if maker.primitive.name in POINTWISE else numbers[0]

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

    def _dot_general(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        (contract, batch) = params["dimension_numbers"]
        left, right = operands
        axes = [self.layout.read(x) for x in equation.invars]
        for i, j in zip(*contract, strict=True):
            self._contract(equation, left, i, axes[0][i], right, j, axes[1][j])
        at: list[Where] = []
        for i, j in zip(*batch, strict=True):
            both = self.leaves(axes[0][i] if axes[0][i] is not None else axes[1][j])
            at.append(_known({a: _product(left.where(i, a), right.where(j, a)) for a in both}))
        for side, state in enumerate(operands):
            at += [
                _known({a: _product(state.where(i, a), None) for a in self.leaves(axis)})
                for i, axis in enumerate(axes[side])
                if i not in contract[side] and i not in batch[side]
            ]
        zero = left.everywhere == 0 or right.everywhere == 0
        return [State(0 if zero else None, tuple(at))]

    def _contract(
        self, equation: Equation, left: State, i: int, a: Axis | None, right: State, j: int, b: Axis | None
    ) -> None:
        if a is None and b is None:
            self.repeats.append((equation, equation.invars[0].aval.shape[i]))
        for leaf in self.leaves(b if a is None else a):
            if _product(left.where(i, leaf), right.where(j, leaf)) != 0:
                self._freeze([leaf], "neither operand is zero for it in", equation)

    def _conv_general_dilated(self, equation: Equation, operands: list[State], params: Any) -> list[State]:
        (image, kernel), (x,) = operands, equation.outvars
        numbers = params["dimension_numbers"]
        if params["batch_group_count"] != 1:
            return [self._worst(x, operands)]
        axes = [self.layout.read(y) for y in equation.invars]
        features, inputs = numbers.lhs_spec[1], numbers.rhs_spec[1]
        # The image's features are groups x inputs; the groups are among the outputs and only the inputs are summed.
        for leaf in self.leaves(axes[1][inputs]):
            if _product(image.where(features, leaf), kernel.where(inputs, leaf)) != 0:
                self._freeze([leaf], "neither operand is zero for it in", equation)
        at: list[Where] = [{} for _ in range(x.aval.ndim)]
        at[numbers.out_spec[0]] = _known(
            {a: _product(image.where(numbers.lhs_spec[0], a), None) for a in self.leaves(axes[0][numbers.lhs_spec[0]])}
        )
        outputs = numbers.rhs_spec[0]
        at[numbers.out_spec[1]] = _known(
            {a: _product(kernel.where(outputs, a), image.where(features, a)) for a in self.leaves(axes[1][outputs])}
        )
        return [State(None, tuple(at))]

    def _scan(self, equation: Equation, operands: list[State]) -> Sequence[State]:
        """The body is walked until the carry's states stay; they only ever become less known."""
        params, body = equation.params, self.layout.bodies[id(equation)]
        n_consts, n_carry = params["num_consts"], params["num_carry"]
        self._constants(body.constants)
        carry = operands[n_consts : n_consts + n_carry]
        inputs = body.inputs
        rows = [State(s.everywhere, s.at[1:]) for s in operands[n_consts + n_carry :]]
        carry = [self._spread(x, s) for x, s in zip(inputs[n_consts:], carry)]
        while True:
            self.states.update(zip(inputs, [*operands[:n_consts], *carry, *rows], strict=True))
            self._walk(body.equations)
            results = [self.read(x) for x in body.outputs]
            after = [self._joined(x, a, b) for x, a, b in zip(inputs[n_consts:], carry, results)]
            if after == carry:
                break
            carry = after
        return [*carry, *(State(s.everywhere, ({}, *s.at)) for s in results[n_carry:])]

    def _spread(self, x: Var, state: State) -> State:
        """A constant's state written out per atom, so that it can become less known atom by atom."""
        return State(
            state.everywhere,
            tuple(
                _known({a: state.where(i, a) for a in self.leaves(axis)}) for i, axis in enumerate(self.layout.axes[x])
            ),
        )

    def _joined(self, x: Var, a: State, b: State) -> State:
        b = self._spread(x, b)
        return State(
            _join(a.everywhere, b.everywhere),
            tuple(_known({leaf: _join(u.get(leaf), v.get(leaf)) for leaf in {**u, **v}}) for u, v in zip(a.at, b.at)),
        )


_RULES = {
    *("broadcast_in_dim", "transpose", "squeeze", "reshape", "concatenate", "pad", "slice", "dynamic_slice", "split"),
    *("rev", "dynamic_update_slice", "gather", "dot_general", "conv_general_dilated"),
}
"""Primitives whose rule is the method of their name."""


def _known(where: Where) -> Where:
    return {leaf: c for leaf, c in where.items() if c is not None}


def _join(a: Number, b: Number) -> Number:
    """What is known of an element that is one or the other."""
    if (a is not None and a != a) or (b is not None and b != b):
        return math.nan
    return a if a == b else None


def _product(a: Number, b: Number) -> Number:
    """0 times anything finite; what else a product is does not matter."""
    if (a is not None and not math.isfinite(a)) or (b is not None and not math.isfinite(b)):
        return math.nan
    return 0 if a == 0 or b == 0 else None


def _repeated(name: str, number: Number, times: int) -> Number:
    """The sum (or product) of one number so many times."""
    assert number is not None
    if name == "reduce_sum":
        return number * times
    return number**times if name == "reduce_prod" and abs(number) <= 1 else None


def number_of(value: Any) -> Number:
    if value is None:
        return None
    array = np.asarray(value)
    if array.dtype == bool or array.dtype.kind in "iu":
        return array.item() if array.size == 1 else None
    try:
        number = float(array.reshape(-1)[0]) if array.size == 1 else None
    except (TypeError, ValueError):
        return None
    return math.nan if number is not None and number != number else number


def close(number: Number, expected: float, equation: Equation) -> bool:
    """Equal up to the rounding of the equation's dtype."""
    if number is None:
        return False
    dtype = equation.outvars[0].aval.dtype
    rounding = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0
    return abs(number - expected) <= rounding * abs(expected)

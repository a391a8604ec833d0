"""What is known of the elements of every value where a unit has been removed.

For each value and each atom of its axes: the one number that all elements at a removed index are, if it is known. Here
are the rules that move elements or treat each by itself; those that sum over axes are in `removed.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jprune.trace.coupling.atoms import ONE, Axis, find, leaves
from jprune.trace.coupling.elementwise import POINTWISE, Number, apply
from jprune.trace.coupling.layout import Layout, varies_not
from jprune.trace.jaxpr import IDENTITIES, Atom, Equation, Var

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


class States:
    """The states of the values so far, and the rules of equations that sum over nothing."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.states: dict[Var, State] = {}
        self._leaves: dict[int, list[Axis]] = {}

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
        return State(number_of(x.val), ({},) * np.ndim(x.val))

    def constants(self, constants: Mapping[Var, Any]) -> None:
        """Takes note of arrays that f closes over."""
        for var, value in constants.items():
            self.states[var] = State(uniform(value), ({},) * len(var.aval.shape))

    def simple(self, equation: Equation, operands: Sequence[State]) -> list[State] | None:
        """The states of the results; None if the equation is not one of these."""
        name = equation.primitive.name
        if name in POINTWISE or name in IDENTITIES:
            return [self._elementwise(equation, operands)]
        if name in _MOVES:
            return getattr(self, f"_{name}")(equation, operands, equation.params)
        return None

    def worst(self, x: Var, operands: Iterable[State]) -> State:
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

    def _broadcast_in_dim(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        source = {j: i for i, j in enumerate(params["broadcast_dimensions"])}
        (x,) = equation.outvars
        return [_move(operands[0], [source.get(j) for j in range(x.aval.ndim)])]

    def _transpose(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        return [_move(operands[0], params["permutation"])]

    def _squeeze(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        kept = [i for i in range(len(operands[0].at)) if i not in params["dimensions"]]
        return [_move(operands[0], kept)]

    def _reshape(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        """An atom of several axes is known on the result only if it is known, and the same, on each of them."""
        (x,), (state, *_) = equation.outvars, operands
        if state.everywhere is not None:
            return [State(state.everywhere, ({},) * x.aval.ndim)]
        numbers: Where = {}
        for axis, where in zip(self.layout.read(equation.invars[0]), state.at):
            for leaf in self.leaves(axis):
                numbers[leaf] = join(numbers[leaf], where.get(leaf)) if leaf in numbers else where.get(leaf)
        return [
            State(None, tuple(known({a: numbers.get(a) for a in self.leaves(axis)}) for axis in self.layout.axes[x]))
        ]

    def _concatenate(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
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
                    where[leaf] = join(where[leaf], number)
            at.append(known(where))
        everywhere = operands[0].everywhere
        for s in operands[1:]:
            everywhere = join(everywhere, s.everywhere)
        return [State(everywhere, tuple(at))]

    def _has(self, x: Atom, axis: int, leaf: Axis) -> bool:
        """Whether the atom is on an axis of an operand; a broadcast may have become any atom."""
        its = self.layout.read(x)[axis]
        return its is None or leaf in self.leaves(its)

    def _stack(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        (x,), at = equation.outvars, params["axis"]
        where: list[Where] = [{} for _ in range(x.aval.ndim)]
        for i, axis in enumerate(self.layout.axes[x]):
            if i == at:
                continue
            for leaf in self.leaves(axis):
                numbers = [s.where(i - (i > at), leaf) for s in operands]
                where[i][leaf] = functools.reduce(join, numbers)
        everywhere = functools.reduce(join, [s.everywhere for s in operands])
        return [State(everywhere, tuple(map(known, where)))]

    def _unstack(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        kept = [i for i in range(len(operands[0].at)) if i != params["axis"]]
        return [_move(operands[0], kept)] * len(equation.outvars)

    def _tile(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        return [operands[0]]

    def _pad(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        """The other axes see the padding; along the padded one there are atoms of the padding's own."""
        state, value = operands
        padded = [tuple(c) != (0, 0, 0) for c in params["padding_config"]]
        at = []
        for i, where in enumerate(state.at):
            elsewhere = any(p for j, p in enumerate(padded) if j != i)
            at.append(known({a: join(c, value.everywhere) if elsewhere else c for a, c in where.items()}))
        return [State(join(state.everywhere, value.everywhere), tuple(at))]

    def _slice(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        return [self._part(x, operands[0]) for x in equation.outvars]

    def _dynamic_slice(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        return [self._part(x, operands[0]) for x in equation.outvars]

    def _split(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        return [self._part(x, operands[0]) for x in equation.outvars]

    def _part(self, x: Var, source: State) -> State:
        return State(
            source.everywhere,
            tuple(
                {a: where[a] for a in self.leaves(axis) if a in where}
                for axis, where in zip(self.layout.axes[x], source.at, strict=True)
            ),
        )

    def _rev(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        return [operands[0]]

    def _dynamic_update_slice(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        old, new = operands[:2]
        (x,) = equation.outvars
        return [
            State(
                join(old.everywhere, new.everywhere),
                tuple(
                    known({a: join(old.where(i, a), new.where(i, a)) for a in self.leaves(axis)})
                    for i, axis in enumerate(self.layout.axes[x])
                ),
            )
        ]

    def _gather(self, equation: Equation, operands: Sequence[State], params: Any) -> list[State]:
        numbers = params["dimension_numbers"]
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        follow = iter([where for i, where in enumerate(operands[0].at) if i not in gone])
        (x,) = equation.outvars
        at = [next(follow) if i in numbers.offset_dims else {} for i in range(x.aval.ndim)]
        # Batching axes of the operand lie among those of the indices; nothing is claimed about them but finiteness.
        worst = self.worst(x, [operands[0]]).at if numbers.operand_batching_dims else at
        return [State(None, tuple({**b, **a} for a, b in zip(at, worst)))]

    def spread(self, x: Var, state: State) -> State:
        """A constant's state written out per atom, so that it can become less known atom by atom."""
        return State(
            state.everywhere,
            tuple(
                known({a: state.where(i, a) for a in self.leaves(axis)}) for i, axis in enumerate(self.layout.axes[x])
            ),
        )

    def joined(self, x: Var, a: State, b: State) -> State:
        """What is known of a value that is in one state or the other."""
        b = self.spread(x, b)
        return State(
            join(a.everywhere, b.everywhere),
            tuple(known({leaf: join(u.get(leaf), v.get(leaf)) for leaf in {**u, **v}}) for u, v in zip(a.at, b.at)),
        )


_MOVES = {
    *(
        "broadcast_in_dim",
        "transpose",
        "squeeze",
        "reshape",
        "concatenate",
        "stack",
        "unstack",
        "tile",
        "pad",
        "slice",
        "dynamic_slice",
    ),
    *("split", "rev", "dynamic_update_slice", "gather"),
}
"""Primitives whose rule is the method of their name."""


def _move(source: State, axes: Sequence[int | None]) -> State:
    """A result whose axes are those of its operand (None: another axis, along which nothing is known)."""
    return State(source.everywhere, tuple({} if i is None else source.at[i] for i in axes))


def known(where: Where) -> Where:
    """Without the atoms of which nothing is known."""
    return {leaf: c for leaf, c in where.items() if c is not None}


def join(a: Number, b: Number) -> Number:
    """What is known of an element that is one or the other."""
    if (a is not None and a != a) or (b is not None and b != b):
        return math.nan
    return a if a == b else None


def uniform(value: Any) -> Number:
    """The number that all elements of a constant are."""
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) or not np.size(value) or not all(varies_not(value)):
        return None
    return number_of(np.asarray(value).flat[0])


def number_of(value: Any) -> Number:
    """A scalar as a Python number; None for what is not a real number."""
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

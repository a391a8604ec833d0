"""Which atoms each axis of each value is made of: one walk of the flat jaxpr, a rule for each primitive (`rules.py`).

An axis along which all elements are known to be the same array element (the result of a broadcast) is `None`: it
follows whatever it meets and ties nothing, so a shared ``zeros`` does not couple two layers.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jprune.trace.coupling.atoms import ONE, Axis, Misfit, atom, freeze
from jprune.trace.coupling.rules import follow
from jprune.trace.coupling.ties import Axes, concrete, elementwise, opaque, reason, tie
from jprune.trace.jaxpr import Atom, Body, Equation, Trace, Var, flat_body, scan_counts

_LOOKED_AT = 1 << 22  # elements of a constant that are compared to see whether it varies along an axis


class Layout:
    """The axes of every value of a trace, after the walk."""

    def __init__(self, trace: Trace):
        self.axes: dict[Var, Axes] = {}
        self.made: list[Axis] = []
        """Axes that f makes by itself: of constants and of rows of numbers."""
        self.bodies: dict[int, Body] = {}
        """The bodies of scans, by the identity of their equations."""
        for var in trace.params.values():
            self.axes[var] = tuple(atom(size) for size in var.aval.shape)
        for var in trace.args:
            self.axes[var] = tuple(atom(n, f"axis {i} of an argument of f") for i, n in enumerate(var.aval.shape))
        self._constants(trace.constants)
        self._walk(trace.equations)
        for x in trace.outputs:
            for i, axis in enumerate(self.read(x)):
                if axis is not None:
                    freeze(axis, f"axis {i} of an output of f")

    def read(self, x: Atom) -> Axes:
        """The axes of an operand."""
        return _constant_axes(x.val) if isinstance(x, jex.Literal) else self.axes[x]

    def _constants(self, constants: dict[Var, Any]) -> None:
        for var, value in constants.items():
            self.axes[var] = _constant_axes(value)
            self.made += [axis for axis in self.axes[var] if axis is not None]

    def _walk(self, equations: Iterable[Equation]) -> None:
        for equation in equations:
            operands, name = [self.read(x) for x in equation.invars], equation.primitive.name
            try:
                results = self._scan(equation, operands) if name == "scan" else follow(equation, operands)
            except Misfit:
                results = opaque(equation, operands, "its axes are divided across each other by")
            if name == "iota":
                self.made += [axis for axis in results[0] if axis is not None]
            for var, axes in zip(equation.outvars, results, strict=True):
                # Size one is known from the shape alone.
                self.axes[var] = tuple(ONE if n == 1 else axis for n, axis in zip(var.aval.shape, axes, strict=True))

    def _scan(self, equation: Equation, operands: list[Axes]) -> Sequence[Axes]:
        """The body is walked once: what it ties in one step is tied in all. The axis scanned over is frozen."""
        params = equation.params
        body = self.bodies[id(equation)] = flat_body(params["jaxpr"])
        inputs = body.inputs
        n_consts, n_carry = scan_counts(equation)
        steps = atom(params["length"], reason("scanned over by", equation))
        for axes in operands[n_consts + n_carry :]:
            tie(axes[0], steps)
        # A carry that begins as a broadcast need not stay one.
        carry = [concrete(x, axes) for x, axes in zip(inputs[n_consts:], operands[n_consts : n_consts + n_carry])]
        inner = [*operands[:n_consts], *carry, *(axes[1:] for axes in operands[n_consts + n_carry :])]
        self.axes.update(zip(inputs, inner, strict=True))
        self._constants(body.constants)
        self._walk(body.equations)
        results = [self.read(x) for x in body.outputs]
        for x, axes, after in zip(inputs[n_consts:], carry, results):
            elementwise(x.aval.shape, [axes, after])
        return [*carry, *((steps, *axes) for axes in results[n_carry:])]


def _constant_axes(value: Any) -> Axes:
    why = f"a constant array of shape {list(np.shape(value))} that f closes over or computes from numbers"
    return tuple(
        ONE if n == 1 else None if alike else atom(n, why)
        for n, alike in zip(np.shape(value), varies_not(value), strict=True)
    )


def varies_not(value: Any) -> tuple[bool, ...]:
    """For each axis of a constant, whether its elements are the same all along it; False where that is not known."""
    shape = np.shape(value)
    if not shape:
        return ()
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) or math.prod(shape) > _LOOKED_AT or 0 in shape:
        return (False,) * len(shape)
    array = np.asarray(value)
    return tuple(bool((array == array.take([0], axis=i)).all()) for i in range(array.ndim))

"""f as if some units were gone, with all shapes as they were: what a physically smaller f must agree with."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jprune.annotations import Array, Bool, Shaped
from jprune.trace.coupling.atoms import ONE, Axis, find, leaves
from jprune.trace.coupling.group import Group
from jprune.trace.coupling.layout import Layout
from jprune.trace.coupling.removed import Mean, Removed
from jprune.trace.jaxpr import Atom, Equation, PyTree, Trace, Var, scan_counts
from jprune.trace.leaves import PARAMETERS

Keep = Mapping[Axis, np.ndarray]  # per atom, bool: which units stay


def masked(
    flat: Trace, layout: Layout, removed: Removed, groups: Mapping[Axis, Group], keep: Mapping[str, np.ndarray]
) -> Callable[..., Any]:
    """The function of f's arguments; `keep` has a bool mask per group's name."""
    units = {leaf: keep[g.name] for leaf, g in groups.items() if g.name in keep}
    run = _Run(layout, removed, units)

    def masked_f(params: PyTree, *args: PyTree) -> Any:
        leaves = flat.params_tree.arrays(params, "parameters", PARAMETERS)
        given = flat.args_tree.arrays((args, {}), "arguments")
        values: dict[Var, Any] = dict(flat.constants)
        for var, leaf in zip(flat.params.values(), leaves, strict=True):
            values[var] = _zeroed(jnp.asarray(leaf), layout.axes[var], units)
        values.update(zip(flat.args, given, strict=True))
        return jax.tree.unflatten(flat.output_tree, run(flat.equations, values, flat.outputs))

    return masked_f


def positions(axis: Axis | None, keep: Keep) -> Bool[np.ndarray, "n"] | None:
    """Which positions of an axis stay; None if all do."""
    if axis is None or axis is ONE or not any(leaf in keep for leaf in leaves(axis)):
        return None
    return _kept(find(axis), keep)


def _kept(axis: Axis, keep: Keep) -> Bool[np.ndarray, "n"]:
    axis = find(axis)
    if axis.kind == "leaf":
        return keep.get(axis, np.ones(axis.size, bool))
    parts = [_kept(x, keep) for x in axis.parts]
    if axis.kind == "sum":
        return np.concatenate(parts)
    result = np.ones(1, bool)
    for part in parts:
        result = (result[:, None] & part).reshape(-1)
    return result


def _zeroed(x: Shaped[Array, "..."], axes: Sequence[Axis | None], keep: Keep) -> Shaped[Array, "..."]:
    """`x` with zeros at the positions that do not stay along any of its axes."""
    for i, axis in enumerate(axes):
        stays = positions(axis, keep)
        if stays is not None:
            x = jnp.where(jnp.expand_dims(stays, [j for j in range(x.ndim) if j != i]), x, jnp.zeros((), x.dtype))
    return x


class _Run:
    """Evaluates equations, with the operands of means masked and their divisors replaced."""

    def __init__(self, layout: Layout, removed: Removed, keep: Keep):
        self.layout, self.keep = layout, keep
        self.totals: dict[int, Mean] = {}
        self.quotients: dict[int, float] = {}
        """By the identity of an equation that divides by a length, the share of it that is kept."""
        for mean in removed.means.values():
            axes = layout.read(mean.total.invars[0])
            stays = [positions(axes[i], keep) for i in mean.total.params["axes"]]
            if any(s is not None for s in stays):
                self.totals[id(mean.total)] = mean
                share = math.prod(s.mean() for s in stays if s is not None)
                self.quotients.update((id(e), share) for e in mean.quotients)

    def __call__(self, equations: Iterable[Equation], values: dict[Var, Any], outputs: Iterable[Atom]) -> list[Any]:
        def read(x: Atom) -> Any:
            return x.val if isinstance(x, jex.Literal) else values[x]

        for equation in equations:
            operands = [read(x) for x in equation.invars]
            if id(equation) in self.totals:
                axes = self.layout.read(equation.invars[0])
                over = equation.params["axes"]
                operands[0] = _zeroed(operands[0], [a if i in over else None for i, a in enumerate(axes)], self.keep)
            if id(equation) in self.layout.bodies:
                results = self._scan(equation, operands)
            else:
                results = _evaluate(equation, operands)
            if id(equation) in self.quotients:
                (x,) = results
                results = [(x / jnp.asarray(self.quotients[id(equation)], x.dtype))]
            values.update(zip(equation.outvars, results, strict=True))
        return [read(x) for x in outputs]

    def _scan(self, equation: Equation, operands: list[Any]) -> list[Any]:
        params, body = equation.params, self.layout.bodies[id(equation)]
        n_consts, n_carry = scan_counts(equation)
        consts, carry, rows = (
            operands[:n_consts],
            operands[n_consts : n_consts + n_carry],
            operands[n_consts + n_carry :],
        )

        def step(carry: Sequence[Any], row: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            values = {**body.constants, **dict(zip(body.inputs, [*consts, *carry, *row], strict=True))}
            results = self(body.equations, values, body.outputs)
            return results[:n_carry], results[n_carry:]

        carry, columns = jax.lax.scan(step, carry, rows, length=params["length"], reverse=params["reverse"])
        return [*carry, *columns]


def _evaluate(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    inputs = [jex.Var(x.aval) for x in equation.invars]
    jaxpr = jex.Jaxpr(
        [],
        inputs,
        list(equation.outvars),
        [equation.replace(invars=inputs)],
        equation.effects,
        jex.DebugInfo("jprune.masked", equation.primitive.name, None, None),
    )
    return list(jax.core.eval_jaxpr(jaxpr, (), *operands))

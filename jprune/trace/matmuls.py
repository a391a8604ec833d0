"""Every matmul of a value against a parameter: which leaf, which of its axes, what feeds it, and how deep it lies."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

from jprune import trees
from jprune.annotations import Array, Shaped
from jprune.errors import JpruneError
from jprune.trace.jaxpr import (
    CASTS,
    MATMULS,
    Equation,
    PyTree,
    Trace,
    Var,
    bodies,
    inlined,
    trace,
    variables,
    where_written,
)
from jprune.trace.views import Axes, Digit, follow, join, matrix, regroup, whole

Where = trees.Filter | Callable[[str], bool] | None
"""Which parameters' matmuls count: expressions searched for in their paths, or a function of the path; None = all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamMatmul:
    """One matmul of a value against a parameter leaf."""

    path: str
    in_axes: tuple[int, ...]
    """Axes of the leaf that are summed over, ascending. Flattened in this order they number its matrix view's rows."""
    out_axes: tuple[int, ...]
    """The other axes of the leaf, ascending."""
    stage: int
    """How many matmuls lie before this one on the longest path that leads to it."""
    input_id: int
    """Equal for matmuls that read the same value over the same axes."""
    batch_axes: tuple[int, ...] = ()
    """Axes of the leaf that run along with axes of the value: it is a stack of kernels, each with inputs of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A matmul of a value against something made of parameters that has no place in `matmuls`, and why."""

    paths: tuple[str, ...]
    reason: str
    source: str
    """Where the matmul is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """What a matmul reads: a value, and the digits of its index that number the input features."""

    value: Var
    columns: tuple[Digit, ...]
    batch: tuple[Digit, ...] = ()
    """The digits that number the kernels of a stack."""

    def matrix(self, x: Shaped[Array | np.ndarray, "..."]) -> Shaped[Array | np.ndarray, "*stack tokens d_in"]:
        """The matrix view of the value: features in the order of the kernel's `in_axes`; for a stack, one for each."""
        if not self.batch:
            return matrix(x, self.columns)
        count = math.prod(d.size for d in self.batch)
        rows = matrix(x, (*self.batch, *self.columns))
        return rows.reshape(len(rows), count, -1).swapaxes(0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operand:
    """The operand of a matmul that is a view of a parameter leaf."""

    side: int
    """0 or 1: its place among the equation's operands."""
    axes: Axes
    """What each of its axes is made of, as digits of the axes of the leaf."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Everything that the faces of `jprune.trace` need to know about the matmuls of a trace."""

    matmuls: dict[Var, ParamMatmul]
    """By the variable of their result."""
    kernels: dict[Var, Operand]
    """The operand that is the kernel, of each of these matmuls."""
    inputs: tuple[Input, ...]
    """By input_id."""
    depth: dict[Var, int]
    """Matmuls on the longest path that leads to a value; only for values that depend on the arguments."""
    origins: dict[Var, frozenset[str]]
    """Paths of the parameters that a value is made of; only for values that do not depend on the arguments."""
    skipped: tuple[Skipped, ...]


def matmuls(
    f: Callable, params: PyTree, *args: PyTree, where: Where = None, stacked: bool = False
) -> tuple[ParamMatmul, ...]:
    """Every matmul of ``f(params, *args)`` against a parameter leaf, in the order in which they are written.

    A parameter counts wherever it has gone through casts, transposes, reshapes and the like on its way to the matmul,
    in any function of JAX, Linen or NNX, under jit, remat and custom derivatives. One that is used twice is listed
    twice. What cannot be listed, as convolutions, stacked experts and slices of a kernel, `skipped` names.

    Args:
      f: any traceable function.
      params: its parameters: a pytree of arrays or of `jax.ShapeDtypeStruct`s.
      *args: its other arguments, likewise. Nothing is computed.
      where: which parameters' matmuls count; the others are equations like any other, and add nothing to `stage`.
      stacked: whether stacks of kernels count (experts: see `ParamMatmul.batch_axes`).

    Raises:
      JpruneError: `where` finds nothing, or a matmul that counts lies inside control flow.
    """
    return tuple(find(trace(f, params, *args), where, stacked=stacked).matmuls.values())


def skipped(f: Callable, params: PyTree, *args: PyTree) -> tuple[Skipped, ...]:
    """Which matmuls against something made of parameters `matmuls` does not list, and why."""
    return find(trace(f, params, *args), lambda path: False).skipped


def find(flat: Trace, where: Where = None, *, stacked: bool = False) -> Found:
    """Walks the equations of a trace: first for what each value is, then for the depth of the matmuls that count."""
    values = _classify(flat, stacked)
    wanted = _choose(values, where)
    for equation, paths in values.inside:
        if refused := sorted(wanted & paths):
            raise JpruneError(
                f"expected matmuls against parameters outside of control flow, found {', '.join(refused)} used inside "
                f"{equation.primitive.name} at {where_written(equation)}: trace one iteration (call it per block), "
                "unroll the loop, or leave these parameters out with `where`"
            )
    depth = {x: 0 for x in flat.args}
    inputs: dict[Input, int] = {}
    chosen: dict[Var, ParamMatmul] = {}
    kernels: dict[Var, Operand] = {}
    for equation in flat.equations:
        level = max((depth[x] for x in variables(equation) if x in depth), default=0)
        for result in equation.outvars:
            product = values.products.get(result)
            if product is not None and product.path in wanted:
                kernels[result] = product.kernel
                chosen[result] = ParamMatmul(
                    path=product.path,
                    in_axes=product.in_axes,
                    out_axes=product.out_axes,
                    stage=level,
                    input_id=inputs.setdefault(product.input, len(inputs)),
                    batch_axes=product.batch_axes,
                )
            if result not in values.origins:
                depth[result] = level + (result in chosen)
    return Found(
        matmuls=chosen,
        kernels=kernels,
        inputs=tuple(inputs),
        depth=depth,
        origins=values.origins,
        skipped=tuple(values.skipped),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Product:
    """A matmul against a leaf, before it is known whether it counts."""

    path: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]
    kernel: Operand
    input: Input


@dataclasses.dataclass(kw_only=True)
class _Values:
    """What each value of a trace is, found from top to bottom."""

    origins: dict[Var, frozenset[str]]
    views: dict[Var, tuple[Var, Axes]] = dataclasses.field(default_factory=dict)
    """The value that a value is a view of. Of parameters, casts are views too; elsewhere they change what is read."""
    products: dict[Var, _Product] = dataclasses.field(default_factory=dict)
    inside: list[tuple[Equation, frozenset[str]]] = dataclasses.field(default_factory=list)
    """Equations with matmuls against parameters inside, and the paths of these."""
    skipped: list[Skipped] = dataclasses.field(default_factory=list)

    def view(self, x: Var) -> tuple[Var, Axes]:
        return self.views.get(x, (x, whole(x.aval.shape)))


def _classify(flat: Trace, stacked: bool) -> _Values:
    paths = {x: path for path, x in flat.params.items()}
    values = _Values(origins=dict.fromkeys(flat.constants, frozenset()) | {x: frozenset([p]) for x, p in paths.items()})
    makers: dict[Var, Equation] = {}
    for equation in flat.equations:
        operands = variables(equation)
        made_of = frozenset[str]().union(*(values.origins.get(x, ()) for x in operands))
        fixed = all(x in values.origins for x in operands) and not equation.effects
        if fixed:
            values.origins.update(dict.fromkeys(equation.outvars, made_of))
        elif made_of and equation.primitive.name in MATMULS:
            product = _product(equation, values, paths, makers, stacked)
            if isinstance(product, _Product):
                values.products[equation.outvars[0]] = product
            elif product is not None:
                values.skipped.append(
                    Skipped(paths=tuple(sorted(made_of)), reason=product, source=where_written(equation))
                )
        elif made_of and (inside := frozenset(_inside(equation, values.origins))):
            values.inside.append((equation, inside))
        if operands and len(equation.outvars) == 1:
            root, axes = values.view(operands[0])
            cast = fixed and equation.primitive.name in CASTS
            if (seen := axes if cast else follow(equation, axes)) is not None:
                values.views[equation.outvars[0]] = root, seen
        makers.update(dict.fromkeys(equation.outvars, equation))
    return values


def _product(
    equation: Equation, values: _Values, paths: Mapping[Var, str], makers: Mapping[Var, Equation], stacked: bool
) -> _Product | str | None:
    """The matmul, or why it is none of a value against a leaf; None if no operand is made of parameters alone."""
    sides = [i for i, x in enumerate(equation.invars[:2]) if isinstance(x, jex.Var) and values.origins.get(x)]
    if not sides:
        return None
    side = sides[0]
    if equation.primitive.name != "dot_general":
        return f"{equation.primitive.name} is not a plain matmul"
    kernel, axes = values.view(equation.invars[side])
    if kernel not in paths:
        maker = makers[kernel]
        return f"its kernel is no view of a parameter, but made by {maker.primitive.name} at {where_written(maker)}"
    contracted, batch = equation.params["dimension_numbers"]
    along = [i for i in batch[side] if equation.invars[side].aval.shape[i] > 1]
    if along and not stacked:
        return "its kernel has a batch axis (stacked kernels, as of experts)"
    batch_axes = {d.axis for i in along for d in axes[i]}
    in_axes = {d.axis for i in contracted[side] for d in axes[i]}
    out_axes = {d.axis for i, digits in enumerate(axes) if i not in (*contracted[side], *along) for d in digits}
    if cut := in_axes & out_axes or batch_axes & (in_axes | out_axes):
        return f"a reshape of the kernel leaves part of axis {min(cut)} to be summed over, and part not"
    # A reshape loses sight of axes of size one. They may count as either, but a matmul has at least one input axis.
    unseen = [i for i in range(kernel.aval.ndim) if i not in in_axes | out_axes | batch_axes]
    in_axes = in_axes or set(unseen[:1])
    if not in_axes or not contracted[side]:
        return "it sums over no axis of the parameter"
    return _Product(
        path=paths[kernel],
        in_axes=tuple(sorted(in_axes)),
        out_axes=tuple(i for i in range(kernel.aval.ndim) if i not in in_axes | batch_axes),
        batch_axes=tuple(sorted(batch_axes)),
        kernel=Operand(side=side, axes=axes),
        input=_input(
            values,
            equation.invars[1 - side],
            contracted[1 - side],
            [axes[i] for i in contracted[side]],
            [theirs for own, theirs in zip(batch[side], batch[1 - side]) if own in along],
            [axes[i] for i in along],
        ),
    )


def _input(
    values: _Values,
    operand: Var,
    contracted: Sequence[int],
    kernel: Sequence[Sequence[Digit]],
    batch: Sequence[int],
    stack: Sequence[Sequence[Digit]],
) -> Input:
    """The operand of a matmul whose axes `contracted` meet the digits `kernel` of the leaf, in the leaf's order.

    Its axes `batch` run along with the digits `stack` of the leaf.
    """
    # If the kernel's digits cut across the axes of the value that the operand is a view of, they do not cut across the
    # axes of the operand itself: those that are contracted have the kernel's sizes.
    met: list[Axes | None] = []
    ours, theirs = [*contracted, *batch], [*kernel, *stack]
    for root, axes in (values.view(operand), (operand, whole(operand.aval.shape))):
        value, met = root, [regroup(axes[i], [d.size for d in digits]) for i, digits in zip(ours, theirs)]
        if None not in met:
            break

    count = len(contracted)
    return Input(value=value, columns=_ordered(kernel, met[:count]), batch=_ordered(stack, met[count:]))


def _ordered(digits: Sequence[Sequence[Digit]], met: Sequence[Axes | None]) -> tuple[Digit, ...]:
    """The digits that `digits` of a leaf have met, in the leaf's order."""
    pairs = [pair for own, other in zip(digits, met) for pair in zip(own, other or ())]
    pairs.sort(key=lambda pair: (pair[0].axis, -pair[0].stride))
    return join(d for _, other in pairs for d in other)


def _inside(equation: Equation, origins: Mapping[Any, frozenset[str]]) -> Iterator[str]:
    """Paths of the parameters that matmuls inside an equation may read; errs towards naming too many."""
    for body, operands in bodies(equation):
        flat, inputs = inlined(body)
        known = {}
        for x, sources in zip(inputs, operands):
            fixed = [s for s in sources if isinstance(s, jex.Literal) or s in origins]
            if fixed and (len(sources) > 1 or fixed == list(sources)):
                known[x] = frozenset[str]().union(*(origins.get(s, ()) for s in fixed if isinstance(s, jex.Var)))
        for inner in flat:
            made_of = [known.get(x) for x in variables(inner)]
            if inner.primitive.name in MATMULS:
                yield from frozenset[str]().union(*(m for m in made_of if m))
            yield from _inside(inner, known)
            if None not in made_of:
                known.update(dict.fromkeys(inner.outvars, frozenset[str]().union(*(m for m in made_of if m))))


def _choose(values: _Values, where: Where) -> set[str]:
    usable = dict.fromkeys(
        [p.path for p in values.products.values()] + [p for _, ps in values.inside for p in sorted(ps)]
    )
    if where is None:
        return set(usable)
    if callable(where):
        return {path for path in usable if where(path)}
    reasons = {path: s for s in values.skipped for path in s.paths}
    chosen = trees.choose(usable | reasons, where)
    if not usable.keys() & chosen:
        path = chosen[0]
        raise JpruneError(
            f"expected {where!r} to find a kernel that `matmuls` lists, found only {', '.join(chosen)}; {path} is used "
            f"at {reasons[path].source}, but {reasons[path].reason}"
        )
    return usable.keys() & chosen

"""One flat view of a function's jaxpr, which every face of `jprune.trace` walks.

`trace` runs nothing: it asks JAX for the jaxpr of ``f(params, *args)``, replaces calls (jit, remat, custom derivatives)
by their bodies, computes equal values once, drops what no output needs, and names the parameter leaves by their path.
What remains is a list of equations from top to bottom; only control flow (scan, while, cond) and other functions of
higher order still hold a jaxpr of their own.
"""

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.extend import source_info_util

from jprune.errors import JpruneError
from jprune.trace.leaves import PARAMETERS, is_array, split
from jprune.trace.reading import reading
from jprune.trees import path_name

Var = Any  # jex.Var; the type checker does not know that its aval has a shape
Atom = Any  # jex.Var | jex.Literal
Equation = Any  # jex.JaxprEqn
PyTree = Any

CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
"""Calls that are replaced by their body. Derivatives of the flat view are those of the bodies."""

CASTS = {"convert_element_type", "reduce_precision"}
"""Same shape, other precision."""

IDENTITIES = {"copy", "copy_p", "stop_gradient", "sharding_constraint", "reshard", "mesh_cast", "pvary", "name"}
"""Same shape, same values."""

LAYOUTS = {"transpose", "reshape", "squeeze", "broadcast_in_dim"}
"""The same elements in another order, or repeated."""

ELEMENTWISE = {
    *CASTS,
    *IDENTITIES,
    *("abs", "add", "add_any", "ceil", "clamp", "div", "floor", "max", "min", "mul", "neg", "rem", "round", "sign"),
    *("sub", "cbrt", "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "pow", "rsqrt", "sqrt", "square"),
    *("acos", "asin", "atan", "atan2", "cos", "cosh", "sin", "sinh", "tan", "tanh", "logistic", "erf", "erf_inv"),
    *("erfc", "eq", "ge", "gt", "is_finite", "le", "lt", "ne", "select_n", "and", "not", "or", "xor"),
    *("shift_left", "shift_right_arithmetic", "shift_right_logical"),
}
"""Each element of the result depends on the same element of each operand (or on a scalar)."""

MATMULS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general", "sorted_dot"}
"""Sums of products of two operands."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """``f(params, *args)`` as a flat list of equations."""

    params: dict[str, Var]
    """The variable of every parameter leaf by its path, in the order of the tree's leaves."""
    args: tuple[Var, ...]
    """The variables of the other arguments' leaves."""
    constants: dict[Var, Any]
    """Arrays that f closes over."""
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]
    params_tree: Any
    """With the leaves that are no arrays, as the activation functions in a module of equinox."""
    args_tree: Any
    output_tree: Any

    def leaves(self, params: PyTree) -> list[Any]:
        """The parameters' leaves that are arrays."""
        return split(params, PARAMETERS)[0]

    def runner(
        self, name: str, equations: Iterable[Equation], inputs: Sequence[Var], outputs: Sequence[Atom]
    ) -> Callable[[Sequence[Any], Sequence[Any]], list]:
        """A function (parameter leaves, values of `inputs`) -> values of `outputs` that runs `equations`."""
        equations = list(equations)
        needed = {x for e in equations for x in variables(e)}.union(x for x in outputs if isinstance(x, jex.Var))
        constants = {v: value for v, value in self.constants.items() if v in needed}
        own = runner(name, equations, [*constants, *self.params.values(), *inputs], outputs)

        def run(leaves: Sequence[Any], values: Sequence[Any]) -> list:
            return own([*constants.values(), *leaves, *values])

        return run


def runner(
    name: str, equations: Sequence[Equation], inputs: Sequence[Var], outputs: Sequence[Atom]
) -> Callable[[Sequence[Any]], list]:
    """A function (values of `inputs`) -> values of `outputs` that runs `equations`."""
    jaxpr = jex.Jaxpr(
        [],
        list(inputs),
        list(outputs),
        list(equations),
        frozenset[Any]().union(*(e.effects for e in equations)),
        jex.DebugInfo("jprune.trace", name, None, None),
    )

    def run(values: Sequence[Any]) -> list:
        return list(jax.core.eval_jaxpr(jaxpr, (), *values))

    return run


def trace(f: Callable, params: PyTree, *args: PyTree, unroll: bool = False, **kwargs: PyTree) -> Trace:
    """Traces ``f(params, *args, **kwargs)``; arrays and `jax.ShapeDtypeStruct`s serve alike, and all else is constant.

    Where `unroll` says so, scans are written out: their bodies as often as they run.

    Raises:
      JpruneError: f raises while it is traced; the message says at which line.
    """
    params_leaves, params_tree = split(params, PARAMETERS)
    args_leaves, args_tree = split((args, kwargs))

    def call(params_leaves: list[Any], args_leaves: list[Any]) -> Any:
        args, kwargs = args_tree.fill(args_leaves)
        return f(params_tree.fill(params_leaves), *args, **kwargs)

    try:
        with reading(True):
            if params_tree.others or args_tree.others or kwargs:
                closed, output = jax.make_jaxpr(call, return_shape=True)(params_leaves, args_leaves)
            else:  # JAX remembers the traces of f
                closed, output = jax.make_jaxpr(f, return_shape=True)(params, *args)
    except JpruneError:
        raise
    except Exception as error:
        words = str(error).strip().split("\n\n")[0]
        raise JpruneError(
            f"expected a function that JAX can trace, but tracing it failed at {_written_at(error)} with "
            f"{type(error).__name__}: {words}"
        ) from error
    flat = _Inliner(unroll=unroll)
    inputs = getattr(closed, "jaxpr", closed).invars
    outputs = flat.run(closed, inputs)
    paths = [
        path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if is_array(leaf, PARAMETERS)
    ]
    if len(set(paths)) < len(paths):
        twice = next(path for i, path in enumerate(paths) if path in paths[:i])
        raise JpruneError(
            f"expected every parameter to have a path of its own, found two leaves at {twice}; rename one"
        )
    return Trace(
        params=dict(zip(paths, inputs[: len(paths)], strict=True)),
        args=tuple(inputs[len(paths) :]),
        constants=flat.constants,
        equations=_live(flat.equations, outputs),
        outputs=tuple(outputs),
        params_tree=params_tree,
        args_tree=args_tree,
        output_tree=jax.tree.structure(output),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Body:
    """A jaxpr inside an equation as a flat list of equations, with input variables of its own."""

    equations: tuple[Equation, ...]
    inputs: tuple[Var, ...]
    outputs: tuple[Atom, ...]
    constants: dict[Var, Any]


def flat_body(closed: Any) -> Body:
    """A jaxpr with calls replaced by their bodies; the same jaxpr gets other variables each time."""
    flat = _Inliner()
    inputs = tuple(jex.Var(x.aval) for x in getattr(closed, "jaxpr", closed).invars)
    outputs = tuple(flat.run(closed, inputs))
    return Body(equations=_live(flat.equations, outputs), inputs=inputs, outputs=outputs, constants=flat.constants)


def scan_counts(equation: Equation) -> tuple[int, int]:
    """How many operands of a scan are constants of its body, and how many the carry; the others are scanned over."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = (len(part) for part in params["ft_in"].unpack())  # jax >= 0.12
    return consts, carry


def variables(equation: Equation) -> list[Var]:
    """The operands of an equation that are not literals."""
    return [x for x in equation.invars if isinstance(x, jex.Var)]


def where_written(equation: Equation) -> str:
    """File, line and function of the source that made an equation, as far as JAX knows."""
    return source_info_util.summarize(equation.source_info)


def _written_at(error: BaseException) -> str:
    """The innermost line of user code that an error came through."""
    libraries = tuple(
        os.path.dirname(path) for name in ("jax", "numpy", "flax", "jaxtyping") if (path := _file_of(name)) is not None
    )
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename[:1] != "<" and f.filename != __file__]
    ours = [f for f in frames if not f.filename.startswith(libraries)] or frames
    if not ours:
        return "an unknown line"
    return f"{ours[-1].filename}:{ours[-1].lineno} ({ours[-1].name}: {ours[-1].line})"


def _file_of(module: str) -> str | None:
    return getattr(sys.modules.get(module), "__file__", None)


class _Inliner:
    def __init__(self, *, unroll: bool = False) -> None:
        self.unroll = unroll
        self.constants: dict[Var, Any] = {}
        self.equations: list[Equation] = []
        self.seen: dict[Any, list[Var]] = {}
        self.callers: list[Any] = []
        """Where the calls around the equations are written, the innermost last."""
        self.unwritten: dict[int, bool] = {}
        """Which equations, by their traceback's identity, are not in user code, as the bodies of jnp's functions."""

    def run(self, closed: Any, inputs: Sequence[Atom]) -> list[Atom]:
        """Appends the equations of a jaxpr applied to `inputs`; returns what its outputs are called now."""
        # jax < 0.12 keeps the constants' values on a wrapper (ClosedJaxpr), later versions on the jaxpr itself.
        jaxpr = getattr(closed, "jaxpr", closed)
        names: dict[Var, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True):
            names[var] = var
            self.constants[var] = value

        def read(atom: Atom) -> Atom:
            return atom if isinstance(atom, jex.Literal) else names[atom]

        for equation in jaxpr.eqns:
            operands = [read(x) for x in equation.invars]
            name = equation.primitive.name
            if name in CALLS:
                self.callers.append(self.source(equation))
                results = self.run(_body(equation), operands)
                self.callers.pop()
            elif name == "optimization_barrier":
                # It only speaks to the compiler, and would tie values together that nothing else does.
                results = operands
            elif name == "scan" and self.unroll:
                results = self.written_out(equation, operands)
            else:
                results = self.emit(equation, operands)
            names.update(zip(equation.outvars, results, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def written_out(self, equation: Equation, operands: list[Atom]) -> list[Atom]:
        """Appends the body of a scan as often as it runs."""
        consts, carried = scan_counts(equation)
        params, results = equation.params, equation.outvars
        state, rows = operands[consts : consts + carried], []
        self.callers.append(self.source(equation))
        for i in reversed(range(params["length"])) if params["reverse"] else range(params["length"]):
            xs = [self.apply(lambda x, i=i: x[i], [x])[0] for x in operands[consts + carried :]]
            outputs = self.run(params["jaxpr"], [*operands[:consts], *state, *xs])
            state = outputs[:carried]
            rows.append(outputs[carried:])
        rows = rows[::-1] if params["reverse"] else rows
        ys = [self.apply(lambda *each: jnp.stack(each), list(each))[0] for each in zip(*rows)]
        self.callers.pop()
        return [
            *state,
            *(ys or self.apply(lambda: [jnp.zeros(x.aval.shape, x.aval.dtype) for x in results[carried:]], [])),
        ]

    def apply(self, function: Callable, operands: list[Atom]) -> list[Atom]:
        """Appends what a function does."""
        return self.run(jax.make_jaxpr(function)(*(x.aval for x in operands)), operands)

    def emit(self, equation: Equation, operands: list[Atom]) -> list[Var]:
        """Appends an equation with new operands and results, unless an equal one has computed the same values."""
        key = _key(equation, operands)
        if key is not None and key in self.seen:
            return self.seen[key]
        # New variables even here: the body of a function that is called twice appears twice.
        results = [jex.Var(x.aval) for x in equation.outvars]
        source = self.source(equation)
        self.equations.append(equation.replace(invars=operands, outvars=results, source_info=source))
        if key is not None:
            self.seen[key] = results
        return results

    def source(self, equation: Equation) -> Any:
        """Where an equation is written; where its call is, if it is not in user code."""
        if not self.callers:
            return equation.source_info
        key = id(equation.source_info.traceback)
        if key not in self.unwritten:
            self.unwritten[key] = not where_written(equation)
        return self.callers[-1] if self.unwritten[key] else equation.source_info


def _body(equation: Equation) -> Any:
    return next(equation.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in equation.params)


def _key(equation: Equation, operands: Sequence[Atom]) -> Any:
    """What two equations that compute the same value have in common; None for those that stay as often as written.

    Matmuls stay, as a forward hook would see each.
    """
    if equation.effects or equation.primitive.name in MATMULS or any(jex.jaxprs_in_params(equation.params)):
        return None

    key = (equation.primitive, equation.ctx, tuple(sorted(equation.params.items())), tuple(map(_value, operands)))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _value(atom: Atom) -> Any:
    if isinstance(atom, jex.Literal):
        return str(atom.aval), np.asarray(atom.val).tobytes()  # by its bits: 0.0 == -0.0
    return atom


def _live(equations: Sequence[Equation], outputs: Iterable[Atom]) -> tuple[Equation, ...]:
    needed = {x for x in outputs if isinstance(x, jex.Var)}
    live = []
    for equation in reversed(equations):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            live.append(equation)
            needed.update(variables(equation))
    return tuple(reversed(live))

"""Statistics of what every parameter's matmul reads, gathered while the function runs: a forward hook for JAX.

Outside of loops the function runs as it is, and the inputs are seen beside it. A scan, a while loop or a branch with
kernels in it is run again from its jaxpr with statistics as further results: a scan along a stack of kernels gives one
statistic for each, whatever else is in a loop is added up, and a branch that is not taken has seen nothing.
"""

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jprune.annotations import Array, Shaped
from jprune.places import Observed
from jprune.statistics import Stacked
from jprune.trace.inputs import Input
from jprune.trace.jaxpr import Equation, PyTree, Trace, runner, scan_counts, trace, variables
from jprune.trace.leaves import split
from jprune.trace.levels import Level
from jprune.trace.matmuls import Found, Site, Where, find

Seen = dict[int, Any]
"""Statistics by the number of their slot, with the axes of stacks in front of every field."""


class Slot(NamedTuple):
    """What one statistic is of: kernels that read one input, and are in a stack along the same scans."""

    level: Level
    input: Input
    scans: tuple[int, ...]
    """Depths of the scans that go along the stack."""

    @classmethod
    def of(cls, site: Site) -> "Slot":
        """That of a listed matmul."""
        return cls(site.level, site.product.input, tuple(depth for depth, _ in site.product.scanned))


def observe(
    f: Callable[..., PyTree],
    statistic: type[Any],
    *,
    where: Where = None,
    stacked: bool = True,
    weights: Shaped[Array | np.ndarray, "..."] | None = None,
) -> Callable[..., tuple[PyTree, Observed]]:
    """``f`` that also returns a statistic of the inputs of every matmul against a parameter.

    Args:
      f: any traceable function of (params, *args, **kwargs).
      statistic: what to remember of inputs, a class as in `jprune.statistics` (`Gram` for example). Matmuls that read
        the same value share one; of a parameter that is used more than once, the statistics of all inputs are merged.
      where: which parameters' matmuls count; all if None.
      stacked: whether stacks of kernels count, as in `matmuls`; their statistic is a `Stacked`.
      weights: how much each token counts, zero for padding; its axes are the first ones of what the matmuls read, as
        [batch, length]. All count if None.

    Returns:
      A function (params, *args, **kwargs) -> (f(params, *args, **kwargs), `Observed`: statistics by the path of their
      kernel, and where it lies), to be jitted like f. Its derivatives are not those of f where f defines custom ones.
      It warns of kernels that cannot be observed, unless `where` is a function or leaves them out.

    Raises:
      JpruneError: when called, if `where` finds nothing that can be observed, or the weights do not fit an input.
    """

    @functools.wraps(f)
    def observed(params: PyTree, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, Observed]:
        flat = trace(f, params, *args, **kwargs)
        found = find(flat, where, stacked=stacked)
        warn(found, flat, where)
        values = [*flat.leaves(params), *split((args, kwargs))[0]]
        observer = _Observer(found, statistic, weights)
        outputs, seen = observer.run(found.top, values)
        return jax.tree.unflatten(flat.output_tree, outputs), collect(
            found.sites, {s: seen[i] for s, i in observer.slots.items()}
        )

    return observed


def warn(found: Found, flat: Trace, where: Where) -> None:
    """Warns of kernels that are left out though nothing said so, with their share of the parameters."""
    if callable(where):
        return
    listed = {s.matmul.path for s in found.sites}
    wanted = [where] if isinstance(where, str) else where
    left = {
        path: s
        for s in found.skipped
        for path in s.paths
        if path not in listed and (wanted is None or any(re.search(regex, path) for regex in wanted))
    }
    if not left:
        return
    sizes = {path: math.prod(x.aval.shape) for path, x in flat.params.items()}
    share = sum(sizes[path] for path in left) / max(1, sum(sizes.values()))
    path = max(left, key=lambda p: sizes[p])
    warnings.warn(
        f"{len(left)} kernel(s) with {100 * share:.3g} % of the parameters are left out; the largest is {path}: it is "
        f"used at {left[path].source}, but {left[path].reason}. `jprune.report` tells of all; say with `where` which "
        "kernels are meant",
        stacklevel=3,
    )


def collect(sites: Iterable[Site], seen: Mapping[Slot, Any]) -> Observed:
    """Statistics by kernel, out of those by input."""
    statistics: dict[str, Any] = {}
    places = {}
    for site in sites:
        place, new = site.matmul.place, _stacked(site, seen)
        known = statistics.get(place.key)
        statistics[place.key] = new if known is None else known.merge(new)
        places[place.key] = place
    return Observed(statistics, places)


def _stacked(site: Site, seen: Mapping[Slot, Any]) -> Any:
    """The statistic of a kernel; of a stack, in the order of the leaf's axes."""
    product, statistic = site.product, seen[Slot.of(site)]
    front = len(product.scanned) + len(product.input.stack)
    sizes = [d.size for d in product.stack]
    order = sorted(range(len(sizes)), key=lambda i: (product.stack[i].axis, -product.stack[i].stride))

    def arrange(x: Array) -> Array:
        rest = x.shape[front:]
        x = x.reshape(*sizes, *rest).transpose(*order, *range(len(sizes), len(sizes) + len(rest)))
        return x.reshape(*((math.prod(sizes),) if site.matmul.batch_axes else ()), *rest)

    arranged = jax.tree.map(arrange, statistic) if front else statistic
    return Stacked(arranged) if site.matmul.batch_axes else arranged


class _Observer:
    """Runs a trace and adds up statistics."""

    def __init__(self, found: Found, kind: type[Any], weights: Any) -> None:
        self.kind, self.weights = kind, weights
        self.slots: dict[Slot, int] = {}
        self.names: dict[int, str] = {}
        for site in found.sites:
            self.names.setdefault(self.slots.setdefault(Slot.of(site), len(self.slots)), site.matmul.path)

    def within(self, level: Level) -> dict[Slot, int]:
        """The slots of a level and of all within it."""
        here = {slot: i for slot, i in self.slots.items() if slot.level is level}
        for inner in level.inner.values():
            for body in inner:
                here |= self.within(body)
        return here

    def run(self, level: Level, inputs: Sequence[Any]) -> tuple[list[Any], Seen]:
        """The outputs of a level, and what was seen in it."""
        values: dict[Any, Any] = dict(zip(level.body.inputs, inputs, strict=True)) | level.body.constants
        own = {slot: i for slot, i in self.slots.items() if slot.level is level}
        wanted = {x for slot in own for x in slot.input.variables}
        seen: Seen = {}
        for part in self.parts(level):
            if isinstance(part, list):
                self.plain(level, part, values, wanted)
            else:
                results, found = self.loop(level, part, values)
                values.update(zip(part.outvars, results, strict=True))
                seen |= found
        for slot, i in own.items():
            read = tuple(values[x] for x in slot.input.variables)
            seen[i] = slot.input.update(self.kind, read, self.weights, self.names[i])
        return [x.val if isinstance(x, jex.Literal) else values[x] for x in level.body.outputs], seen

    def parts(self, level: Level) -> list[list[Equation] | Equation]:
        """Runs of equations that are computed as they are, and between them the loops with kernels inside."""
        parts: list[Any] = [[]]
        for equation in level.body.equations:
            inner = level.inner.get(equation.outvars[0], ()) if equation.outvars else ()
            if any(self.within(x) for x in inner):
                parts += [equation, []]
            else:
                parts[-1].append(equation)
        return [part for part in parts if part != []]

    def plain(self, level: Level, equations: list[Equation], values: dict[Any, Any], wanted: set[Any]) -> None:
        """Computes equations, and keeps of their results what is needed later."""
        made = {x for e in equations for x in e.outvars}
        here = {id(e) for e in equations}
        later = {x for e in level.body.equations if id(e) not in here for x in variables(e)}
        later |= wanted | {x for x in level.body.outputs if isinstance(x, jex.Var)}
        takes = list(dict.fromkeys(x for e in equations for x in variables(e) if x not in made))
        gives = [x for e in equations for x in e.outvars if x in later]
        run = runner("observe", equations, takes, gives)
        values.update(zip(gives, run([values[x] for x in takes]), strict=True))

    def loop(self, level: Level, equation: Equation, values: Mapping[Any, Any]) -> tuple[list[Any], Seen]:
        """Runs a loop or a branch with statistics as further results."""
        inner = level.inner[equation.outvars[0]]
        operands = [x.val if isinstance(x, jex.Literal) else values[x] for x in equation.invars]
        zeros = self.zeros(inner)
        match equation.primitive.name:
            case "scan":
                along = {i for slot, i in self.within(inner[0]).items() if level.depth in slot.scans}
                return self.scan(equation, inner[0], operands, zeros, along)
            case "while":
                return self.loop_while(equation, inner, operands, zeros)

        def branch(body: Level) -> Callable:
            def run(*operands: Any) -> Any:
                outputs, seen = self.run(body, operands)
                return outputs, zeros | seen

            return run

        return jax.lax.switch(operands[0], [branch(body) for body in inner], *operands[1:])

    def scan(self, equation: Equation, body: Level, operands: list[Any], zeros: Seen, along: set[int]) -> Any:
        """Runs a scan; the statistics `along` its kernels are stacked, all others are added up."""
        params = equation.params
        consts, carried = scan_counts(equation)

        def step(carry: Any, xs: Any) -> Any:
            state, sums = carry
            outputs, seen = self.run(body, [*operands[:consts], *state, *xs])
            stacks = {i: seen.pop(i) for i in along}
            return (outputs[:carried], self.merged(sums, seen)), (outputs[carried:], stacks)

        sums = {i: statistic for i, statistic in zeros.items() if i not in along}
        (state, sums), (ys, stacks) = jax.lax.scan(
            step,
            (operands[consts : consts + carried], sums),
            operands[consts + carried :],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*state, *ys], sums | stacks

    def loop_while(self, equation: Equation, inner: Sequence[Level], operands: list[Any], zeros: Seen) -> Any:
        """Runs a while loop; its statistics are added up."""
        cond, body = (equation.params[f"{name}_nconsts"] for name in ("cond", "body"))

        def again(state: Any) -> Any:
            return self.run(inner[0], [*operands[:cond], *state[0]])[0][0]

        def step(state: Any) -> Any:
            outputs, seen = self.run(inner[1], [*operands[cond : cond + body], *state[0]])
            return outputs, self.merged(state[1], seen)

        return jax.lax.while_loop(again, step, (operands[cond + body :], zeros))

    def zeros(self, inner: Sequence[Level]) -> Seen:
        """What the statistics of a loop are before it has run."""
        zeros: Seen = {}
        for body in inner:
            slots = self.within(body)
            if slots:
                given = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in body.body.inputs]
                _, seen = jax.eval_shape(functools.partial(self.run, body), given)
                zeros |= {i: self.nothing(slot, seen[i]) for slot, i in slots.items()}
        return zeros

    def nothing(self, slot: Slot, like: Any) -> Any:
        """A statistic that has seen nothing, with the axes of stacks that `like` has."""
        return jax.tree.map(lambda x, y: jnp.broadcast_to(x, y.shape), self.kind.zeros(slot.input.d_in), like)

    def merged(self, sums: Seen, seen: Seen) -> Seen:
        """Two collections of statistics as one."""
        d_in = {i: slot.input.d_in for slot, i in self.slots.items()}
        return {i: _merge(own, seen[i], self.kind.zeros(d_in[i]), self.kind.merge) for i, own in sums.items()}


def _merge(a: Any, b: Any, plain: Any, merge: Callable) -> Any:
    """Two statistics with axes of stacks in front as one."""
    for _ in range(jax.tree.leaves(a)[0].ndim - jax.tree.leaves(plain)[0].ndim):
        merge = jax.vmap(merge)
    return merge(a, b)

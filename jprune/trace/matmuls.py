"""Every matmul of a value against a parameter: which leaf, which of its axes, what feeds it, and how deep it lies."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from jprune import trees
from jprune.errors import JpruneError
from jprune.places import Place
from jprune.trace.inputs import Input
from jprune.trace.jaxpr import PyTree, Trace, Var, trace, variables
from jprune.trace.levels import End, Level
from jprune.trace.products import Product
from jprune.trace.uses import walk
from jprune.trace.views import Axes

Where = trees.Filter | Callable[[str], bool] | None
"""Which parameters' matmuls count: expressions searched for in their paths, or a function of the path; None = all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamMatmul:
    """One matmul of a value against a parameter leaf, or a part of one."""

    path: str
    in_axes: tuple[int, ...]
    """Axes of the leaf that are summed over, ascending. Flattened in this order they number its matrix view's rows."""
    out_axes: tuple[int, ...]
    """The other axes of the leaf, ascending."""
    stage: int
    """How many matmuls lie before this one on the longest path that leads to it; a loop's body counts once."""
    input_id: int
    """Equal for matmuls that read the same value over the same axes."""
    batch_axes: tuple[int, ...] = ()
    """Axes of the leaf that number a stack of kernels, each with inputs of its own: they run along with axes of the
    value (experts), a scan goes along them (layers), or an index picks from them."""
    part: tuple[tuple[int, int], ...] | None = None
    """Start and stop along every axis of the leaf, if the kernel is not all of it."""
    shape: tuple[int, ...] | None = None
    """What the part is reshaped to before its axes are counted, if an axis of the leaf is of several kinds."""

    @property
    def place(self) -> Place:
        """Where the kernel lies."""
        return Place(path=self.path, in_axes=self.in_axes, batch_axes=self.batch_axes, part=self.part, shape=self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A matmul of a value against something made of parameters that has no place in `matmuls`, and why."""

    paths: tuple[str, ...]
    reason: str
    source: str
    """Where the matmul is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operand:
    """The operand of a matmul that is a view of a parameter leaf."""

    side: int
    """0 or 1: its place among the equation's operands."""
    axes: Axes
    """What each of its axes is made of, as digits of the axes of the leaf."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One listed matmul, where it is in the program."""

    matmul: ParamMatmul
    level: Level
    result: Var
    product: Product


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Everything that the faces of `jprune.trace` need to know about the matmuls of a trace."""

    sites: tuple[Site, ...]
    """Of all matmuls that count, in the order in which they are written."""
    inputs: tuple[Input, ...]
    """By input_id."""
    depth: dict[Var, int]
    """Matmuls on the longest path that leads to a value; only for values that depend on the arguments."""
    origins: dict[Var, frozenset[str]]
    """Paths of the parameters that a value is made of; only for values that do not depend on the arguments."""
    skipped: tuple[Skipped, ...]
    ends: tuple[End, ...]
    top: Level

    @property
    def matmuls(self) -> dict[Var, ParamMatmul]:
        """Those outside of loops and branches, by the variable of their result."""
        return {s.result: s.matmul for s in self.sites if s.level is self.top}

    @property
    def inside(self) -> tuple[Site, ...]:
        """Those inside of loops and branches."""
        return tuple(s for s in self.sites if s.level is not self.top)

    @property
    def kernels(self) -> dict[Var, Operand]:
        """The operand that is the kernel, of each of `matmuls`."""
        here = [s for s in self.sites if s.level is self.top]
        return {s.result: Operand(side=s.product.side, axes=s.product.axes) for s in here}


def matmuls(
    f: Callable,
    params: PyTree,
    *args: PyTree,
    where: Where = None,
    stacked: bool = True,
    partial: bool = False,
    **kwargs: PyTree,
) -> tuple[ParamMatmul, ...]:
    """Every matmul of ``f(params, *args, **kwargs)`` against a parameter leaf, in the order in which they are written.

    A parameter counts wherever it has gone through casts, transposes, reshapes, slices and the like on its way to the
    matmul, in any function of JAX, Linen or NNX, under jit, remat and custom derivatives, and inside of scans, loops
    and branches. Convolutions count too. One that is used twice is listed twice. A parameter of which some use cannot
    be followed is not listed at all, because what is known of its inputs would not be all; `skipped` says why.

    Args:
      f: any traceable function.
      params: its parameters: a pytree of arrays or of `jax.ShapeDtypeStruct`s.
      *args: its other arguments, likewise; what is no array is handed to f as it is. Nothing is computed.
      where: which parameters' matmuls count; the others are equations like any other, and add nothing to `stage`.
      stacked: whether stacks of kernels count (experts, layers of a scan: see `ParamMatmul.batch_axes`).
      partial: whether parameters count that something else reads too, as a tied embedding: which axes are summed over
        is known of these as well, but what is listed is not all that their values are for.
      **kwargs: other arguments of f, likewise.

    Raises:
      JpruneError: `where` finds nothing that can be listed.
    """
    flat = trace(f, params, *args, **kwargs)
    return tuple(s.matmul for s in find(flat, where, stacked=stacked, partial=partial).sites)


def skipped(f: Callable, params: PyTree, *args: PyTree, stacked: bool = True, **kwargs: PyTree) -> tuple[Skipped, ...]:
    """Which matmuls against something made of parameters `matmuls` does not list, and why; arguments as for it."""
    return find(trace(f, params, *args, **kwargs), lambda path: False, stacked=stacked).skipped


def find(flat: Trace, where: Where = None, *, stacked: bool = True, partial: bool = False) -> Found:
    """Follows every use of the parameters, then finds the depth of the matmuls that count."""
    top, ends = walk(flat)
    usable, left = _judge(ends, stacked=stacked, partial=partial)
    wanted = _choose(usable, left, where)
    finder = _Finder(wanted)
    finder.run(top, {x: 0 for x in flat.args})
    return Found(
        sites=tuple(finder.sites),
        inputs=tuple(finder.inputs),
        depth=finder.depth,
        origins=top.origins,
        skipped=tuple(left),
        ends=tuple(ends),
        top=top,
    )


class _Finder:
    """Numbers the matmuls that count, from top to bottom."""

    def __init__(self, wanted: set[str]) -> None:
        self.wanted = wanted
        self.sites: list[Site] = []
        self.inputs: dict[Input, int] = {}
        self.depth: dict[Var, int] = {}

    def run(self, level: Level, known: Mapping[Var, int]) -> int:
        """Walks through a level whose inputs have these depths; returns the largest depth in it."""
        depth = dict(known)
        deepest = max(depth.values(), default=0)
        for equation in level.body.equations:
            before = after = max([depth.get(x, 0) for x in variables(equation)], default=0)
            for inner in level.inner.get(equation.outvars[0], ()) if equation.outvars else ():
                after = max(after, self.run(inner, {x: before for x in inner.body.inputs if x not in inner.origins}))
            for result in equation.outvars:
                product = level.products.get(result)
                if product is not None and product.place.path in self.wanted:
                    self.add(level, result, product, before)
                    after = before + 1
                if result not in level.origins:
                    depth[result] = after
                    deepest = max(deepest, after)
        if level.depth == 0:
            self.depth = depth
        return deepest

    def add(self, level: Level, result: Var, product: Product, stage: int) -> None:
        place = product.place
        taken = {*place.in_axes, *place.batch_axes}
        # The axes are those of the leaf, or of what its part is reshaped to.
        ndim = len(place.shape) if place.shape is not None else product.ndim
        matmul = ParamMatmul(
            path=place.path,
            in_axes=place.in_axes,
            out_axes=tuple(i for i in range(ndim) if i not in taken),
            stage=stage,
            input_id=self.inputs.setdefault(product.input, len(self.inputs)),
            batch_axes=place.batch_axes,
            part=place.part,
            shape=place.shape,
        )
        self.sites.append(Site(matmul=matmul, level=level, result=result, product=product))


def _judge(ends: Iterable[End], *, stacked: bool, partial: bool) -> tuple[list[str], list[Skipped]]:
    """The paths all of whose uses are products that can be listed, and of all others why they are not."""
    products: dict[str, list[End]] = {}
    left: list[Skipped] = []
    others: dict[str, End] = {}
    for end in ends:
        if end.product is not None:
            products.setdefault(end.product.place.path, []).append(end)
            continue
        for path in end.paths:
            others.setdefault(path, end)
        if end.skipped:
            left.append(Skipped(paths=end.paths, reason=end.what, source=end.source))
    usable = []
    for path, own in products.items():
        if (reason := _not_whole(own, None if partial else others.get(path), stacked)) is None:
            usable.append(path)
        else:
            left.append(Skipped(paths=(path,), reason=reason, source=own[0].source))
    return usable, list(dict.fromkeys(left))


def _not_whole(own: list[End], other: End | None, stacked: bool) -> str | None:
    """Why matmuls against a parameter are not all that can be said of it, or None."""
    places = list(dict.fromkeys(end.product.place for end in own if end.product is not None))
    if other is not None:
        what = "by a product that is skipped" if other.skipped else f"elsewhere ({other.what})"
        return f"the parameter is also read {what} at {other.source}, so that this is not all that its values are for"
    for i, a in enumerate(places):
        for b in places[:i]:
            if a.part == b.part:
                return (
                    f"its matmuls sum over different axes, {b.in_axes} and {a.in_axes}: what is known of their inputs "
                    "does not add"
                )
            if a.part is None or b.part is None or _overlap(a.part, b.part):
                return f"its matmuls read parts of it that overlap, {b.key} and {a.key}"
    if not stacked and any(place.batch_axes for place in places):
        return "its kernel has a batch axis (stacked kernels, as of experts)"
    return None


def _overlap(a: tuple[tuple[int, int], ...], b: tuple[tuple[int, int], ...]) -> bool:
    return all(start < other_stop and other < stop for (start, stop), (other, other_stop) in zip(a, b))


def _choose(usable: list[str], left: list[Skipped], where: Where) -> set[str]:
    if where is None:
        return set(usable)
    if callable(where):
        return {path for path in usable if where(path)}
    reasons: dict[str, Skipped] = {}
    for s in left:
        for path in s.paths:
            reasons.setdefault(path, s)
    chosen = trees.choose(dict.fromkeys(usable) | reasons, where)
    if not set(usable) & set(chosen):
        path = chosen[0]
        raise JpruneError(
            f"expected {where!r} to find a kernel that `matmuls` lists, found only {', '.join(chosen)}; {path} is used "
            f"at {reasons[path].source}, but {reasons[path].reason}"
        )
    return set(usable) & set(chosen)

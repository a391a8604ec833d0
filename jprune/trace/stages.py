"""A function cut where its matmuls read: run it stage by stage, and change the kernels of a stage before they are used.

Matmuls that depend on equally many matmuls form a stage. Segment s runs the matmuls of stage s - 1 and everything up to
the inputs of stage s; what later segments need travels between them in a carry. Each matmul runs in one segment, once.

Values that depend on no argument (casts and reshapes of kernels, masks) are computed wherever they are needed, from the
parameters given there. The carry holds the inputs of the next stage and whatever else is needed later, but not both a
value and what is cheaply made of it: an elementwise equation or a view is repeated if that makes the carry smaller.
"""

import dataclasses
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jprune.annotations import Array, Shaped
from jprune.errors import JpruneError
from jprune.places import Observed
from jprune.trace.additions import Addition, additions
from jprune.trace.inputs import Input
from jprune.trace.jaxpr import (
    ELEMENTWISE,
    LAYOUTS,
    Atom,
    Equation,
    PyTree,
    Trace,
    Var,
    trace,
    variables,
)
from jprune.trace.leaves import ARGUMENTS, PARAMETERS, Tree, is_array, split
from jprune.trace.matmuls import Found, ParamMatmul, Where, find
from jprune.trace.observe import Slot, collect, warn

Carry = tuple[Any, ...]

CHEAP = ELEMENTWISE | LAYOUTS


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stages:
    """``f(params, *args)`` in segments; with S stages there are S + 1 of them.

    ``carry = start(*args)``, then ``carry = segment(params, carry)`` for every segment, then ``finish(carry)`` equals
    ``f(params, *args)``. Params may change between segments, but only leaves that `matmuls` lists.
    """

    matmuls: tuple[tuple[ParamMatmul, ...], ...]
    """The matmuls of each stage, in the order in which they are written."""
    segments: tuple[Callable[[PyTree, Carry], Carry], ...]
    """Pure functions to be jitted; their carry may be donated. In a shard_map, give it ``check_vma=False``."""
    trace: Trace
    found: Found
    carries: tuple[tuple[Atom, ...], ...]
    """The variables in the carry that each segment takes, and at the end those that the last one returns."""
    additions: dict[Var, Addition]
    """By the variable of a matmul's result what it is added to, see `jprune.trace.additions`; if it was asked for."""

    def start(self, *args: PyTree, **kwargs: PyTree) -> Carry:
        """The carry that segment 0 takes: those leaves of f's other arguments that are needed."""
        leaves = _leaves((args, kwargs), self.trace.args_tree, self.trace.args, "arguments")
        values = dict(zip(self.trace.args, leaves))
        return tuple(values[x] for x in self.carries[0])

    def inputs(self, stage: int, carry: Carry) -> dict[int, Shaped[Array | np.ndarray, "*stack tokens d_in"]]:
        """What the matmuls of a stage read, by input_id, out of the carry that segment `stage` returned."""
        return {i: read.matrix(*values) for i, (read, values) in self._read(stage, carry).items()}

    def sorted_inputs(self, stage: int, carry: Carry) -> dict[int, Any]:
        """As `inputs`, but `jprune.sorted_rows.Sorted` where rows are sorted by their kernel."""
        return {i: read.sorted(*values) for i, (read, values) in self._read(stage, carry).items()}

    def _read(self, stage: int, carry: Carry) -> dict[int, tuple[Input, list[Any]]]:
        values = self._values(stage, carry)
        reads = {m.input_id: self.found.inputs[m.input_id] for m in self.matmuls[stage]}
        return {i: (read, [values[x] for x in read.variables]) for i, read in reads.items()}

    def added(self, stage: int) -> dict[int, Addition]:
        """What the outputs of a stage's kernels are added to, by input_id; of inputs that one kernel reads, and it no
        other."""
        own = {result: m for result, m in self.found.matmuls.items() if m.stage == stage}
        ids, paths = ([getattr(m, name) for m in own.values()] for name in ("input_id", "path"))
        return {
            m.input_id: self.additions[result]
            for result, m in own.items()
            if result in self.additions and ids.count(m.input_id) == paths.count(m.path) == 1
        }

    def residuals(self, stage: int, carry: Carry) -> dict[int, Shaped[Array | np.ndarray, "tokens d_out"]]:
        """The rows of what is `added`, out of the carry that segment `stage` returned."""
        values = self._values(stage, carry)
        return {i: addition.rows(*(values[x] for x in addition.variables)) for i, addition in self.added(stage).items()}

    def observe(self, stage: int, statistic: type[Any], carry: Carry, weights: Any = None) -> Observed:
        """Statistics of what the matmuls of a stage read, out of the carry that segment `stage` returned.

        Args:
          stage: its number.
          statistic: a class as in `jprune.statistics`.
          carry: what segment `stage` returned.
          weights: how much each token counts, as in `jprune.observe`; all count if None.
        """
        values = self._values(stage, carry)
        sites = [s for s in self.found.sites if s.matmul.stage == stage]
        slots = {Slot.of(site): site for site in sites}
        seen = {
            slot: slot.input.update(
                statistic, tuple(values[x] for x in slot.input.variables), weights, site.matmul.path
            )
            for slot, site in slots.items()
        }
        return collect(sites, seen)

    def _values(self, stage: int, carry: Carry) -> dict[Var, Any]:
        return dict(zip(self.carries[stage + 1], carry, strict=True)) | self.trace.constants

    def finish(self, carry: Carry) -> PyTree:
        """The output of f, out of the carry that the last segment returned."""
        return jax.tree.unflatten(self.trace.output_tree, carry)


def stages(
    f: Callable,
    params: PyTree,
    *args: PyTree,
    where: Where = None,
    stacked: bool = True,
    unroll: bool = False,
    shared: bool = False,
    added: bool = False,
    **kwargs: PyTree,
) -> Stages:
    """Cuts ``f(params, *args, **kwargs)`` into segments between its stages.

    Args:
      f: any traceable function.
      params: its parameters: a pytree of arrays or of `jax.ShapeDtypeStruct`s.
      *args: its other arguments, likewise. The segments work for arrays of these shapes and dtypes.
      where: which parameters' matmuls count, as in `matmuls`.
      stacked: whether stacks of kernels count, as in `matmuls`.
      unroll: whether a scan with kernels in it is written out, so that the layers it goes through are stages of their
        own. The programs grow with the number of layers.
      shared: whether a kernel may be used in several stages. It is for those who prune it before the first, or not at
        all: pruned between stages, it would be pruned again in each.
      added: whether what the outputs of kernels are added to is wanted too, by `Stages.residuals`.
      **kwargs: other arguments of f, likewise.

    Raises:
      JpruneError: `where` finds nothing that can be listed; a matmul that counts lies inside a loop or branch (that is
        not written out); a kernel is used in several stages, and `shared` does not say that this is meant.
    """
    flat = trace(f, params, *args, unroll=unroll, **kwargs)
    found = find(flat, where, stacked=stacked)
    _check(found, unroll=unroll, shared=shared)
    warn(found, flat, where)
    depth = max((m.stage + 1 for m in found.matmuls.values()), default=0)
    by_stage = tuple(tuple(m for m in found.matmuls.values() if m.stage == s) for s in range(depth))
    plan = _Plan(flat, found)
    beside = additions(flat, found) if added else {}
    segments: list[Callable[[PyTree, Carry], Carry]] = []
    carries = [flat.outputs]
    for s in reversed(range(depth + 1)):
        read = {x for m in by_stage[s - 1] for x in found.inputs[m.input_id].variables} if s else set()
        read |= {y for x, m in found.matmuls.items() if m.stage == s - 1 and x in beside for y in beside[x].variables}
        read -= flat.constants.keys()
        equations, carry = plan.segment(s, carries[0], read)
        segments.insert(0, _segment(flat, f"segment_{s}", equations, carry, carries[0]))
        carries.insert(0, carry)
    return Stages(
        matmuls=by_stage,
        segments=tuple(segments),
        trace=flat,
        found=found,
        carries=tuple(carries),
        additions=beside,
    )


def _check(found: Found, *, unroll: bool, shared: bool) -> None:
    for site in found.inside:
        hint = "" if unroll else "write scans out with `unroll=True`, "
        raise JpruneError(
            f"expected matmuls against parameters outside of control flow, found {site.matmul.path} used inside a loop "
            f"or branch: {hint}trace one iteration (call it per block), or leave this parameter out with `where`"
        )
    if shared:
        return
    stage: dict[str, int] = {}
    for m in found.matmuls.values():
        if stage.setdefault(m.place.key, m.stage) != m.stage:
            raise JpruneError(
                f"expected every kernel in one stage, found {m.place.key} in stages {stage[m.place.key]} and "
                f"{m.stage}: pruned in each, it would be pruned twice; prune it before the first (`shared=True`), "
                "leave it out with `where`, or let `jprune.prune_function` do so"
            )


def _segment(
    flat: Trace, name: str, equations: Sequence[Equation], takes: Sequence[Var], returns: Sequence[Atom]
) -> Callable[[PyTree, Carry], Carry]:
    run = flat.runner(name, equations, takes, returns)

    tree = split(tuple(x.aval for x in takes))[1]

    def segment(params: PyTree, carry: Carry) -> Carry:
        leaves = _leaves(params, flat.params_tree, tuple(flat.params.values()), "params")
        return tuple(run(leaves, _leaves(carry, tree, takes, "carry")))

    segment.__name__ = segment.__qualname__ = name
    return segment


class _Plan:
    """Which equations each segment runs, and what it takes from the one before."""

    def __init__(self, flat: Trace, found: Found) -> None:
        self.equations = flat.equations
        self.depth = found.depth
        self.maker = {x: i for i, equation in enumerate(flat.equations) for x in equation.outvars}
        self.order = {x: i for i, x in enumerate([*flat.args, *self.maker])}

    def segment(self, s: int, returns: Iterable[Atom], read: set[Var]) -> tuple[list[Equation], tuple[Var, ...]]:
        """The equations of segment s and the carry it takes.

        Args:
          s: the segment.
          returns: the carry it returns.
          read: what the matmuls of stage s - 1 read: it must be in the carry that the segment takes.
        """
        made_before = {x for x in self.depth if self.depth[x] < s or x not in self.maker}
        effects = [i for i, e in enumerate(self.equations) if e.effects and self._level(e) == s]
        _, needed = self._walk(returns, effects, made_before)
        carry = self._smallest(needed | read, read)
        equations, _ = self._walk(returns, effects, carry)
        return equations, tuple(sorted(carry, key=self.order.__getitem__))

    def _level(self, equation: Equation) -> int:
        return max((self.depth[x] for x in variables(equation) if x in self.depth), default=0)

    def _walk(
        self, targets: Iterable[Atom], effects: Iterable[int], given: Container[Var]
    ) -> tuple[list[Equation], set[Var]]:
        """The equations that compute `targets` and have `effects`, and what they need of the values `given`."""
        run, needed, done = set(effects), set(), set()
        stack = [*targets, *(x for i in run for x in self.equations[i].invars)]
        while stack:
            x = stack.pop()
            if isinstance(x, jex.Literal) or x in done:
                continue
            done.add(x)
            if x in given:
                needed.add(x)
            elif x in self.maker:
                run.add(self.maker[x])
                stack += self.equations[self.maker[x]].invars
        return [self.equations[i] for i in sorted(run)], needed

    def _smallest(self, carry: set[Var], fixed: set[Var]) -> set[Var]:
        """Replaces values by what they are cheaply made of while that does not make the carry larger."""
        carry, candidates = set(carry), sorted(carry - fixed, key=self.order.__getitem__)
        while candidates:
            x = candidates.pop()
            if x not in self.maker or not self._repeatable(equation := self.equations[self.maker[x]]):
                continue
            sources = {y for y in variables(equation) if y in self.depth}
            saved = _bytes(x) - sum(_bytes(y) for y in sources - carry)
            # Nothing is lost with a single source of the same size, and other values may come from it too.
            if saved > 0 or (saved == 0 and len(sources) == 1):
                candidates = sorted({*candidates, *(sources - carry)}, key=self.order.__getitem__)
                carry = (carry - {x}) | sources
        return carry

    def _repeatable(self, equation: Equation) -> bool:
        """Whether an equation costs little. What it reads never changes: a kernel that may is read by matmuls alone."""
        return equation.primitive.name in CHEAP and not equation.effects


def _bytes(x: Var) -> int:
    return x.aval.size * x.aval.dtype.itemsize


def _leaves(tree: PyTree, structure: Tree, traced: Sequence[Var], what: str) -> list:
    """The leaves of a tree that has the structure, shapes and dtypes that were traced; an error if it has not."""
    numbers = PARAMETERS if what == "params" else ARGUMENTS
    leaves = structure.arrays(tree, what, numbers)
    named = [(path, leaf) for path, leaf in jax.tree.leaves_with_path(tree) if is_array(leaf, numbers)]
    for (path, leaf), x in zip(named, traced):
        given = jax.typeof(leaf)
        if (given.shape, given.dtype) != (x.aval.shape, x.aval.dtype):
            path = path[1:] if what == "arguments" and path[0].idx == 0 else path
            raise JpruneError(
                f"expected {what}{jax.tree_util.keystr(path)} to be {x.aval.str_short()} as in the call of `stages`, "
                f"got {given.str_short()}; call it again for other shapes"
            )
    return leaves

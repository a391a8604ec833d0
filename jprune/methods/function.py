"""A whole function pruned in one call: several batches, stage by stage, scans over layers written out.

As the originals do, a kernel is pruned by what reaches it through the kernels pruned before it (`sequential`). A kernel
that is used in several stages is pruned once, before the first, by what it reads in the dense function.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from jprune import devices, trees
from jprune.annotations import Array, Bool, Shaped
from jprune.cross_gram import streams
from jprune.errors import JpruneError
from jprune.methods.base import Method
from jprune.methods.prune import prune
from jprune.patterns import Pattern
from jprune.places import Observed
from jprune.trace.jaxpr import trace
from jprune.trace.matmuls import Found, find
from jprune.trace.observe import observe, warn
from jprune.trace.stages import Stages, stages

PyTree = Any
Masks = dict[str, Bool[Array, "..."]]
Batches = Iterable[Sequence[PyTree]]
Tell = Callable[[int, int, tuple[str, ...]], None]


def prune_function(
    f: Callable[..., PyTree],
    params: PyTree,
    batches: Batches,
    method: Method,
    pattern: Pattern,
    *,
    where: trees.Filter | None = None,
    keep: Mapping[str, Bool[Array, "..."]] | None = None,
    sequential: bool = True,
    between: Literal["recompute", "keep"] = "recompute",
    weights: Iterable[Shaped[Array, "..."]] | None = None,
    mesh: Mesh | None = None,
    tell: Tell | None = None,
) -> tuple[PyTree, Masks]:
    """Prunes the kernels of any function by what they read in some batches.

    Args:
      f: any traceable function of (params, *args).
      params: its parameters.
      batches: argument tuples, all of the same shapes; something that can be gone through more than once, as a list.
      method: e.g. `SparseGPT()`.
      pattern: e.g. `Unstructured(0.5)`.
      where: regular expressions over paths: which kernels are pruned; all that `matmuls` lists if None.
      keep: masks of an earlier pruning, by path; what they pruned stays zero.
      sequential: whether each stage is pruned by what the pruned stages before it give (scans are written out for it),
        or all at once by what the dense function gives.
      between: what happens with values between stages: they are computed again from the arguments for every stage, so
        that memory does not grow with the number of batches; or kept, so that every matmul is computed once.
      weights: for each batch how much each token counts, as in `observe`; something that can be gone through more than
        once. All tokens count if None.
      mesh: devices that share the batches, along their first axis; JAX's default device if None.
      tell: called with (stage, number of stages, paths of its kernels) before each stage.

    Returns:
      The parameters, with pruned kernels, and masks of the leaves by path, as `prune` does.

    Raises:
      JpruneError: there is no batch, or `batches` can be gone through only once; `where` finds nothing that can be
        pruned; a kernel lies in a loop that cannot be written out; and what `prune` refuses.
    """
    if streams(method.statistic) > 1:
        raise JpruneError(
            f"{type(method).__name__} with dense_targets needs what kernels read in the pruned and in the dense "
            "function at once, and prune_function computes one of them; use dense_targets=0, jprune.prune_model, or "
            "jprune.prune with a jprune.CrossGram of each input"
        )
    source = _Source(batches, weights, mesh)
    if method.statistic is None:
        flat = trace(f, params, *source.first)
        found = find(flat, where)
        warn(found, flat, where)
        _check_any(found)
        listed = [site.matmul for site in found.sites]
        return prune(params, None, method, pattern, where=_exactly(m.path for m in listed), keep=keep, in_axes=listed)
    if not sequential:
        observed = _observed(f, params, source, method.statistic, where)
        return prune(params, observed, method, pattern, keep=keep)
    return _Sequential(f, params, source, method, pattern, keep or {}, between, where).run(params, tell)


def _check_any(found: Found) -> None:
    if not found.sites:
        raise JpruneError("expected a function with kernels that can be pruned, found none; jprune.report says why")


def _exactly(paths: Iterable[str]) -> list[str]:
    """A filter that finds these paths and no others."""
    return [f"^{re.escape(path)}$" for path in dict.fromkeys(paths)]


class _Source:
    """The batches, gone through as often as there are stages."""

    def __init__(self, batches: Batches, weights: Iterable[Any] | None, mesh: Mesh | None) -> None:
        if iter(batches) is batches or (weights is not None and iter(weights) is weights):
            raise JpruneError(
                "expected batches (and weights) that can be gone through more than once, as a list; got an iterator"
            )
        self.batches, self.weights, self.mesh = batches, weights, mesh
        first = next(iter(batches), None)
        if first is None:
            raise JpruneError("expected at least one batch to observe, got none")
        self.first = tuple(first)

    def __iter__(self) -> Iterator[tuple[tuple[PyTree, ...], Any]]:
        missing = object()
        pairs: Iterable[tuple[Any, Any]] = ((args, None) for args in self.batches)
        if self.weights is not None:
            pairs = itertools.zip_longest(self.batches, self.weights, fillvalue=missing)
        for args, weights in pairs:
            if args is missing or weights is missing:
                raise JpruneError("expected weights for each batch, got more of the one than of the other")
            yield devices.spread(tuple(args), self.mesh), weights


def _observed(f: Callable, params: PyTree, source: _Source, statistic: type[Any], where: Any) -> Observed:
    @jax.jit
    def see(params: PyTree, args: Any, weights: Any) -> Observed:
        return observe(f, statistic, where=where, weights=weights)(params, *args)[1]

    total = None
    for args, weights in source:
        seen = see(params, args, weights)
        total = seen if total is None else _merge(total, seen)
    assert total is not None
    return total


@jax.jit
def _merge(a: Observed, b: Observed) -> Observed:
    return a.merge(b)


class _Sequential:
    """Stage by stage: observe, prune, go on with the pruned weights."""

    def __init__(self, f, params, source, method, pattern, keep, between, where) -> None:
        self.f, self.source, self.method, self.pattern, self.keep = f, source, method, pattern, keep
        self.between = between
        self.staged: Stages = stages(f, params, *source.first, where=where, unroll=True, shared=True)
        _check_any(self.staged.found)
        self.shared = _shared(self.staged.found)
        self.segments = [jax.jit(segment) for segment in self.staged.segments]

    def run(self, params: PyTree, tell: Tell | None) -> tuple[PyTree, Masks]:
        masks: Masks = {}
        if self.shared:
            where = _exactly(sorted(self.shared))
            observed = _observed(self.f, params, self.source, self.method.statistic, where)
            params, masks = prune(params, observed, self.method, self.pattern, keep=self._keep(masks, self.shared))
        carries: list[Any] | None = None
        for stage, matmuls in enumerate(self.staged.matmuls):
            paths = tuple(dict.fromkeys(m.path for m in matmuls if m.path not in self.shared))
            if tell is not None:
                tell(stage, len(self.staged.matmuls), paths)
            if not paths and self.between == "recompute":
                continue
            observed, carries = self._stage(params, stage, carries)
            if paths:
                own = Observed({k: v for k, v in observed.items() if observed.places[k].path in paths}, observed.places)
                params, new = prune(params, own, self.method, self.pattern, keep=self._keep(masks, paths))
                masks |= {path: masks.get(path, True) & mask for path, mask in new.items()}
        return params, masks

    def _keep(self, masks: Masks, paths: Iterable[str]) -> Masks:
        """What stays zero in these leaves: by masks of the user, and of parts that earlier stages pruned."""
        given = {path: self.keep[path] for path in paths if path in self.keep}
        return given | {
            path: masks[path] if path not in given else masks[path] & given[path] for path in paths if path in masks
        }

    def _stage(self, params: PyTree, stage: int, carries: list[Any] | None) -> tuple[Observed, list[Any] | None]:
        """What the kernels of a stage read, and the values behind it if they are kept."""
        see = jax.jit(functools.partial(self.staged.observe, stage, self.method.statistic))
        total: Observed | None = None
        kept: list[Any] = []
        for i, (args, weights) in enumerate(self.source):
            if carries is None:
                carry, first = self.staged.start(*args), 0
            else:
                carry, first = carries[i], stage
            for segment in self.segments[first : stage + 1]:
                carry = segment(params, carry)
            seen = see(carry, weights)
            total = seen if total is None else _merge(total, seen)
            if self.between == "keep":
                kept.append(carry)
        assert total is not None
        return total, kept if self.between == "keep" else None


def _shared(found: Found) -> set[str]:
    """Leaves of which some kernel is used in more than one stage."""
    stage: dict[str, int] = {}
    return {
        site.matmul.path
        for site in found.sites
        if stage.setdefault(site.matmul.place.key, site.matmul.stage) != site.matmul.stage
    }

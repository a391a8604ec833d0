"""Coupled axes: which axes of which parameters can only shrink together, and whether they may.

`coupled_axes` walks the jaxpr of any function once, abstractly. Every axis is made of atoms (`layout.py`); an atom with
the places where it lies in the parameters is a `Group`, as a feed-forward channel is a column of two kernels and a row
of a third. A group that is not frozen is safe to prune: f with the units masked is the physically smaller f. The walk
follows what each value is where a unit is gone (`removed.py`), and freezes, with the reason, what it cannot vouch for.
Then f is traced at other lengths (`evidence.py`): that proves it, freezes it, or leaves it believed.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

from jprune.errors import JpruneError
from jprune.trace.coupling.atoms import ONE, PRODUCT, SUM, Axis, factors, find, terms
from jprune.trace.coupling.evidence import Evidence, Verdict
from jprune.trace.coupling.group import Group, Groups, Member
from jprune.trace.coupling.layout import Layout
from jprune.trace.coupling.lengths import Suspicions
from jprune.trace.coupling.masked import masked
from jprune.trace.coupling.named import Named, Numbers, Place
from jprune.trace.coupling.removed import Removed
from jprune.trace.coupling.retrace import Retrace
from jprune.trace.jaxpr import PyTree, Trace, trace


def coupled_axes(f: Callable, params: PyTree, *args: PyTree, numbers: Numbers | None = None) -> Groups:
    """The groups of coupled axes of ``f(params, *args)``; arrays and `jax.ShapeDtypeStruct`s serve alike.

    Nothing is computed. Axes of the arguments and of the outputs are frozen: their shapes are f's interface. So is an
    axis of size one left out: it has nothing to remove.

    Numbers in f that come from a length, as 1 / sqrt(head_dim), are other numbers in the smaller f. To see which do, f
    is traced at other lengths, by its own means where it reads sizes from its arrays, or as a copy that holds other
    sizes where they are in its closure, in the fields of a module, or in objects that it holds. A group for which no
    number changes is `proven`. Where sizes are written into the code, numbers that may come from a length freeze its
    group; a group without any is only believed to be safe, and says why (`evidence`).

    Args:
      f: the function.
      params: any pytree of arrays.
      args: the other arguments of f.
      numbers: what you know of numbers in f: ``{8.0: None}`` says that 8 comes from no length, ``{8.0: ("q/kernel",
        2)}`` that it comes from those of that axis and from no other. A name in place of a number, as ``{"heads":
        ("q/kernel", 1)}``, says the same of a number that f holds, to be replaced when f is traced at other lengths.

    Raises:
      JpruneError: f cannot be traced; the message says where. Or `numbers` names what is not there.
    """
    flat = trace(f, params, *args)
    layout = Layout(flat)
    removed = Removed(flat, layout)
    places = {
        (path, i): _places(axis)
        for path, var in flat.params.items()
        for i, axis in enumerate(layout.axes[var])
        if axis is not None
    }
    members: dict[Axis, list[Member]] = {}
    names: dict[Axis, str] = {}
    for (path, i), found in places.items():
        atoms = list(dict.fromkeys(leaf for leaf, *_ in found))
        for k, leaf in enumerate(atoms):
            names.setdefault(leaf, f"{path}[{i}]" + (f".{k}" if len(atoms) > 1 else ""))
        for leaf, offset, length, stride in found:
            whole = flat.params[path].aval.shape[i]
            member = Member(path=path, axis=i, offset=offset, length=length, stride=stride, whole=whole)
            members.setdefault(leaf, []).append(member)
    verdicts = _verdicts(flat, layout, removed, members, Retrace(f, args, flat, layout, removed), numbers)
    groups = {
        leaf: Group(
            name=names[leaf],
            size=leaf.size,
            members=tuple(its),
            frozen=verdicts[leaf].frozen,
            renormalised=leaf in removed.renormalised,
            proven=verdicts[leaf].proven,
            evidence=verdicts[leaf].evidence,
        )
        for leaf, its in members.items()
    }
    at = {key: tuple(groups[leaf] for leaf in dict.fromkeys(x[0] for x in found)) for key, found in places.items()}
    return Groups(groups.values(), at, lambda keep: masked(flat, layout, removed, groups, keep))


def _verdicts(
    flat: Trace,
    layout: Layout,
    removed: Removed,
    members: Mapping[Axis, list[Member]],
    retrace: Retrace,
    numbers: Numbers | None,
) -> dict[Axis, Verdict]:
    """What freezes an atom, or proves that it may be pruned."""

    def on(place: Place) -> list[Axis]:
        path, i = place
        if path not in flat.params or not 0 <= i < len(layout.axes[flat.params[path]]):
            raise JpruneError(f"numbers: there is no parameter {path!r} with an axis {i}")
        return removed.leaves(layout.axes[flat.params[path]][i])

    named = Named(numbers, on)
    suspicions = Suspicions(flat, layout, removed)
    frozen = _frozen(flat, removed, members)
    for leaf, divisor in suspicions.divisors:
        if named.says(leaf, divisor.number) is False and leaf not in frozen:
            frozen[leaf] = f"as `numbers` says, its mean is not over its length: {divisor.words}"
    free = {leaf: _role(members[leaf]) for leaf in members if leaf not in frozen}
    axes = {leaf: [axis for m in members[leaf] if (axis := layout.axes[flat.params[m.path]][m.axis])] for leaf in free}
    evidence = Evidence(retrace, free, suspicions, named, axes)
    if numbers:
        named.check(suspicions.numbers, [name for name, _ in evidence.holds])
    return {leaf: Verdict(frozen=why, proven=False, evidence=why) for leaf, why in frozen.items()} | evidence.verdicts()


def _frozen(flat: Trace, removed: Removed, members: Mapping[Axis, list[Member]]) -> dict[Axis, str]:
    """The atoms that the walk has frozen, and those of parameters that f does not read."""
    outputs = set(map(id, flat.outputs))
    unread = {path for path, var in flat.params.items() if var not in removed.users and id(var) not in outputs}
    frozen = {}
    for leaf, its in members.items():
        reason = leaf.frozen or removed.reasons.get(leaf)
        if reason is None and all(m.path in unread for m in its):
            reason = "f does not read it"
        if reason is not None:
            frozen[leaf] = reason
    return frozen


def _role(members: Iterable[Member]) -> Hashable:
    """What the atoms of different layers have in common."""
    return frozenset((re.sub(r"\d+", "*", m.path), m.axis, m.offset, m.stride) for m in members)


def _places(axis: Axis) -> list[tuple[Axis, int, int, int]]:
    """(atom, offset, length, stride) for every segment of an axis that an atom lies on, in the order of the atoms."""
    return list(_spread(axis, [(0, axis.size, 1)]))


def _spread(axis: Axis, segments: Sequence[tuple[int, int, int]]) -> Iterator[tuple[Axis, int, int, int]]:
    """The atoms of an axis that lies on `segments`, each an (offset, length, stride), with the segments of each."""
    axis = find(axis)
    if axis.kind == PRODUCT:
        minor = axis.size
        for x in factors(axis):
            minor //= x.size
            yield from _spread(x, [(offset, length, stride * minor) for offset, length, stride in segments])
    elif axis.kind == SUM:
        parts = terms(axis)
        if all(x is parts[0] for x in parts):  # one part again and again
            yield from _spread(parts[0], segments)
            return
        start = 0
        for x in parts:
            inside = [
                (offset + again + start * stride, x.size * stride, stride)
                for offset, length, stride in segments
                for again in range(0, length, axis.size * stride)
            ]
            yield from _spread(x, inside)
            start += x.size
    elif axis is not ONE:
        yield from ((axis, *segment) for segment in segments)

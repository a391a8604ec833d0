"""Coupled axes: which axes of which parameters can only shrink together, and whether they may.

`coupled_axes` walks the jaxpr of any function once, abstractly. Every axis is made of atoms (`layout.py`); an atom with
the places where it lies in the parameters is a `Group`, as a feed-forward channel is a column of two kernels and a row
of a third. A group that is not frozen is safe to prune: f with the units masked is the physically smaller f. The walk
follows what each value is where a unit is gone (`removed.py`), and freezes, with the reason, what it cannot vouch for.
"""

import dataclasses
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from jaxtyping import Array, Bool, Int

from jprune.errors import JpruneError
from jprune.trace.coupling.atoms import ONE, PRODUCT, SUM, Axis, factors, find, terms
from jprune.trace.coupling.layout import Layout
from jprune.trace.coupling.lengths import suspects
from jprune.trace.coupling.masked import masked
from jprune.trace.coupling.removed import Removed
from jprune.trace.coupling.retrace import confirmed
from jprune.trace.jaxpr import PyTree, Trace, trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """Where an atom lies in a parameter leaf: unit i has the positions offset + p with p // stride % size == i.

    A fused axis has several segments, so an atom may lie on an axis more than once.
    """

    path: str
    axis: int
    offset: int = 0
    """Where the segment of the axis begins."""
    length: int
    """How long the segment is: p runs from 0 to length - 1."""
    stride: int = 1

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length < 1 or self.stride < 1:
            raise JpruneError(
                f"expected a segment of an axis of {self.path}, got offset {self.offset}, length {self.length}, "
                f"stride {self.stride}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """One atom: axes of parameters that can only shrink together."""

    name: str
    """``path[axis]`` of the first member; ``path[axis].k`` for the k-th of several atoms on that axis, major first."""
    size: int
    members: tuple[Member, ...]
    frozen: str | None
    """Why it must not be pruned, with the source line; None if it may."""
    renormalised: bool
    """A mean is taken over it, as in RMSNorm and LayerNorm: its masked form divides by the kept length."""

    def positions(
        self, member: Member, units: Sequence[int] | Int[np.ndarray, "units"]
    ) -> Int[np.ndarray, "positions"]:
        """Sorted positions along `member.axis` that the given units occupy."""
        units = np.asarray(units, int).reshape(-1)
        if units.size and (units.min() < 0 or units.max() >= self.size):
            raise JpruneError(f"{self.name} has units 0 to {self.size - 1}, got {units.min()} to {units.max()}")
        here = np.arange(member.length)
        return member.offset + here[np.isin(here // member.stride % self.size, units)]


class Groups(Sequence[Group]):
    """All groups of a function, in the order in which the parameters have them; also by name."""

    def __init__(
        self,
        groups: Iterable[Group],
        at: Mapping[tuple[str, int], tuple[Group, ...]],
        masked: Callable[[Mapping[str, np.ndarray]], Callable],
    ):
        self._groups = tuple(groups)
        self._at = dict(at)
        self._by_name = {g.name: g for g in self._groups}
        self._masked = masked

    @overload
    def __getitem__(self, key: int | str) -> Group: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Group, ...]: ...
    def __getitem__(self, key: int | str | slice) -> Group | tuple[Group, ...]:
        if isinstance(key, str):
            if key not in self._by_name:
                raise JpruneError(f"there is no group {key!r}; there are {', '.join(list(self._by_name)[:20])}")
            return self._by_name[key]
        return self._groups[key]

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    @property
    def prunable(self) -> tuple[Group, ...]:
        """Those that are not frozen."""
        return tuple(g for g in self._groups if g.frozen is None)

    def at(self, path: str, axis: int) -> tuple[Group, ...]:
        """The groups on an axis of a parameter, major to minor."""
        if (path, axis) not in self._at:
            raise JpruneError(f"there is no parameter {path!r} with an axis {axis}")
        return self._at[path, axis]

    def masked(self, keep: Mapping[str, Bool[np.ndarray | Array, "size"]]) -> Callable[..., Any]:
        """f as if only the units that are True in `keep` (by the group's name) were there; all shapes stay.

        The result takes f's arguments. It sets the other units' slices of the parameters to zero, and takes each mean
        over a renormalised group over the kept units only.

        Raises:
          JpruneError: no such group, a mask of another length or without any unit, or units of a frozen group.
        """
        masks: dict[str, np.ndarray] = {}
        for name, mask in keep.items():
            group, array = self[name], np.asarray(mask)
            if array.shape != (group.size,) or array.dtype != bool:
                raise JpruneError(f"{name}: expected a bool mask [{group.size}], got {array.dtype}{list(array.shape)}")
            if not array.any():
                raise JpruneError(f"{name}: no unit would remain of {group.size}; keep at least one")
            if not array.all() and group.frozen is not None:
                raise JpruneError(f"{name} cannot be pruned: {group.frozen}")
            masks[name] = array
        return self._masked(masks)


def coupled_axes(f: Callable, params: PyTree, *args: PyTree) -> Groups:
    """The groups of coupled axes of ``f(params, *args)``; arrays and `jax.ShapeDtypeStruct`s serve alike.

    Nothing is computed. Axes of the arguments and of the outputs are frozen: their shapes are f's interface. So is an
    axis of size one left out: it has nothing to remove.

    Raises:
      JpruneError: f cannot be traced; the message says where.
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
            member = Member(path=path, axis=i, offset=offset, length=length, stride=stride)
            members.setdefault(leaf, []).append(member)
    frozen = _frozen(flat, removed, members)
    free = {leaf: _role(members[leaf]) for leaf in members if leaf not in frozen}
    frozen |= confirmed(f, params, args, flat, layout, removed, free, suspects(flat, layout, removed))
    groups = {
        leaf: Group(
            name=names[leaf],
            size=leaf.size,
            members=tuple(its),
            frozen=frozen.get(leaf),
            renormalised=leaf in removed.renormalised,
        )
        for leaf, its in members.items()
    }
    at = {key: tuple(groups[leaf] for leaf in dict.fromkeys(x[0] for x in found)) for key, found in places.items()}
    return Groups(groups.values(), at, lambda keep: masked(flat, layout, removed, groups, keep))


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

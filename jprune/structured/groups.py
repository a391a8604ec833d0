"""Units: what structured pruning removes one of, from the groups of coupled axes that the trace found.

No module is known by its name. A group is told by what one of its units is in the kernels that it runs through, where
"side" means the input or the output axes of a kernel as `jprune.matmuls` has them, and "wide" how many of the channels
on its side one unit takes:

    mlp        one channel wide in every kernel (a feed-forward channel), or a channel of all experts
    attention  wider in every kernel, and in the most of them: a KV head with its query heads, in q, k, v and o. With
               a single KV head, which has to stay, a query head, in q and o
    query      a query head inside its KV head, where attention units hold several
    expert     wider, or in stacked kernels (matmuls with a batch axis), but one channel wide in the router
    hidden     one channel wide, in more kernels than any other group, and prunable only in the whole model

Biases, norm scales and whatever else is a member of the group goes along. A whole layer is no group of axes.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from jprune import trees
from jprune.errors import JpruneError
from jprune.structured.surgery import Positions, checked
from jprune.trace.coupling.axes import Group
from jprune.trace.matmuls import ParamMatmul

PyTree = Any
Kind = Literal["attention", "query", "mlp", "expert", "hidden"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UnitMember:
    """Where units lie in one parameter leaf."""

    path: str
    axis: int
    shape: tuple[int, ...]
    """Of the leaf."""
    side: tuple[int, ...]
    """The axes on the unit's side of the kernel, `axis` among them; `axis` alone where the leaf is no plain kernel."""
    units: Int[np.ndarray, " length"]
    """The unit that each position along the axis belongs to; -1 for none (another segment of a fused kernel)."""

    @property
    def counted(self) -> bool:
        """Whether importance is read from this leaf: all but biases, as in LLM-Pruner."""
        return self.path.rsplit("/", 1)[-1] != "bias"

    @property
    def parameters(self) -> int:
        """How many go with one unit."""
        held = self.units[self.units >= 0]
        return math.prod(self.shape) // self.shape[self.axis] * (len(held) // len(np.unique(held)))

    @functools.cached_property
    def channels(self) -> Int[np.ndarray, "count width"]:
        """The channels of every unit, ascending: indices into the flattened axes of `side`."""
        shape = [self.shape[axis] if axis == self.axis else 1 for axis in self.side]
        full = [self.shape[axis] for axis in self.side]
        unit_of = np.broadcast_to(self.units.reshape(shape), full).reshape(-1)
        order = np.argsort(unit_of, kind="stable")[np.count_nonzero(unit_of < 0) :]
        return order.reshape(int(self.units.max()) + 1, -1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """Parts of a model of which any can be removed, each as a whole."""

    kind: Kind
    name: str
    layer: int | None = None
    """Of the model; None for units of a block that was not placed (see `at`), and of the whole model."""
    count: int
    members: tuple[UnitMember, ...]
    """In the order of the matmuls; what is in no matmul comes last."""
    sets: int = 1
    """Units are numbered set by set, and equally many of each must stay: the KV heads of query heads."""
    renormalised: bool = False
    """A mean is taken over them, as by a norm of all query heads: zeros for a unit are then not the same as none."""

    @property
    def width(self) -> int:
        """Channels that a unit has in the kernel where it has fewest: head_dim, or 1."""
        return min(m.channels.shape[1] for m in self.members if m.counted)

    @property
    def parameters(self) -> int:
        """How many parameters go with one unit."""
        return sum(member.parameters for member in self.members)

    def below(self, prefix: str) -> "Units":
        """The part of them that lies at `prefix` in the model, with paths relative to it; the inverse of `at`."""
        start = f"{prefix}/"
        members = [dataclasses.replace(m, path=m.path[len(start) :]) for m in self.members if m.path.startswith(start)]
        return dataclasses.replace(self, name=self.name.removeprefix(start), members=tuple(members))

    def at(self, prefix: str, layer: int | None = None) -> "Units":
        """The units of the block function as those of the block whose parameters lie at `prefix` in the model.

        Args:
          prefix: as ``blocks/3``; goes before paths and name.
          layer: by default the last number in the prefix.
        """
        numbers = re.findall(r"\d+", prefix)
        return dataclasses.replace(
            self,
            name=f"{prefix}/{self.name}",
            layer=layer if layer is not None else int(numbers[-1]) if numbers else None,
            members=tuple(dataclasses.replace(m, path=f"{prefix}/{m.path}") for m in self.members),
        )

    def keep(self, kept: Positions) -> dict[str, dict[int, np.ndarray]]:
        """The positions to keep, {path: {axis: positions}}, as `shrink` takes them, when only these units stay.

        Raises:
          JpruneError: units that are none, not ascending or not there, or not equally many in each set.
        """
        kept = checked(kept, (self.count,), 0, self.name)
        if len(set(np.bincount(kept // (self.count // self.sets), minlength=self.sets))) > 1:
            raise JpruneError(f"{self.name}: equally many units must stay in each of its {self.sets} sets, got {kept}")
        return merge(
            {member.path: {member.axis: np.flatnonzero((member.units < 0) | np.isin(member.units, kept))}}
            for member in self.members
        )

    def after(self, kept: Positions, keep: Mapping[str, Mapping[int, Positions]]) -> "Units":
        """The units that stayed, numbered anew, in parameters that `shrink(params, keep)` made.

        Args:
          kept: which stayed; all, if these units were not pruned.
          keep: everything that `shrink` was given, for other units too.
        """
        kept = checked(kept, (self.count,), 0, self.name)
        members = []
        for member in self.members:
            axes = keep.get(member.path, {})
            units = np.asarray(member.units[np.asarray(axes[member.axis])] if member.axis in axes else member.units)
            shape = tuple(len(axes[axis]) if axis in axes else n for axis, n in enumerate(member.shape))
            number = np.where(units < 0, -1, np.searchsorted(kept, units))
            members.append(dataclasses.replace(member, shape=shape, units=number))
        return dataclasses.replace(self, count=len(kept), members=tuple(members))


def merge(keeps: Iterable[Mapping[str, Mapping[int, Positions]]]) -> dict[str, dict[int, np.ndarray]]:
    """One mapping for `shrink` out of several of the same shapes: what all of them keep."""
    merged: dict[str, dict[int, np.ndarray]] = {}
    for keep in keeps:
        for path, axes in keep.items():
            for axis, kept in axes.items():
                before = merged.setdefault(path, {}).get(axis)
                merged[path][axis] = np.asarray(kept) if before is None else np.intersect1d(before, kept)
    return merged


def positions(units: Iterable[Units], kept: Mapping[str, Positions]) -> dict[str, dict[int, np.ndarray]]:
    """What `shrink` takes, when only the `kept` of each of these units stay; all of those that are not named do."""
    return merge(u.keep(kept[u.name]) for u in units if u.name in kept)


def block_units(
    groups: Sequence[Group],
    params: PyTree,
    matmuls: Iterable[ParamMatmul],
    *,
    kinds: Sequence[Kind] = ("attention", "mlp"),
) -> tuple[Units, ...]:
    """The prunable units of one decoder block (or of any function with attention and feed-forward layers).

    Args:
      groups: `jprune.coupled_axes(f, params, *args)`.
      params: the block's parameters; only shapes are read.
      matmuls: `jprune.matmuls(f, params, *args)`.
      kinds: which units are asked for; of each kind there must be some.

    Returns:
      Units in the order of `kinds`, named by kind (and the group's name, if a kind is there more than once), paths
      relative to the block.

    Raises:
      JpruneError: no prunable group of a kind; the message says which groups are frozen and why.
    """
    if unknown := [kind for kind in kinds if kind not in get_args(Kind) or kind == "hidden"]:
        raise JpruneError(f"a block has units of attention, query, mlp and expert, got {unknown[0]!r}")
    placed = _place(groups, params, matmuls)
    found = list(_classified(placed))
    for kind in kinds:
        if not any(k == kind and group.frozen is None for k, group, _, _ in found):
            frozen = [group for k, group, _, _ in found if k == kind] or [p.group for p in placed if p.group.frozen]
            raise JpruneError(f"expected a prunable group of the kind {kind!r}, found none{_reasons(frozen)}")
    prunable = [(kind, group, members, sets) for kind, group, members, sets in found if group.frozen is None]
    order = {kind: i for i, kind in enumerate(kinds)}
    times = Counter(kind for kind, *_ in prunable)
    return tuple(
        Units(
            kind=kind,
            name=kind if times[kind] == 1 else f"{kind}/{group.name}",
            count=group.size * sets,
            members=members,
            sets=sets,
            renormalised=group.renormalised,
        )
        for kind, group, members, sets in sorted(prunable, key=lambda found: order.get(found[0], 0))
        if kind in kinds
    )


def hidden_units(groups: Sequence[Group], params: PyTree, matmuls: Iterable[ParamMatmul]) -> Units:
    """The hidden dimensions of a whole model; the arguments are those of `block_units`, for the model's function.

    Raises:
      JpruneError: the group is frozen, as that of a single block is, which has it in its argument and its output.
    """
    placed = _place(groups, params, matmuls)
    channels = [p for p in placed if p.kernels and all(m.channels.shape[1] == 1 for m in p.kernels)]
    if not channels:
        raise JpruneError(f"expected a hidden dimension, found none{_reasons([p.group for p in placed])}")
    widest = max(channels, key=lambda p: len(p.kernels))
    if widest.group.frozen is not None:
        raise JpruneError(f"the hidden dimension is frozen: {widest.group.name}: {widest.group.frozen}")
    return Units(
        kind="hidden",
        name="hidden",
        count=widest.group.size,
        members=widest.members,
        renormalised=widest.group.renormalised,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Placed:
    """A group, and its members with the shapes and sides of their leaves."""

    group: Group
    members: tuple[UnitMember, ...]
    kernels: tuple[UnitMember, ...]
    """The members in plain matmuls."""
    stacked: bool
    """Whether it runs through kernels with a batch axis, which are in no plain matmul."""
    places: Mapping[tuple[str, tuple[int, ...]], frozenset[int]]
    """The sides of kernels that it lies on, and which of their channels it takes."""

    def beside(self, other: "_Placed") -> bool:
        """Whether the two take a channel together."""
        return any(channels & other.places.get(place, frozenset()) for place, channels in self.places.items())

    def within(self, other: "_Placed") -> bool:
        """Whether the other takes all channels that this one takes."""
        return all(channels <= other.places.get(place, frozenset()) for place, channels in self.places.items())

    def inside(self, other: "_Placed") -> bool:
        """The same, and more than these."""
        return self.within(other) and not other.within(self)

    @property
    def widths(self) -> list[int]:
        """Of a unit, in each kernel."""
        return [member.channels.shape[1] for member in self.kernels]


def _place(groups: Sequence[Group], params: PyTree, matmuls: Iterable[ParamMatmul]) -> list[_Placed]:
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.flatten(params).items()}
    in_axes: dict[str, tuple[int, ...]] = {}
    for matmul in matmuls:
        in_axes.setdefault(matmul.path, matmul.in_axes)
    order = {path: i for i, path in enumerate(in_axes)}
    placed = []
    for group in groups:
        if group.size < 2:  # nothing of it can go
            continue
        members: list[UnitMember] = []
        places: dict[tuple[str, tuple[int, ...]], frozenset[int]] = {}
        for member in sorted(group.members, key=lambda m: order.get(m.path, len(order))):
            shape, axis = shapes[member.path], member.axis
            side: tuple[int, ...] = (axis,)
            if member.path in in_axes:
                inside = in_axes[member.path]
                side = tuple(i for i in range(len(shape)) if (i in inside) == (axis in inside))
            units = np.full(shape[axis], -1)
            within = np.arange(member.length) // member.stride % group.size
            units[member.offset : member.offset + member.length] = within
            members.append(UnitMember(path=member.path, axis=axis, shape=shape, side=side, units=units))
            if member.path in in_axes:
                place = member.path, side
                places[place] = places.get(place, frozenset()) | frozenset(members[-1].channels.ravel().tolist())
        placed.append(
            _Placed(
                group=group,
                members=tuple(members),
                kernels=tuple(m for m in members if m.path in in_axes),
                stacked=any(len(m.shape) > 2 and m.path not in in_axes and m.counted for m in members),
                places=places,
            )
        )
    return placed


def _classified(placed: list[_Placed]) -> Iterator[tuple[Kind, Group, tuple[UnitMember, ...], int]]:
    """(kind, group, members, sets); frozen groups too."""
    beside = {p: [q for q in placed if q is not p and q.beside(p)] for p in placed}
    # What lies beside experts are their channels, which lie nowhere else. (Beside the head dimension of values lie
    # query heads, which lie in q too.)
    experts = {
        p for p in placed if 1 in p.widths and (p.stacked or max(p.widths) > 1) and all(q.inside(p) for q in beside[p])
    }
    heads = []
    for p in placed:
        if p in experts:
            yield "expert", p.group, p.members, 1
        elif (max(p.widths, default=0) == 1 or p.stacked or beside[p]) and experts.issuperset(beside[p]):
            yield "mlp", p.group, p.members, 1
        elif p.kernels and min(p.widths) > 1:
            heads.append(p)
    for p in heads:
        # Head dimensions lie in some of the heads' kernels, or in all of them but inside of the heads.
        if any(p.inside(q) or (p.places == q.places and _step(p) < _step(q)) for q in heads):
            continue
        yield "attention", p.group, p.members, 1
        if len(p.kernels) == 2:  # q and o: the one KV head that k and v hold is in no group
            yield "query", p.group, p.members, 1
        for q in heads:
            if q.inside(p) and (members := _inside(p, q)):
                yield "query", q.group, members, p.group.size


def _step(placed: _Placed) -> int:
    """How many channels lie between one unit and the next."""
    return int(placed.kernels[0].channels[1, 0])


def _inside(heads: _Placed, ranks: _Placed) -> tuple[UnitMember, ...]:
    """The members of query heads, numbered KV head by KV head; none if `ranks` does not number query heads."""
    width = min(m.channels.shape[1] for m in heads.kernels)
    members = []
    for rank in ranks.members:
        same = [m for m in heads.members if (m.path, m.axis) == (rank.path, rank.axis)]
        both = [m for m in same if np.array_equal(m.units < 0, rank.units < 0)]
        if not both:
            return ()
        units = np.where(rank.units < 0, -1, both[0].units * ranks.group.size + rank.units)
        member = dataclasses.replace(rank, units=units)
        if rank in ranks.kernels and member.channels.shape != (heads.group.size * ranks.group.size, width):
            return ()
        members.append(member)
    return tuple(members)


def _reasons(groups: Sequence[Group]) -> str:
    return "".join(f"; {group.name} is frozen: {group.frozen}" for group in groups if group.frozen)

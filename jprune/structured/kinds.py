"""Which kind of unit a group of coupled axes is: heads, feed-forward channels, experts or hidden dimensions.

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
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from jprune import trees
from jprune.errors import JpruneError
from jprune.structured.units import Kind, UnitMember, Units
from jprune.trace.coupling.group import Group
from jprune.trace.matmuls import ParamMatmul

PyTree = Any


def members(
    group: Group, shapes: Mapping[str, tuple[int, ...]], in_axes: Mapping[str, tuple[int, ...]]
) -> tuple[UnitMember, ...]:
    """Where the units of a group lie, in the order of the matmuls; what is in no matmul comes last.

    Args:
      group: of `jprune.coupled_axes`.
      shapes: of all parameters, by path.
      in_axes: the input axes of kernels, by path, in the order of their matmuls.
    """
    order = {path: i for i, path in enumerate(in_axes)}
    found = []
    for member in sorted(group.members, key=lambda m: order.get(m.path, len(order))):
        shape, axis = shapes[member.path], member.axis
        side: tuple[int, ...] = (axis,)
        if member.path in in_axes:
            inside = in_axes[member.path]
            side = tuple(i for i in range(len(shape)) if (i in inside) == (axis in inside))
        units = np.full(shape[axis], -1)
        within = np.arange(member.length) // member.stride % group.size
        units[member.offset : member.offset + member.length] = within
        found.append(UnitMember(path=member.path, axis=axis, shape=shape, side=side, units=units))
    return tuple(found)


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
        """Whether the other takes all channels that this one takes, and more."""
        return self.within(other) and not other.within(self)

    @property
    def widths(self) -> list[int]:
        """Channels of a unit in each kernel."""
        return [member.channels.shape[1] for member in self.kernels]


def _place(groups: Sequence[Group], params: PyTree, matmuls: Iterable[ParamMatmul]) -> list[_Placed]:
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.flatten(params).items()}
    in_axes: dict[str, tuple[int, ...]] = {}
    for matmul in matmuls:
        in_axes.setdefault(matmul.path, matmul.in_axes)
    placed = []
    for group in groups:
        if group.size < 2:  # nothing of it can go
            continue
        found = members(group, shapes, in_axes)
        places: dict[tuple[str, tuple[int, ...]], frozenset[int]] = {}
        for member in found:
            if member.path in in_axes:
                place = member.path, member.side
                places[place] = places.get(place, frozenset()) | frozenset(member.channels.ravel().tolist())
        placed.append(
            _Placed(
                group=group,
                members=found,
                kernels=tuple(m for m in found if m.path in in_axes),
                stacked=any(len(m.shape) > 2 and m.path not in in_axes and m.counted for m in found),
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

"""Units: what structured pruning removes one of, and where each lies in the parameters. `kinds` finds them."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from jprune import positions as at
from jprune.annotations import Int
from jprune.errors import JpruneError
from jprune.structured.surgery import Positions, checked

PyTree = Any
Kind = Literal["attention", "query", "mlp", "expert", "hidden"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UnitMember:
    """Where units lie in one parameter leaf."""

    path: str
    axis: int
    shape: tuple[int, ...]
    """Shape of the leaf."""
    side: tuple[int, ...]
    """The axes on the unit's side of the kernel, `axis` among them; `axis` alone where the leaf is no plain kernel."""
    units: Int[np.ndarray, "*stack length"]
    """The unit that each position along the axis belongs to; -1 for none (another segment of a fused kernel). Has an
    axis more where each kernel of a stack, along the leaf's first axis, has units of its own."""

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the leaf that `units` has."""
        return (self.axis,) if self.units.ndim == 1 else (0, self.axis)

    @property
    def counted(self) -> bool:
        """Whether importance is read from this leaf: all but biases, as in LLM-Pruner."""
        return self.path.rsplit("/", 1)[-1] != "bias"

    @property
    def parameters(self) -> int:
        """How many go with one unit."""
        held = self.units[self.units >= 0]
        return math.prod(self.shape) // self.units.size * (len(held) // len(np.unique(held)))

    @functools.cached_property
    def channels(self) -> Int[np.ndarray, "count width"]:
        """The channels of every unit, ascending: indices into the flattened axes of `side`."""
        shape = [self.shape[axis] if axis in self.axes else 1 for axis in self.side]
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
    """Layer of the model; None for units of a block that was not placed (see `at`), and of the whole model."""
    count: int
    members: tuple[UnitMember, ...]
    """In the order of the matmuls; what is in no matmul comes last."""
    sets: int = 1
    """Units are numbered set by set, and equally many of each must stay: the KV heads of query heads, the experts of
    channels."""
    size: str = ""
    """What tells units from others of their kind in the same layer: the name of the size that counts them."""
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

    def of_each(self) -> "Units":
        """The units of every kernel by itself, where these lie in all kernels of stacks: channels of each expert.

        Numbered kernel by kernel; equally many of each stay. All members are leaves whose first axis numbers kernels.
        """
        stack = self.members[0].shape[0]
        kernel = np.arange(stack)[:, None] * self.count
        members = (
            dataclasses.replace(m, side=(0, m.axis), units=np.where(m.units < 0, -1, kernel + m.units))
            for m in self.members
        )
        return dataclasses.replace(self, count=stack * self.count, sets=stack, members=tuple(members))

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
            {member.path: {member.axis: _where((member.units < 0) | np.isin(member.units, kept))}}
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
            units = at.of(member.units, np.asarray(axes[member.axis])) if member.axis in axes else member.units
            shape = at.left(member.shape, axes)  # type: ignore[arg-type]
            number = np.where(units < 0, -1, np.searchsorted(kept, units))
            members.append(dataclasses.replace(member, shape=shape, units=number))
        return dataclasses.replace(self, count=len(kept), members=tuple(members))


def _where(stays: np.ndarray) -> np.ndarray:
    """Positions from bools along an axis, or along it of each kernel of a stack, of which equally many stay."""
    return np.nonzero(stays)[-1].reshape(*stays.shape[:-1], -1)


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

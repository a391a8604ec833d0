"""Groups: what the walk of `axes` finds. Each is one atom with the places where it lies in the parameters."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from jprune.annotations import Array, Bool, Int
from jprune.errors import JpruneError


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
    whole: int
    """How long the whole axis is."""

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length < 1 or self.stride < 1 or self.offset + self.length > self.whole:
            raise JpruneError(
                f"expected a segment of an axis of {self.path} that is {self.whole} long, got offset {self.offset}, "
                f"length {self.length}, stride {self.stride}"
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
    proven: bool
    """Whether f at another length of it was traced and has the same numbers; if not, and it is not frozen, that it is
    safe is only believed."""
    evidence: str
    """What was tried to prove it, and why that is no proof where it is none; the reason where it is frozen."""

    def __str__(self) -> str:
        safe = (
            f"frozen: {self.frozen}" if self.frozen else f"{'proven' if self.proven else 'believed'}: {self.evidence}"
        )
        return f"{self.name} ({self.size} units), {safe}"

    def keep(self, units: Sequence[int] | np.ndarray) -> dict[str, dict[int, Int[np.ndarray, "_"]]]:
        """The positions that stay when only these units do, {path: {axis: positions}}, as `jprune.shrink` takes them.

        An axis on which the group lies several times is there once, and positions that no unit has stay. For several
        groups at once there is `Groups.keep`.

        Args:
          units: numbers below `size`, ascending; at least one.

        Raises:
          JpruneError: units that are none, or the group is frozen and not all of them stay.
        """
        kept = self._units(units)
        if kept.size < self.size and self.frozen is not None:
            raise JpruneError(f"{self.name} cannot be pruned: {self.frozen}")
        gone = np.setdiff1d(np.arange(self.size), kept)
        keep: dict[str, dict[int, np.ndarray]] = {}
        for member in self.members:
            axes = keep.setdefault(member.path, {})
            axes[member.axis] = np.setdiff1d(
                axes.get(member.axis, np.arange(member.whole)), self.positions(member, gone)
            )
        return keep

    def _units(self, units: Sequence[int] | np.ndarray) -> Int[np.ndarray, "units"]:
        kept = np.asarray(units)
        if kept.dtype == bool:
            raise JpruneError(f"{self.name}: units are integers, got bool; np.flatnonzero makes them of a mask")
        if kept.ndim != 1 or kept.size == 0 or not np.issubdtype(kept.dtype, np.integer):
            raise JpruneError(f"{self.name}: expected a list of units to keep, at least one, got {units!r}")
        if kept.min() < 0 or kept.max() >= self.size:
            raise JpruneError(f"{self.name} has units 0 to {self.size - 1}, got {kept.min()} to {kept.max()}")
        if np.any(np.diff(kept.astype(np.int64)) <= 0):
            raise JpruneError(f"{self.name}: units must ascend, none twice; sort them (np.unique)")
        return kept

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
        """The groups that are not frozen: `proven` to be safe, or believed to be."""
        return tuple(g for g in self._groups if g.frozen is None)

    def __str__(self) -> str:
        return "\n".join(map(str, self._groups))

    def keep(self, units: Mapping[str, Sequence[int] | np.ndarray]) -> dict[str, dict[int, Int[np.ndarray, "_"]]]:
        """As `Group.keep`, from the units that stay of several groups by name; other groups stay whole.

        Where groups share an axis (KV heads and their query heads on the one axis of q), a position stays if all of
        them keep it.

        Raises:
          JpruneError: no such group, units that are none, or a frozen group that does not stay whole.
        """
        keep: dict[str, dict[int, np.ndarray]] = {}
        for name, kept in units.items():
            for path, axes in self[name].keep(kept).items():
                for axis, positions in axes.items():
                    before = keep.setdefault(path, {}).get(axis, positions)
                    keep[path][axis] = np.intersect1d(before, positions)
        return keep

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

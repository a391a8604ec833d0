"""Which groups are proven to be safe, which are only believed to be, and which numbers in f freeze.

f is traced again with all lengths changed at once. Where that does not go, it is traced with one kind of length
changed: first smaller ones, then larger ones, then by a copy of f that holds other numbers (`held.py`), as a Linen
module with other fields. If no number in the program changes, the group is proven to be safe; if one does, it is
frozen. Where no such trace can be compared, because sizes are written into the code, the suspicions of `lengths.py`
freeze, unless the user says where the numbers come from; a group without any is believed to be safe.
"""

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jprune.trace.coupling import held
from jprune.trace.coupling.atoms import Axis
from jprune.trace.coupling.forms import common
from jprune.trace.coupling.lengths import Suspicion, Suspicions
from jprune.trace.coupling.named import Named
from jprune.trace.coupling.retrace import Retrace, size

FACTORS = (2, 3, 5, 7, 11, 13)
"""By which lengths grow: different ones for different kinds, so that ratios of lengths change too."""
MOST_EQUATIONS = 60_000
"""To trace in search of the kind of axis that a number comes from; a decoder layer has about eighty."""
MOST_DOUBTED = 5_000
"""Equations to trace to see whether a number that is a mere doubt follows from a number that f holds."""
MOST_COPIES = 8
"""Copies of f that are tried for one kind of axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one atom."""

    frozen: str | None
    proven: bool
    evidence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Seen:
    """What other traces showed of one kind of axis."""

    changed: str | None = None
    """A number that comes from the length."""
    same: str | None = None
    """How f was traced without any number changing."""
    believed: str | None = None
    """Why that is no proof."""
    holding: tuple[held.Key, ...] = ()
    """The numbers that had to be replaced in f for it."""


class Evidence:
    """Collects what can be learnt; `verdicts` tells it."""

    def __init__(
        self,
        check: Retrace,
        free: Mapping[Axis, Hashable],
        suspicions: Suspicions,
        named: Named,
        axes: Mapping[Axis, Sequence[Axis]],
    ):
        """Of the atoms `free` that the walk has not frozen, each with its kind (those of a kind change together).

        Args:
          check: traces again.
          free: atoms and kinds.
          suspicions: numbers that may come from their lengths.
          named: what the user says of numbers.
          axes: for each atom the axes of parameters that have it.
        """
        self.check, self.free, self.suspected, self.named, self.axes = check, free, suspicions.found, named, axes
        self.met = [number for number, _ in suspicions.met]
        self.near, self.roots = suspicions.near, suspicions.roots
        self.divisors = {leaf: divisor.words for leaf, divisor in suspicions.divisors}
        self.roles: dict[Hashable, list[Axis]] = {}
        for leaf, role in free.items():
            self.roles.setdefault(role, []).append(leaf)
        self.smaller, self.larger = self._plans()

    @functools.cached_property
    def holds(self) -> tuple[held.Key, ...]:
        """The numbers that f holds."""
        arrays = [("an array", float(x)) for x in self.check.uniform if x is not None]
        return (*held.numbers(self.check.held), *arrays)

    def verdicts(self) -> dict[Axis, Verdict]:
        """For every free atom."""
        seen = self._seen()
        return {leaf: self._verdict(leaf, seen[role]) for leaf, role in self.free.items()}

    def _plans(self) -> tuple[dict[Axis, int], dict[Axis, int]]:
        """Smaller sizes for all atoms (larger for an atom of two: size one is treated differently), and larger ones."""
        flat, smaller, larger = self.check.flat, {}, {}
        taken = {n for x in (*flat.args, *flat.params.values()) for n in x.aval.shape}
        for atoms, factor in zip(self.roles.values(), itertools.cycle(FACTORS)):
            n = min(leaf.size for leaf in atoms)
            below = next((k for k in range(2, n) if k not in taken), n - 1)
            taken.add(below)
            for leaf in atoms:
                smaller[leaf] = below if n > 2 else leaf.size * factor
                larger[leaf] = leaf.size * factor
        return smaller, larger

    def _seen(self) -> dict[Hashable, _Seen]:
        """By kind of axis."""
        if not self.free:
            return {}
        if self.check(self.smaller) == "":
            return {role: self._after(atoms, self.smaller, ()) for role, atoms in self.roles.items()}
        seen, roles = {}, list(self.roles)
        guilty = [role for role in roles if any(self._suspicions(leaf) for leaf in self.roles[role])]
        innocent = {leaf: n for leaf, n in self.smaller.items() if self.free[leaf] not in guilty}
        if guilty and innocent and self.check(innocent) == "":
            seen = {role: self._after(self.roles[role], innocent, ()) for role in roles if role not in guilty}
            roles = guilty
        if len(roles) * len(self.check.flat.equations) > MOST_EQUATIONS:
            why = "f is too large to be traced for each kind of axis, and cannot be traced with all lengths changed"
            return seen | {role: _Seen(believed=why) for role in roles}
        seen |= {role: self._alone(self.roles[role]) for role in roles}
        return seen | self._together({role: one for role, one in seen.items() if not (one.same or one.changed)})

    def _together(self, unknown: Mapping[Hashable, _Seen]) -> dict[Hashable, _Seen]:
        """With all kinds of one length changed, as of queries and of values, where a module has one head_dim."""
        seen: dict[Hashable, _Seen] = {}
        equal: dict[int, list[Hashable]] = {}
        for role in unknown:
            equal.setdefault(self.roles[role][0].size, []).append(role)
        for roles in equal.values():
            atoms = [leaf for role in roles for leaf in self.roles[role]]
            if len(roles) > 1 and len({leaf.size for leaf in atoms}) == 1:
                together = self._copied(atoms)
                if together is not None:
                    if together.changed is None and together.believed is None:
                        why = f"only with all such axes of length {atoms[0].size}, which must keep equally many"
                        together = dataclasses.replace(together, believed=why)
                    seen |= dict.fromkeys(roles, together)
        return seen

    def _alone(self, atoms: list[Axis]) -> _Seen:
        """With the lengths of one kind of axis changed."""
        verdict = self._try(atoms, self.smaller, ())
        if verdict is not None:
            return verdict
        verdict = self._try(atoms, self.larger, ())
        if verdict is not None:
            why = None if verdict.changed else "f is not the same program at smaller lengths"
            return dataclasses.replace(verdict, believed=why)
        unknown = _Seen(believed="sizes are written into f, so no trace at another length could check its numbers")
        return self._copied(atoms) or unknown

    def _copied(self, atoms: list[Axis]) -> _Seen | None:
        """By copies of f that hold other numbers; None if no copy is f at another length."""
        left = min(MOST_COPIES, MOST_EQUATIONS // max(len(self.check.flat.equations), 1) // len(self.roles))
        for sizes in (self.smaller, self.larger):
            same = dict.fromkeys(atoms, sizes[atoms[0]]) if len({leaf.size for leaf in atoms}) == 1 else sizes
            for keys in itertools.islice(self._copies(atoms), left):
                if (verdict := self._try(atoms, same, keys)) is not None:
                    return verdict
        return None

    def _try(self, atoms: list[Axis], sizes: Mapping[Axis, int], keys: tuple[held.Key, ...]) -> _Seen | None:
        here = {leaf: sizes[leaf] for leaf in atoms}
        verdict = self.check(here, self._values(atoms, here, keys))
        if verdict is None:
            return None
        return _Seen(changed=verdict + self._as(keys)) if verdict else self._after(atoms, here, keys)

    def _after(self, atoms: list[Axis], sizes: Mapping[Axis, int], keys: tuple[held.Key, ...]) -> _Seen:
        """Nothing has changed. But what follows from a number that f holds changes with that number only."""
        new = sizes[atoms[0]]
        same = f"f traced at length {new} in place of {atoms[0].size} has the same numbers{self._as(keys)}"
        doubted = [s for leaf in atoms for s in self._suspicions(leaf) if not s.explained]
        near = {n for leaf in atoms for n in self.near[leaf] if self.named.says(leaf, n) is None and not _by_hand(n)}
        near -= self.roots
        if not doubted and not near:
            return _Seen(same=same, holding=keys)
        exact = [key for key in self._sizes_held(atoms) if key not in keys and self._is_length(atoms, key)]
        affordable = len(exact) * len(self.check.flat.equations) <= MOST_DOUBTED
        for key in exact[:4] if affordable or not all(s.doubt for s in doubted) else ():
            if words := self.check(sizes, self._values(atoms, sizes, (*keys, key))):
                name = f"{key[0]} = {key[1]:g}"
                return _Seen(same=same, holding=keys, believed=f"if {name}, which f holds, is its length, {words}")
        told = dict.fromkeys(near, "") | {s.number: f": {s.words}" for s in doubted}
        told = {number: words for number, words in told.items() if not common(number)}
        others = [key for key in self.holds if key not in (*keys, *exact) and key[0] not in self.named.held]
        for number, ending in told.items():
            for name, value in others:
                if _follows(number, value):
                    why = f"{name} = {value:g}, which f holds, may have been computed from its length{ending}"
                    return _Seen(same=same, holding=keys, believed=why)
        return _Seen(same=same, holding=keys)

    def _as(self, keys: tuple[held.Key, ...]) -> str:
        names = ", ".join(f"another {name.removeprefix('an ')}" for name in dict.fromkeys(name for name, _ in keys))
        return f" (of f with {names})" if keys else ""

    def _suspicions(self, leaf: Axis) -> list[Suspicion]:
        """What the user has not cleared."""
        return [s for s in self.suspected.get(leaf, ()) if self.named.says(leaf, s.number) is None]

    def _sizes_held(self, atoms: list[Axis]) -> list[held.Key]:
        """Numbers that f holds and that may be made of the lengths; those that the user names first."""
        n = atoms[0].size
        named, others = [], []
        for key in self.holds:
            name, value = key
            if name in self.named.held:
                if not self.named.held[name].isdisjoint(atoms):
                    named.append(key)
            elif value >= 2 and value == int(value) and (value % n == 0 or self._is_length(atoms, key)):
                others.append(key)
        return [*named, *others]

    def _is_length(self, atoms: list[Axis], key: held.Key) -> bool:
        return any(key[1] in (leaf.size, *(axis.size for axis in self.axes[leaf])) for leaf in atoms)

    def _copies(self, atoms: list[Axis]) -> Iterator[tuple[held.Key, ...]]:
        """Sets of numbers to replace in f, the likely ones first."""
        keys = self._sizes_held(atoms)
        named = tuple(key for key in keys if key[0] in self.named.held)
        others = [key for key in keys if key not in named]
        exact = [key for key in others if self._is_length(atoms, key)]
        rows: list[tuple[held.Key, ...]] = [(key,) for key in exact] if len(exact) < 4 else []
        if len(exact) > 1:
            rows.append(tuple(exact))
        rows += [tuple(others)] if len(others) > len(exact) > 2 else []
        rows += [row for k in range(1, 4) for row in itertools.combinations(others, k)]
        rows.append(tuple(others))
        if named:
            rows.insert(0, ())
        yield from dict.fromkeys(tuple(dict.fromkeys((*named, *row))) for row in rows if named or row)

    def _values(self, atoms: list[Axis], sizes: Mapping[Axis, int], keys: tuple[held.Key, ...]) -> dict[held.Key, int]:
        """What to replace numbers by: an axis' new length, or as many times the atom's new size as before."""
        lengths = {axis.size: size(axis, sizes) for leaf in atoms for axis in self.axes[leaf]}
        n, new = atoms[0].size, sizes[atoms[0]]
        return {key: lengths.get(int(key[1]), int(key[1]) // n * new) for key in keys}

    def _verdict(self, leaf: Axis, seen: _Seen) -> Verdict:
        said = [number for number in self.met if self.named.says(leaf, number)]
        frozen = f"as `numbers` says, the number {said[0]:g} comes from its length" if said else seen.changed
        left = self._suspicions(leaf)
        if frozen is None and (seen.same is None or (seen.holding and seen.believed)):
            # f at other lengths is another function, and what follows from the length there is not known.
            strong = [s for s in left if not s.doubt]
            if strong:
                frozen = (
                    f"{strong[0].words}, seems to come from its length; if it comes from another or from none, say so: "
                    f"numbers={{{strong[0].number:g}: None}}"
                )
        if frozen is not None:
            return Verdict(frozen=frozen, proven=False, evidence=frozen)
        if seen.same is not None and seen.believed is None:
            return Verdict(frozen=None, proven=True, evidence=seen.same)
        parts = [x for x in (seen.same, seen.believed) if x]
        if left and seen.same is None:
            parts.append(f"{left[0].words}, may come from its length")
        if leaf in self.divisors and seen.same is None:
            parts.append(f"{self.divisors[leaf]} divides its mean and is taken for its length")
        cleared = [s for s in self.suspected.get(leaf, ()) if self.named.says(leaf, s.number) is False]
        if cleared:
            parts.append(f"`numbers` says that {', '.join(f'{s.number:g}' for s in cleared)} does not come from it")
        return Verdict(frozen=None, proven=False, evidence="; ".join(parts))


def _follows(number: float, value: float) -> bool:
    """Whether a number in the program is a number that f holds, or its reciprocal, in some precision."""
    for x in (value, 1 / value if value else 0.0):
        with np.errstate(over="ignore"):
            near = [float(np.asarray(x, dtype)) for dtype in (np.float32, np.float16, jnp.bfloat16)]
        if x and any(y and abs(abs(number) / abs(y) - 1) <= 1e-6 for y in near):
            return True
    return False


def _by_hand(number: float) -> bool:
    """Whether a number has so few digits that somebody may have written it, and not computed it."""
    return any(float(f"{x:.3g}") == x or abs(float(f"{x:.3g}") / x - 1) <= 1e-7 for x in (number, 1 / number))

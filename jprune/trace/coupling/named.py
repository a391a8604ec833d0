"""What the user says about numbers in f: which length they come from, or that they come from none."""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from jprune.errors import JpruneError
from jprune.trace.coupling.atoms import Axis

Place = tuple[str, int]
"""(path, axis) of a parameter."""
Numbers = Mapping[float | str, Place | Sequence[Place] | None]
"""A number in f, or the name of one that f holds, and the axes whose length it comes from; None: from no length."""


class Named:
    """Answers for atoms."""

    def __init__(self, numbers: Numbers | None, atoms: Callable[[Place], Collection[Axis]]):
        """From what the user gives, and a function that tells the atoms on an axis of a parameter."""
        self.numbers: dict[float, frozenset[Axis]] = {}
        self.held: dict[str, frozenset[Axis]] = {}
        for key, places in (numbers or {}).items():
            listed: list[Any] = [] if places is None else [places] if _is_place(places) else list(places)
            for place in listed:
                if not _is_place(place):
                    raise JpruneError(f"numbers: expected (path, axis) or None for {key!r}, got {place!r}")
            found = frozenset(leaf for place in listed for leaf in atoms(place))
            if isinstance(key, str):
                self.held[key] = found
            elif isinstance(key, bool) or not isinstance(key, int | float):
                raise JpruneError(f"numbers: expected a number in f or the name of one that it holds, got {key!r}")
            else:
                self.numbers[float(key)] = found

    def says(self, leaf: Axis, number: float, rounding: float = 1e-5) -> bool | None:
        """Whether a number comes from the length of an atom; None if that is not said."""
        for key, leaves in self.numbers.items():
            if abs(abs(number) - abs(key)) <= rounding * abs(key):
                return leaf in leaves
        return None

    def check(self, numbers: Iterable[float], held: Iterable[str]) -> None:
        """Raises `JpruneError` if something is named that is not in f."""
        there, names = sorted(set(numbers)), sorted(set(held))
        for key in self.numbers:
            if not any(abs(abs(number) - abs(key)) <= 1e-5 * abs(key) for number in there):
                listed = ", ".join(f"{number:.6g}" for number in there[:20]) or "none"
                raise JpruneError(f"numbers: {key:g} is not among the numbers in f that meet a value: {listed}")
        for name in self.held:
            if name not in names:
                near = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.0)) or "none"
                raise JpruneError(f"numbers: f holds no number named {name!r}; near misses: {near}")


def _is_place(x: object) -> TypeGuard[Place]:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str) and isinstance(x[1], int)

"""What is known of the values of a function, and of those in the bodies of its loops and branches."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jprune.trace.jaxpr import ELEMENTWISE, LAYOUTS, Atom, Body, Equation, Var
from jprune.trace.kernels import View
from jprune.trace.products import Product
from jprune.trace.views import Axes, whole

Paths = frozenset[str]
NONE: Paths = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """Where a use of some parameters ends."""

    paths: tuple[str, ...]
    skipped: bool
    """Whether it is a product with a kernel that is not followed."""
    what: str
    """What reads it; of what is skipped, why it is."""
    source: str
    product: Product | None = None


@dataclasses.dataclass(kw_only=True, eq=False)
class Level:
    """The equations of the function, or of a body within it, and what is known of their values."""

    body: Body
    depth: int = 0
    """Loops and branches around it."""
    counted: bool = True
    """Whether what it reads can be observed: not in the condition of a loop."""
    origins: dict[Var, Paths] = dataclasses.field(default_factory=dict)
    """The parameters that a value is made of; only of values that depend on no argument."""
    views: dict[Var, View] = dataclasses.field(default_factory=dict)
    roots: dict[Var, tuple[Var, Axes]] = dataclasses.field(default_factory=dict)
    """Of a value that is a view of another, which, and its axes."""
    reasons: dict[Var, tuple[str, Equation]] = dataclasses.field(default_factory=dict)
    """Why a value that is made of parameters alone is no view of one, and where it ceased to be one."""
    multiplied: set[Var] = dataclasses.field(default_factory=set)
    """Values that are made of parameters alone, by a product among others."""
    derived: dict[Var, tuple[Paths, Equation]] = dataclasses.field(default_factory=dict)
    """Kernels that depend on an argument, and where they begin to."""
    looked_up: set[Var] = dataclasses.field(default_factory=set)
    """Those of them that are rows picked from a leaf: something added to them, they are values like any other."""
    makers: dict[Var, Equation] = dataclasses.field(default_factory=dict)
    products: dict[Var, Product] = dataclasses.field(default_factory=dict)
    """By their result."""
    inner: dict[Var, tuple["Level", ...]] = dataclasses.field(default_factory=dict)
    """Bodies of loops and branches, by the first result."""

    def root(self, x: Var) -> tuple[Var, Axes]:
        """The value that x is a view of, and its axes."""
        return self.roots.get(x, (x, whole(x.aval.shape)))


def constant(level: Level, atom: Atom) -> int | None:
    """The value of an integer that depends on literals alone, or None."""
    if isinstance(atom, jex.Literal):
        return int(np.asarray(atom.val))
    value = _folded(level, atom, 20)
    return None if value is None or np.ndim(value) else int(value)


def _folded(level: Level, atom: Atom, depth: int) -> Any:
    if isinstance(atom, jex.Literal):
        return atom.val
    if atom in level.body.constants:
        return level.body.constants[atom]
    equation = level.makers.get(atom)
    if equation is None or depth == 0 or atom.aval.size > 4096 or equation.effects or len(equation.outvars) != 1:
        return None
    if equation.primitive.name not in ELEMENTWISE | LAYOUTS | {"iota", "slice", "dynamic_slice", "concatenate"}:
        return None
    values = [_folded(level, x, depth - 1) for x in equation.invars]
    if any(v is None for v in values):
        return None
    with jax.ensure_compile_time_eval():
        return equation.primitive.bind(*values, **equation.params)

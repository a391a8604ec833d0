"""Compensation in pytrees and runs: kernels that lose inputs to structured pruning are refitted from their Grams.

The equation is in `jprune.solvers.compensate`. Here it is applied to whatever a kernel is in its leaf (head axes, a
part of a fused kernel, a stack of experts), and it is a method that prunes whole inputs, as runs know methods.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jprune import evidence, positions
from jprune.errors import JpruneError
from jprune.methods.base import Method
from jprune.patterns import Pattern
from jprune.places import Observed, Place
from jprune.solvers.compensate import compensate
from jprune.solvers.pruned import Pruned
from jprune.statistics import Gram, Stacked, Statistic

Leaves = dict[str, Any]
Keep = Mapping[str, Mapping[int, np.ndarray]]


def compensated(leaves: Leaves, keep: Keep, grams: Observed, *, damping: float = 0.01) -> Leaves:
    """The leaves with what is left of kernels making up for the inputs that they lose; nothing is cut out.

    Args:
      leaves: parameters by path, arrays or `jax.ShapeDtypeStruct`s (which stay as they are).
      keep: the positions that stay, by path and axis.
      grams: of the kernels' inputs before anything is removed, as `jprune.observe(f, Gram)` gives them. Kernels that
        are not among them, and those of a stack that saw no token, keep their weights.
      damping: see `jprune.solvers.compensate`.

    Raises:
      JpruneError: statistics that are no Grams or say not where they are of; none of them is of a kernel that loses
        inputs; what `jprune.solvers.compensate` refuses.
    """
    if not isinstance(grams, Observed):
        raise JpruneError(
            f"expected Grams as jprune.observe(f, Gram)(params, ...) returns them, got {type(grams).__name__}; "
            "jprune.Observed(grams, places) says where others are of"
        )
    result, found = dict(leaves), False
    for key, place in grams.places.items():
        if place.path not in keep or place.path not in leaves:
            continue
        stay = inputs(place, leaves[place.path].shape, keep[place.path])
        if stay.all():
            continue
        found = True
        result[place.path] = _refitted(result[place.path], place, grams[key], stay, damping, key)
    if not found:
        raise JpruneError(
            f"expected Grams of kernels that lose inputs, got those of {', '.join(list(grams)[:3]) or 'none'}, which "
            "lose none; observe the function whose parameters become smaller, or leave the Grams out"
        )
    return result


def inputs(place: Place, shape: tuple[int, ...], axes: Mapping[int, np.ndarray]) -> np.ndarray:
    """Which inputs of each kernel of a place stay, bool [stack, d_in]; all of a kernel that goes as a whole."""
    stay: np.ndarray = np.any(place.matrices(positions.mask(shape, axes)), axis=-1)
    return np.where(np.any(stay, axis=-1, keepdims=True), stay, True)


def _refitted(leaf: Any, place: Place, statistic: Any, stay: np.ndarray, damping: float, where: str) -> Any:
    """A leaf with the kernels of a place refitted."""
    kind = statistic.each if isinstance(statistic, Stacked) else statistic
    if not isinstance(kind, Gram):
        raise JpruneError(f"{where}: expected the Gram of its inputs, got {type(kind).__name__}; observe Gram")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    array = jnp.asarray(leaf)
    matrices = jnp.asarray(place.matrices(array))
    for i, rows in enumerate(stay):
        own = statistic.of(i) if isinstance(statistic, Stacked) else statistic
        if rows.all() or (len(stay) > 1 and evidence.has_seen_nothing(own)):
            continue
        evidence.check_seen(own, where)
        new = compensate(matrices[i], own.total, rows, damping=damping, where=where).kernel
        matrices = matrices.at[i].set(new)
    result = place.put(array, matrices)
    return np.asarray(result) if isinstance(leaf, np.ndarray) else result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compensation:
    """How a run refits the kernels that lose inputs, and by which text."""

    samples: int | None = None
    """Calibration windows; None for the usual number."""
    sequence_length: int | None = None
    """Tokens of a calibration window; None for the usual number."""
    damping: float = 0.01
    """Share of a Gram matrix's mean diagonal that is added to its diagonal."""

    def __post_init__(self):
        if not 0 < self.damping < float("inf"):
            raise JpruneError(f"damping must be positive, got {self.damping}")
        for name in ("samples", "sequence_length"):
            if (getattr(self, name) or 1) < 1:
                raise JpruneError(f"the {name} of a compensation must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Rows(Pattern):
    """Whole inputs of a kernel go. Equal if equally many do, which is what programs and forecasts depend on."""

    kept: int
    """Inputs that stay."""
    positions: Any = dataclasses.field(default=None, compare=False, repr=False)
    """Which, ascending, of the kernel's matrix view; None for the first ones, where it does not matter which. Of a
    stack, [stack, kept], they are each kernel's own."""

    def of(self, i: int) -> "Rows":
        """Those of the kernel number i of a stack."""
        return self if np.ndim(self.positions) < 2 else dataclasses.replace(self, positions=self.positions[i])

    def zeros(self, d_in: int, d_out: int) -> int:
        """Exact number of zeros in a kernel ``[d_in, d_out]``."""
        return (d_in - self.kept) * d_out

    def rows(self, d_in: int) -> np.ndarray:
        """Which of the inputs stay, bool [d_in]."""
        stay = np.zeros(d_in, bool)
        stay[np.arange(self.kept) if self.positions is None else self.positions] = True
        return stay

    def select(self, scores, keep=None):
        """The mask of these inputs, whatever the scores."""
        mask = jnp.broadcast_to(jnp.asarray(self.rows(len(scores)))[:, None], scores.shape)
        return mask if keep is None else mask & keep

    def json(self) -> dict[str, Any]:
        """``{"inputs": 1024}``."""
        return {"inputs": self.kept}

    def __str__(self) -> str:
        return f"{self.kept} inputs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compensate(Method):
    """Remove whole inputs of kernels, and refit what is left by least squares."""

    statistic: ClassVar[type[Statistic]] = Gram
    damping: float = 0.01
    """Share of the Gram matrix's mean diagonal that is added to its diagonal."""

    timed: ClassVar[Pattern] = Rows(kept=1)

    def __call__(self, kernel, statistic, pattern, keep=None) -> Pruned:
        """Removes what a `Rows` says; `statistic` is a `Gram`, see `Method`."""
        del keep  # what was zero in an input that stays may be refitted like the rest
        return self.together({"kernel": kernel}, statistic, {"kernel": pattern}, {})["kernel"]

    def together(self, kernels, statistic, patterns, keeps) -> dict[str, Pruned]:
        """Removes inputs of kernels that read the same input."""
        del keeps
        evidence.check(statistic, ", ".join(kernels))
        return {
            name: compensate(
                kernel, statistic.total, patterns[name].rows(len(kernel)), damping=self.damping, where=name
            )
            for name, kernel in kernels.items()
        }

    def flops(self, d_in: int, d_out: int) -> float:
        """Operations of one factorisation, two products with the Gram matrix and two triangular solutions."""
        return d_in**3 / 3 + 6.0 * d_in * d_in * d_out

    def nbytes(self, d_in: int, d_out: int) -> float:
        """Bytes of four copies of the Gram matrix (inner, damped, reversed, factorised) and seven of the kernels."""
        return 4 * 4.0 * d_in * d_in + super().nbytes(d_in, d_out)

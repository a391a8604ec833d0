"""Methods: a score, a solver, or both, as frozen configs.

One definition serves Python, the command line and recipe files. A new method is a dataclass with the statistic it
needs and a call that prunes one kernel; everything above it (`prune`, the block pipeline) then works with it:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ActivationOnly(Method):
        statistic = SquaredNorm

        def __call__(self, kernel, statistic, pattern, keep=None):
            scores = jnp.broadcast_to(statistic.total[:, None], kernel.shape)
            return masked(kernel, masks.select(scores, pattern, keep=keep))
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jprune import devices, masks, scores, trees
from jprune.errors import JpruneError
from jprune.patterns import NM, Pattern, Scope, Unstructured
from jprune.solvers.pruned import Pruned
from jprune.solvers.sparsegpt import check_factor, factorise, sweep
from jprune.statistics import Gram, SquaredNorm, Statistic

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """How one kernel is pruned, given what is known of its inputs."""

    statistic: ClassVar[type[Statistic] | None] = None
    """What must be gathered over the calibration tokens; None for methods that need no data."""

    @abc.abstractmethod
    def __call__(
        self,
        kernel: Float[Array, "d_in d_out"],
        statistic: Statistic | None,
        pattern: Pattern,
        keep: Bool[Array, "d_in d_out"] | None = None,
    ) -> Pruned:
        """Prunes one kernel (matrix view); elements where `keep` is False were pruned before and stay zero."""

    def together(
        self,
        kernels: Mapping[str, Float[Array, "d_in _"]],
        statistic: Statistic | None,
        patterns: Mapping[str, Pattern],
        keeps: Mapping[str, Bool[Array, "d_in _"]],
    ) -> dict[str, Pruned]:
        """Prunes kernels that read the same input, by name; for methods that share work between them."""
        return {name: self(kernel, statistic, patterns[name], keeps.get(name)) for name, kernel in kernels.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(Method):
    """Prune the smallest weights of each kernel. Needs no calibration data."""

    def __call__(self, kernel, statistic, pattern, keep=None) -> Pruned:
        """See `Method`; `statistic` is not used."""
        del statistic
        return masked(kernel, masks.select(scores.magnitude(kernel), _among(pattern, "kernel"), keep=keep))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanda(Method):
    """Prune the smallest |weight| x norm of its input, output by output (Sun et al. 2023). No weight update."""

    statistic: ClassVar[type[Statistic]] = SquaredNorm

    def __call__(self, kernel, statistic, pattern, keep=None) -> Pruned:
        """See `Method`; `statistic` is a `SquaredNorm`."""
        scored = scores.wanda(kernel, statistic.total)
        return masked(kernel, masks.select(scored, _among(pattern, "output"), keep=keep))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPT(Method):
    """Prune column by column and update what is left to keep the outputs (Frantar and Alistarh 2023)."""

    statistic: ClassVar[type[Statistic]] = Gram

    damping: float = 0.01
    """Share of the Gram matrix's mean diagonal that is added to its diagonal."""
    block_size: int = 128
    """Inputs whose mask is chosen together."""

    def __post_init__(self):
        if not 0 < self.damping < float("inf"):
            raise JpruneError(f"damping must be positive, got {self.damping}")
        if self.block_size < 1:
            raise JpruneError(f"block_size must be at least 1, got {self.block_size}")

    def __call__(self, kernel, statistic, pattern, keep=None) -> Pruned:
        """See `Method`; `statistic` is a `Gram`."""
        keeps = {} if keep is None else {"kernel": keep}
        return self.together({"kernel": kernel}, statistic, {"kernel": pattern}, keeps)["kernel"]

    def together(self, kernels, statistic, patterns, keeps) -> dict[str, Pruned]:
        """One factorisation, and one sweep over all outputs."""
        factor = devices.on_one_device(factorise, statistic.total, self.damping)
        check_factor(factor, statistic.total, ", ".join(kernels))
        pruned = sweep(
            list(kernels.values()),
            factor,
            [patterns[name] for name in kernels],
            [keeps.get(name) for name in kernels],
            block_size=self.block_size,
        )
        return dict(zip(kernels, pruned, strict=True))


METHODS: dict[str, type[Method]] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}
"""By the name they have on the command line."""


def masked(kernel: Float[Array, "d_in d_out"], mask: Bool[Array, "d_in d_out"]) -> Pruned:
    """What a method without weight update returns."""
    return Pruned(jnp.where(mask, kernel, jnp.zeros_like(kernel)), mask)


def prune(
    params: PyTree,
    statistics: Mapping[str, Statistic] | None,
    method: Method,
    pattern: Pattern,
    *,
    where: trees.Filter = "kernel$",
    skip: trees.Filter = (),
    keep: Mapping[str, Bool[Array, "..."]] | None = None,
    in_axes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[PyTree, dict[str, Bool[Array, "..."]]]:
    """Prunes the kernels of any parameter pytree.

    Args:
      params: Linen dict, `nnx.State` or nested dicts. Kernels have their input axes first, as Flax lays them out; how
        many axes are inputs is read from the size of their statistic.
      statistics: for each kernel's path what the method asks for, as `observe` returns it; None if it asks for nothing.
      method: e.g. `SparseGPT()`.
      pattern: e.g. `Unstructured(0.5)`.
      where: regular expressions over paths; a leaf is pruned if one is found in its path.
      skip: regular expressions; a leaf in whose path one is found is left alone.
      keep: masks of an earlier pruning, by path; what they pruned stays zero.
      in_axes: the input axes of kernels by path, as `matmuls` returns them, where they are not as said above.

    Returns:
      The parameters, with pruned kernels, and the masks by path.

    Raises:
      JpruneError: a filter finds nothing; a statistic is missing or does not fit; a pattern does not fit; a kernel of
        more than two axes without a statistic does not tell its inputs; a mask in `keep` is of no chosen kernel.
    """
    leaves = trees.flatten(params)
    kernels, keep = {}, keep or {}
    for path in trees.choose(leaves, where, skip):
        statistic = (statistics or {}).get(path)
        if method.statistic is not None and not isinstance(statistic, method.statistic):
            raise JpruneError(
                f"{path}: {type(method).__name__} needs a {method.statistic.__name__} of its inputs, "
                f"got {type(statistic).__name__}; gather it with jprune.observe"
            )
        kernels[path] = _input_axes(leaves[path].shape, statistic, pattern, (in_axes or {}).get(path), path)
    if strays := [path for path in keep if path not in kernels]:
        raise JpruneError(f"there is a mask to keep for {strays[0]!r}, which is not among the {len(kernels)} kernels")
    masks_by_path = {}
    for path, axes in kernels.items():
        matrix = trees.to_matrix(leaves[path], axes)
        pattern.check(len(matrix), path)
        before = {path: trees.to_matrix(keep[path], axes)} if path in keep else {}
        pruned = method.together({path: matrix}, (statistics or {}).get(path), {path: pattern}, before)[path]
        leaves[path] = trees.from_matrix(pruned.kernel, leaves[path].shape, axes)
        masks_by_path[path] = trees.from_matrix(pruned.mask, leaves[path].shape, axes)
    return trees.replace(params, leaves), masks_by_path


def _input_axes(
    shape: tuple[int, ...], statistic: Statistic | None, pattern: Pattern, given: tuple[int, ...] | None, path: str
) -> tuple[int, ...]:
    if given is not None:
        return given
    matters = isinstance(pattern, NM) or pattern.per == "output"
    if len(shape) > 2 and statistic is None and matters:
        raise JpruneError(f"{path}: which axes of shape {shape} are inputs? Give them as in_axes (see jprune.matmuls)")
    return trees.leading_axes(shape, None if statistic is None else statistic.d_in, path)


def _among(pattern: Pattern, per: Scope) -> Pattern:
    return pattern.among(per) if isinstance(pattern, Unstructured) else pattern

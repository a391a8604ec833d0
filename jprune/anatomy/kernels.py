"""What a run works on: the units that are in memory one after the other, and every kernel, with its pattern.

Known from shapes and one abstract trace of each distinct block; no weight is read. What it takes: `forecast`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jprune import devices, trees
from jprune.checkpoints import Checkpoint
from jprune.errors import JpruneError
from jprune.models import decoder
from jprune.patterns import Pattern
from jprune.trace import ParamMatmul, matmuls

PyTree = Any
HEAD = "head/kernel"
_LEFT_ALONE = re.compile("^head/|/(router|shared_gate)/")
"""Pruned only where an expression finds it: the head, and the small kernels that send tokens to experts."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is in memory at one time: a block, or at last the final norm and head."""

    prefix: str
    """Of the paths of its parameters; "" for the head, whose parameters have no common one."""
    function: Callable[[PyTree, jax.Array], jax.Array]
    """f(params, x): the hidden states [batch, length, d_model] after it (logits, for the head)."""
    shapes: tuple[tuple[str, tuple[int, ...], Any], ...]
    """Path below the prefix, shape and dtype of every parameter."""

    @property
    def name(self) -> str:
        """The prefix, or "head"."""
        return self.prefix or "head"

    def path(self, relative: str) -> str:
        """The path in the model of a path in the unit."""
        return f"{self.prefix}/{relative}" if self.prefix else relative

    def shardings(self, mesh: Mesh, d_model: int) -> dict[str, NamedSharding]:
        """Where its parameters lie while they are used, by path in the unit: kernels cut along their outputs."""
        found = {m.path: m.out_axes for m in _matmuls(self.function, self.shapes, d_model)}
        return {path: devices.kernel(mesh, shape, found.get(path, ())) for path, shape, _ in self.shapes}

    def abstract(self) -> PyTree:
        """Its parameters as ShapeDtypeStructs."""
        return trees.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in self.shapes})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of the plan."""

    path: str
    unit: str
    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    stage: int
    pattern: Pattern
    batch_axes: tuple[int, ...] = ()
    """Of a stack of kernels, such as experts, each with inputs of its own."""

    @property
    def d_in(self) -> int:
        """Number of inputs of the matrix view."""
        return math.prod(self.shape[axis] for axis in self.in_axes)

    @property
    def stack(self) -> tuple[int, ...]:
        """How many kernels there are in a stack; empty if it is a single one."""
        return (math.prod(self.shape[axis] for axis in self.batch_axes),) if self.batch_axes else ()

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    @property
    def zeros(self) -> int:
        """Zeros that the pattern asks for."""
        return self.pattern.zeros(self.d_in, self.size // self.d_in)


def units(checkpoint: Checkpoint) -> list[Unit]:
    """The blocks in their order, then the head."""
    config = checkpoint.config

    def leaves(*prefixes: str, start: str = "") -> tuple[tuple[str, tuple[int, ...], Any], ...]:
        here = [path for path in checkpoint.shapes if path.startswith(prefixes)]
        return tuple((p.removeprefix(start), checkpoint.shapes[p].shape, checkpoint.shapes[p].dtype) for p in here)

    prefixes = [f"blocks/{i}" for i in range(config.layers)]
    blocks = [Unit(p, decoder.block(config, i), leaves(f"{p}/", start=f"{p}/")) for i, p in enumerate(prefixes)]
    parts = leaves(*(f"{name}/" for name in decoder.head_parts(config)))
    return blocks if config.tied else [*blocks, Unit("", decoder.head(config), parts)]


def matmul_kernels(checkpoint: Checkpoint) -> dict[str, tuple[Unit, ParamMatmul]]:
    """Every kernel that could be pruned, by path. All but the head's are the model's prunable parameters."""
    d_model = checkpoint.config.d_model
    return {
        unit.path(matmul.path): (unit, matmul)
        for unit in units(checkpoint)
        for matmul in _matmuls(unit.function, unit.shapes, d_model)
    }


def prunable(checkpoint: Checkpoint, kernels: Iterable[Kernel] = ()) -> list[str]:
    """Paths of the prunable parameters: the kernels of the blocks, and the head where it is among `kernels`."""
    chosen = {kernel.path for kernel in kernels}
    return [path for path in matmul_kernels(checkpoint) if path in chosen or not _LEFT_ALONE.search(path)]


def choose_kernels(
    checkpoint: Checkpoint,
    pattern: Pattern,
    *,
    where: Iterable[str] = (),
    skip: Iterable[str] = (),
    overrides: Mapping[str, Pattern] | None = None,
) -> tuple[Kernel, ...]:
    """The kernels to prune, each with its pattern.

    Args:
      checkpoint: the model.
      pattern: for every kernel without an override.
      where: regular expressions over paths such as ``blocks/3/attn/q/kernel``; by default all kernels of all blocks.
        The head and the routers of experts are pruned only where an expression finds them.
      skip: regular expressions; what they find is left alone.
      overrides: other patterns by regular expression; of several that find a kernel the last one counts.

    Raises:
      JpruneError: an expression that finds nothing; a pattern that does not fit a kernel.
    """
    found = matmul_kernels(checkpoint)
    candidates = [path for path in found if where or not _LEFT_ALONE.search(path)]
    chosen = trees.choose(candidates, list(where) or None, skip)
    if not chosen:
        raise JpruneError("the filters leave no kernel to prune; widen --where or narrow --skip")
    own = {path: p for regex, p in (overrides or {}).items() for path in trees.found(regex, chosen)}
    kernels = []
    for path in chosen:
        unit, matmul = found[path]
        shape = checkpoint.shapes[path].shape
        kernel = Kernel(
            path=path,
            unit=unit.name,
            shape=shape,
            in_axes=matmul.in_axes,
            stage=matmul.stage,
            pattern=own.get(path, pattern),
            batch_axes=matmul.batch_axes,
        )
        kernel.pattern.check(kernel.d_in, path)
        kernels.append(kernel)
    return tuple(kernels)


@functools.lru_cache(maxsize=64)
def _matmuls(function: Callable, shapes: tuple, d_model: int) -> tuple[ParamMatmul, ...]:
    params = trees.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in shapes})
    return matmuls(function, params, jax.ShapeDtypeStruct((1, 8, d_model), jnp.float32), stacked=True)

"""The parts of a model that are in memory one after the other: its blocks, then the head; from shapes alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jprune import devices, trees
from jprune.checkpoints import Checkpoint
from jprune.trace import ParamMatmul, matmuls

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Part:
    """What is in memory at one time: a block, or at last the final norm and head."""

    prefix: str
    """What the paths of its parameters begin with; "" for the head, whose parameters have nothing in common."""
    function: Callable[[PyTree, jax.Array], jax.Array]
    """f(params, x): the hidden states [batch, length, d_model] after it (logits, for the head)."""
    shapes: tuple[tuple[str, tuple[int, ...], Any], ...]
    """Path below the prefix, shape and dtype of every parameter."""

    @property
    def name(self) -> str:
        """The prefix, or "head"."""
        return self.prefix or "head"

    def path(self, relative: str) -> str:
        """The path in the model of a path in the part."""
        return f"{self.prefix}/{relative}" if self.prefix else relative

    def relative(self, path: str) -> str:
        """The path in the part of a path in the model."""
        return path.removeprefix(f"{self.prefix}/") if self.prefix else path

    def shardings(self, mesh: Mesh, d_model: int) -> dict[str, NamedSharding]:
        """Where its parameters lie while they are used, by path in the part: kernels cut along their outputs."""
        found = {m.path: m.out_axes for m in self.matmuls(d_model)}
        return {path: devices.kernel(mesh, shape, found.get(path, ())) for path, shape, _ in self.shapes}

    def abstract(self) -> PyTree:
        """The parameters of this part as ShapeDtypeStructs."""
        return trees.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in self.shapes})

    def matmuls(self, d_model: int) -> tuple[ParamMatmul, ...]:
        """The matmuls of this part against parameters, by paths below the prefix; equal parts are traced once."""
        return _matmuls(self.function, self.shapes, d_model)


def parts(checkpoint: Checkpoint) -> list[Part]:
    """The blocks in their order, then the head."""
    model = checkpoint.model

    def leaves(*prefixes: str, start: str = "") -> tuple[tuple[str, tuple[int, ...], Any], ...]:
        here = [path for path in checkpoint.shapes if path.startswith(prefixes)]
        return tuple((p.removeprefix(start), checkpoint.shapes[p].shape, checkpoint.shapes[p].dtype) for p in here)

    named = {f"blocks/{i}": function for i, function in enumerate(model.blocks)}
    blocks = [Part(p, function, leaves(f"{p}/", start=f"{p}/")) for p, function in named.items()]
    rest = leaves(*(f"{name}/" for name in model.head_parts))
    return blocks if model.tied else [*blocks, Part("", model.head, rest)]


@functools.lru_cache(maxsize=64)
def _matmuls(function: Callable, shapes: tuple, d_model: int) -> tuple[ParamMatmul, ...]:
    params = trees.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in shapes})
    return matmuls(function, params, jax.ShapeDtypeStruct((1, 8, d_model), jnp.float32), stacked=True)

"""The plan of a run: every kernel that will be pruned, by which pattern, and what it will take.

Made from shapes and one abstract trace of each distinct block; no weight is read.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jprune import trees
from jprune.checkpoints import Checkpoint
from jprune.errors import JpruneError
from jprune.methods import Method
from jprune.models import decoder
from jprune.patterns import Pattern
from jprune.pipeline.stopwatch import peak_memory_bytes
from jprune.statistics import Gram
from jprune.trace import ParamMatmul, matmuls

PyTree = Any
HEAD = "head/kernel"


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

    @property
    def d_in(self) -> int:
        """Number of inputs of the matrix view."""
        return math.prod(self.shape[axis] for axis in self.in_axes)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    @property
    def zeros(self) -> int:
        """Zeros that the pattern asks for."""
        return self.pattern.zeros(self.d_in, self.size // self.d_in)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a run will do, known beforehand."""

    kernels: tuple[Kernel, ...]
    sparsity: trees.Sparsity
    """Expected."""
    tokens: int
    """Calibration tokens; 0 where the method needs none."""
    flops: float
    """Of the blocks' matmuls over the calibration tokens, the statistics and the solver."""
    peak_memory_bytes: int
    """Expected, with what Python and JAX took when the plan was made."""

    @property
    def time_class(self) -> str:
        """Seconds, minutes, hours or days on this machine's kind of device, from the flops alone."""
        # Order of magnitude of sustained float32 matmuls: a server's CPU cores together, or one accelerator.
        rate = 1e11 if jax.default_backend() == "cpu" else 3e13
        seconds = self.flops / rate
        return next(
            name
            for limit, name in ((60, "seconds"), (3600, "minutes"), (86400, "hours"), (math.inf, "days"))
            if seconds < limit
        )


def units(checkpoint: Checkpoint) -> list[Unit]:
    """The blocks in their order, then the head."""
    config = checkpoint.config

    def leaves(*prefixes: str, start: str = "") -> tuple[tuple[str, tuple[int, ...], Any], ...]:
        here = [path for path in checkpoint.shapes if path.startswith(prefixes)]
        return tuple((p.removeprefix(start), checkpoint.shapes[p].shape, checkpoint.shapes[p].dtype) for p in here)

    prefixes = [f"blocks/{i}" for i in range(config.layers)]
    blocks = [Unit(p, decoder.block(config, i), leaves(f"{p}/", start=f"{p}/")) for i, p in enumerate(prefixes)]
    return blocks if config.tied else [*blocks, Unit("", decoder.head(config), leaves("final_norm/", "head/"))]


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
    return [path for path in matmul_kernels(checkpoint) if path != HEAD or path in chosen]


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
        The head is pruned only where an expression finds it.
      skip: regular expressions; what they find is left alone.
      overrides: other patterns by regular expression; of several that find a kernel the last one counts.

    Raises:
      JpruneError: an expression that finds nothing; a pattern that does not fit a kernel.
    """
    found = matmul_kernels(checkpoint)
    candidates = [path for path in found if path != HEAD or where]
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
        )
        kernel.pattern.check(kernel.d_in, path)
        kernels.append(kernel)
    return tuple(kernels)


def make_plan(
    checkpoint: Checkpoint, kernels: tuple[Kernel, ...], method: Method, *, tokens: int, dtype: DTypeLike
) -> Plan:
    """What pruning `kernels` with `tokens` calibration tokens will take."""
    by_unit = {unit.name: sum(math.prod(shape) for _, shape, _ in unit.shapes) for unit in units(checkpoint)}
    tokens = tokens if method.statistic else 0
    flops, statistics = 0.0, 0
    if method.statistic:
        flops = 2.0 * tokens * sum(n for name, n in by_unit.items() if name != "head")
        for (_, _, d_in), members in _sharing(kernels).items():
            d_out = sum(k.size // k.d_in for k in members)
            if method.statistic is Gram:
                flops += 4 / 3 * tokens * d_in**2 + d_in**3 / 3 + d_in**2 * d_out
                statistics = max(statistics, 3 * 4 * d_in**2 + 4 * 4 * d_in * d_out)
    activations = tokens * checkpoint.config.d_model * jnp.dtype(dtype).itemsize
    carried = activations + carry_allowance(activations) if tokens else 0
    peak = peak_memory_bytes() + 8 * max(by_unit.values()) + carried + statistics
    sizes = {path: math.prod(shape.shape) for path, shape in checkpoint.shapes.items()}
    sparsity = trees.Sparsity(
        zeros=sum(k.zeros for k in kernels),
        prunable_parameters=sum(sizes[path] for path in prunable(checkpoint, kernels)),
        total_parameters=sum(sizes.values()),
    )
    return Plan(kernels=kernels, sparsity=sparsity, tokens=tokens, flops=flops, peak_memory_bytes=peak)


def carry_allowance(activation_bytes: int) -> int:
    """Bytes that the values between two stages may take over all calibration tokens.

    Where they would take more, they are recomputed from the last values that were kept.
    """
    return activation_bytes + 2**29


def _sharing(kernels: Iterable[Kernel]) -> dict[tuple[str, int, int], list[Kernel]]:
    """Kernels by what they most likely share: unit, stage and number of inputs."""
    groups: dict[tuple[str, int, int], list[Kernel]] = {}
    for k in kernels:
        groups.setdefault((k.unit, k.stage, k.d_in), []).append(k)
    return groups


@functools.lru_cache(maxsize=64)
def _matmuls(function: Callable, shapes: tuple, d_model: int) -> tuple[ParamMatmul, ...]:
    params = trees.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in shapes})
    return matmuls(function, params, jax.ShapeDtypeStruct((1, 8, d_model), jnp.float32))

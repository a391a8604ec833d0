"""Between a checkpoint and the training loop: weights with equal blocks stacked, losses over them, and single leaves.

The paths are those of `jprune.models.stacked`: what is trained or frozen of layers 0 to 5 lies below ``blocks/0-5``.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jprune import trees
from jprune.anatomy.kernels import matmul_kernels
from jprune.annotations import Array, Float
from jprune.checkpoints import Checkpoint
from jprune.checkpoints.dtypes import activation_dtype, cast
from jprune.errors import JpruneError
from jprune.models import loss, stacked
from jprune.train import lora
from jprune.train.loop import Batch
from jprune.train.quantise import quantise

PyTree = Any
Sums = tuple[Float[Array, ""], Float[Array, ""]]
BaseDtype = Literal["float32", "bfloat16", "int8"]
TEACHER = "teacher"
"""Where a teacher's parameters are among the frozen ones."""
BASE_DTYPES = ("float32", "bfloat16", "int8")


def read_stacked(
    checkpoint: Checkpoint, runs: stacked.Runs, *, dtype: Any, quantised: Mapping[str, tuple[int, ...]] | None = None
) -> PyTree:
    """All parameters with equal blocks stacked, a leaf at a time.

    Args:
      checkpoint: the model.
      runs: which blocks are stacked.
      dtype: of the leaves.
      quantised: the input axes of the kernels, by path in the model, that are read as int8 instead.
    """

    def read(path: str) -> Any:
        values = np.asarray(checkpoint.read(path))
        if quantised and path in quantised:
            return quantise(jnp.asarray(values), quantised[path])
        return values.astype(dtype)

    leaves: dict[str, Any] = {}
    for path, group in stacked.members(checkpoint.shapes, runs).items():
        parts = [read(p) for p in group]
        leaves[path] = jax.tree.map(_stacked, *parts) if len(group) > 1 else parts[0]
        if jax.device_count() == 1:  # where it will stay; a mesh takes its pieces when training begins
            leaves[path] = jax.tree.map(jnp.asarray, leaves[path])
    return trees.unflatten(leaves)


def _stacked(*parts: Any) -> Any:
    return np.stack(parts) if isinstance(parts[0], np.ndarray) else jnp.stack(parts)


def block_kernels(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The input axes of every kernel of the blocks, by path."""
    return {path: m.in_axes for path, (_, m) in matmul_kernels(checkpoint).items() if path.startswith("blocks/")}


def blockwise_loss(
    checkpoint: Checkpoint,
    around: stacked.Around,
    own: Callable[[PyTree, str], PyTree],
    *,
    distance: Callable[..., Sums] | None = None,
) -> Callable[[PyTree, PyTree, Batch, Any], Sums]:
    """The cross-entropy of a model whose blocks see something of what is trained.

    Args:
      checkpoint: the model.
      around: turns a block f(params, x) into g(params, (own, key or None), x).
      own: (trainable, the key of a run of blocks) -> what these blocks see of it, stacked as the run is.
      distance: what is minimised instead: a loss of (params, the teacher's params, batch, aside), made with the same
        `around`. The teacher's params are in frozen["teacher"].

    Returns:
      A loss of (trainable, frozen, batch, key); nothing is random if key is None.
    """
    language_model = loss.causal_lm(checkpoint.config, around=around, frozen=True)

    def f(trainable: PyTree, frozen: PyTree, batch: Batch, key: Any) -> Sums:
        aside = {
            run: (own(trainable, run), None if key is None else _keys(key, stacked.layers(run)))
            for run in frozen["blocks"]
        }
        if distance is not None:
            return distance(frozen, frozen[TEACHER], batch, aside)
        return language_model(frozen, batch, aside)

    return f


def merge_adapter(
    kernel: np.ndarray, adapters: PyTree, path: str, alpha: float, in_axes: Mapping[str, tuple[int, ...]]
) -> np.ndarray:
    """The kernel at a model's path with what its adapter adds, if it has one; in the kernel's dtype."""
    # Picked out of the stack one by one: merged kernels of a whole model would be a second model in memory.
    adapter = _adapter(adapters, path)
    if adapter is None:
        return kernel
    change = np.asarray(lora.delta(*adapter, alpha, in_axes[path]))
    return cast(kernel.astype(np.float32) + change, kernel.dtype, path)


def compute_dtype(checkpoint: Checkpoint, base: BaseDtype | None) -> Any:
    """bfloat16 or float32; float16 overflows in the gradients of some models."""
    if base is not None and base not in BASE_DTYPES:
        raise JpruneError(f"`base_dtype` is one of {', '.join(BASE_DTYPES)}; got {base!r}")
    if base in ("float32", "bfloat16"):
        return jnp.dtype(base)
    if jax.default_backend() != "cpu" and checkpoint.shapes["embed/embedding"].dtype == jnp.float16:
        return jnp.dtype(jnp.bfloat16)  # takes half of what float32 does
    return jnp.dtype(activation_dtype(checkpoint, None))


def _keys(key: Array, layers: range) -> Array:
    """The random key of every layer of a run; of a single layer, without a leading axis."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(layers))
    return keys if len(layers) > 1 else keys[0]


def leaf(tree: PyTree, path: str) -> Any:
    """The leaf of a model's path in a stacked tree; a KeyError if there is none."""
    if not path.startswith("blocks/"):
        return trees.flatten(tree)[path]
    _, layer, below = path.split("/", 2)
    for name, block in tree.get("blocks", {}).items():
        if int(layer) in stacked.layers(name):
            found = trees.flatten(block)[below]
            return found[int(layer) - stacked.layers(name)[0]] if len(stacked.layers(name)) > 1 else found
    raise KeyError(path)


def _adapter(trainable: PyTree, path: str) -> tuple[Any, Any] | None:
    try:
        return leaf(trainable, f"{path}/a"), leaf(trainable, f"{path}/b")
    except KeyError:
        return None

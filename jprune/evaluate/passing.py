"""Windows of tokens through all blocks of a model that may be larger than memory.

All windows are embedded, then pass block after block: one block's parameters, the hidden states `[n, L, d_model]` and
one micro-batch's intermediates are in memory, and equal blocks compile once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from jprune import devices, trees
from jprune.annotations import Array, Float, Int, Integer
from jprune.errors import JpruneError
from jprune.models.batching import windows_at_once
from jprune.models.weights import Weights
from jprune.trace import matmuls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passed:
    """Windows before the head, in micro-batches."""

    windows: list[Int[Array, "_ _"]]
    """Their tokens, [batch, length]."""
    hidden: list[Float[Array, "_ _ _"]]
    """What the last block gives, [batch, length, d_model]."""
    head: Callable[..., Any]
    head_of: Callable[..., Any]
    """As in `InBlocks`."""
    read: Callable[[], dict[str, Any]]
    """Reads the head's parameters onto the devices: who keeps what passed need not keep these."""
    count: int
    """Windows, without what fills the last micro-batch."""

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        return iter(zip(self.hidden, self.windows, strict=True))


def through_blocks(
    weights: Weights,
    tokens: Integer[np.ndarray, "n length"],
    *,
    batch: int | None = None,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh,
    progress: Callable[[int, int], None] | None = None,
) -> Passed:
    """Windows of tokens passed through a model up to its head.

    Args:
        weights: the model.
        tokens: windows of token ids.
        batch: windows computed at once on each device, by default `windows_at_once`.
        dtype: of parameters, but for those that the model keeps in float32, and of hidden states.
        mesh: the devices, see `jprune.devices`, with the windows shared out.
        progress: called with (done, total) after each block; the head is the last of `total`.

    Raises:
        JpruneError: windows of fewer than two tokens, or ids outside the vocabulary.
    """
    _check(tokens, weights.model.vocab)
    batches = _micro_batches(tokens, batch, mesh)
    return dataclasses.replace(
        pass_blocks(weights, batches, dtype=dtype, mesh=mesh, progress=progress), count=len(tokens)
    )


def pass_blocks(
    weights: Weights,
    batches: Sequence[Int[Array, "_ _"]],
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh,
    progress: Callable[[int, int], None] | None = None,
) -> Passed:
    """Micro-batches of tokens passed through a model up to its head; arguments are those of `through_blocks`.

    Args:
        weights: the model.
        batches: token ids of the vocabulary, on the devices; of as many shapes as programs are to be compiled for.
        dtype: of parameters, but for those that the model keeps in float32, and of hidden states.
        mesh: the devices.
        progress: called with (done, total) after each block.
    """
    model = weights.model

    def placed(tree: Any, function: Callable | None = None, prefix: str = "") -> Any:
        params = trees.flatten(tree)
        del tree
        shapes = tuple((path, np.shape(leaf)) for path, leaf in params.items())
        where = _shardings(function, shapes, model.d_model, mesh)
        cast = {
            p: devices.place(params.pop(p), where[p]).astype(model.dtype_of(prefix + p, dtype)) for p in list(params)
        }
        return trees.unflatten(cast)

    params = placed({"embed": weights.params("embed")})
    hidden = [_jit(model.embed, windows.sharding)(params, windows) for windows in batches]
    del params  # here and below: else it would stay while the next part is read
    for index, function in enumerate(model.blocks):
        params = placed(weights.params(f"blocks/{index}"), function, f"blocks/{index}/")
        for i, x in enumerate(hidden):
            hidden[i] = _jit_in_place(function, batches[i].sharding)(params, x)
        # Computation is asynchronous: without waiting, parameters of blocks still to be computed would pile up.
        jax.block_until_ready(hidden)
        del params
        if progress is not None:
            progress(index + 1, model.layers + 1)
    return Passed(
        windows=list(batches),
        hidden=hidden,
        head=model.head,
        head_of=model.head_of,
        read=lambda: placed({name: weights.params(name) for name in model.head_parts}, model.head),
        count=sum(map(len, batches)),
    )


def check_finite(nll: Float[np.ndarray, " n"], dtype: DTypeLike) -> None:
    """Raises a `JpruneError` where the cross-entropy of a window is no number."""
    if np.isfinite(nll).all():
        return
    window = int(np.flatnonzero(~np.isfinite(nll))[0])
    raise JpruneError(
        f"The cross-entropy of window {window} is {nll[window]} in {jnp.dtype(dtype)}: weights are not finite or "
        "activations overflow. Compute in float32 or bfloat16, and check the checkpoint."
    )


def _check(tokens: np.ndarray, vocab: int) -> None:
    """Out of range ids would not fail: JAX clamps them silently."""
    if tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise JpruneError(
            f"Perplexity needs at least one window of at least two tokens; tokens have shape {tokens.shape}."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise JpruneError(f"Token ids lie in [{low}, {high}], outside the model's vocabulary [0, {vocab}).")


@functools.lru_cache(maxsize=256)
def _shardings(
    function: Callable | None, shapes: tuple[tuple[str, tuple[int, ...]], ...], d_model: int, mesh: Mesh
) -> dict[str, NamedSharding]:
    """Where the parameters of a block lie: its kernels cut along their outputs."""
    outputs: dict[str, tuple[int, ...]] = {}
    if function is not None:
        params = trees.unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes})
        x = jax.ShapeDtypeStruct((1, 8, d_model), jnp.float32)
        outputs = {m.path: m.out_axes for m in matmuls(function, params, x, stacked=True)}
    return {path: devices.kernel(mesh, shape, outputs.get(path, ())) for path, shape in shapes}


def _micro_batches(tokens: np.ndarray, batch: int | None, mesh: Mesh) -> list[Int[Array, "batch length"]]:
    """The windows in micro-batches of one shape, shared out evenly, so that each function compiles once.

    The size is evened out (13 windows, at most 8 at once: 7 and 6), and what the last one lacks is filled with copies
    of the last window: fewer copies than there are micro-batches.
    """
    n, length = tokens.shape
    if batch is None:
        batch = windows_at_once(length)
    if batch < 1:
        raise JpruneError(f"The number of windows in a batch must be at least 1; it is {batch}.")
    data = mesh.shape[devices.DATA]
    count = math.ceil(n / (batch * data))
    size = math.ceil(n / count / data) * data
    padded = np.pad(tokens.astype(np.int32), ((0, count * size - n), (0, 0)), mode="edge")
    return [devices.place(part, devices.batch(mesh, size)) for part in padded.reshape(count, size, length)]


# A model has one function object for equal blocks, so these caches make equal blocks share one compilation.


@functools.lru_cache(maxsize=64)
def _jit(function: Callable, sharding: NamedSharding) -> Callable:
    return jax.jit(devices.within(sharding.mesh, function), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _jit_in_place(function: Callable, sharding: NamedSharding) -> Callable:
    """The output overwrites the hidden states that came in."""
    return jax.jit(devices.within(sharding.mesh, function), donate_argnums=1, out_shardings=sharding)

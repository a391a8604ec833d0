"""Perplexity by the standard protocol of SparseGPT and Wanda, over models larger than memory.

`exp` of the mean over windows of the mean cross-entropy of the L - 1 tokens of each window that follow another in it.
Windows do not overlap, so the first tokens of each are guessed from little: the same text gives a lower perplexity in
longer windows, and a perplexity without its sequence length means nothing.

All windows are embedded, then pass block after block, then the head: one block's parameters, the hidden states
`[n, L, d_model]` and one micro-batch's intermediates are in memory, and equal blocks compile once. The head computes
the logits of `TILE` tokens of the vocabulary at a time, with the softmax online (Milakov and Gimelshein,
arXiv:1805.02867), of so many tokens of text that the float32 logits fit `LOGITS_BYTES`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from jprune import devices, trees
from jprune.annotations import Array, Float, Float64, Int, Integer
from jprune.errors import JpruneError
from jprune.models import decoder
from jprune.models.batching import windows_at_once
from jprune.models.weights import Weights
from jprune.trace import matmuls

LOGITS_BYTES = 2**25
"""Of twice as many, which the C library maps anew for every chunk, a CPU took a fifth longer."""
TILE = 2048
"""Tokens of the vocabulary whose logits are computed at a time: for as many tokens of text they fit a CPU's caches."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
        value: exp of the mean cross-entropy, in nats.
        tokens: tokens in the windows, `windows * sequence_length`; of each window all but the first are predicted.
        sequence_length: tokens a window, the context within which they are predicted.
        windows: number of windows.
    """

    value: float
    tokens: int
    sequence_length: int
    windows: int


def perplexity(
    weights: Weights,
    tokens: Integer[np.ndarray, "n length"],
    *,
    batch: int | None = None,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `weights` on `tokens`; arguments and errors are those of `mean_nll`."""
    nll = mean_nll(weights, tokens, batch=batch, dtype=dtype, mesh=mesh, progress=progress)
    mean = float(nll.mean())
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value=value, tokens=tokens.size, sequence_length=tokens.shape[1], windows=tokens.shape[0])


def mean_nll(
    weights: Weights,
    tokens: Integer[np.ndarray, "n length"],
    *,
    batch: int | None = None,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float64[np.ndarray, " n"]:
    """Mean cross-entropy, in nats, of the tokens of each window given those before them in it.

    Args:
        weights: the model.
        tokens: windows of token ids.
        batch: windows computed at once on each device, by default `windows_at_once`.
        dtype: of parameters and hidden states in the computation; the cross-entropy is always float32.
        mesh: the devices, see `jprune.devices`; by default all of them, with the windows shared out.
        progress: called with (done, total) after each block and after the head.

    Raises:
        JpruneError: windows of fewer than two tokens, ids outside the vocabulary, or a result that is not finite.
    """
    _check(tokens, weights.config.vocab)
    with jax.default_matmul_precision("highest"):  # float32 means float32: no TF32, no bfloat16 passes
        mesh = mesh or devices.make_mesh()
        return _mean_nll(weights, tokens, _micro_batches(tokens, batch, mesh), dtype, mesh, progress)


def _mean_nll(
    weights: Weights,
    tokens: Integer[np.ndarray, "n length"],
    batches: list[Int[Array, "batch length"]],
    dtype: DTypeLike,
    mesh: Mesh,
    progress: Callable[[int, int], None] | None,
) -> Float64[np.ndarray, " n"]:
    config = weights.config

    def placed(tree: Any, function: Callable | None = None) -> Any:
        params = trees.flatten(tree)
        del tree
        shapes = tuple((path, np.shape(leaf)) for path, leaf in params.items())
        where = _shardings(function, shapes, config.d_model, mesh)
        return trees.unflatten({p: devices.place(params.pop(p), where[p]).astype(dtype) for p in list(params)})

    def done(count: int) -> None:
        if progress is not None:
            progress(count, config.layers + 1)

    params = placed({"embed": weights.params("embed")})
    windows_lie = batches[0].sharding
    embed = _jit(decoder.embed(config), windows_lie)
    hidden = [embed(params, windows) for windows in batches]
    del params  # here and below: else it would stay while the next part is read
    for index in range(config.layers):
        function = decoder.block(config, index)
        params = placed(weights.params(f"blocks/{index}"), function)
        block = _jit_in_place(function, windows_lie)
        for i, x in enumerate(hidden):
            hidden[i] = block(params, x)
        # Computation is asynchronous: without waiting, parameters of blocks still to be computed would pile up.
        jax.block_until_ready(hidden)
        del params
        done(index + 1)
    head = decoder.head(config)
    params = placed({name: weights.params(name) for name in decoder.head_parts(config)}, head)
    head_nll = _jit_nll(head, mesh)
    nll = np.concatenate([head_nll(params, x, windows) for x, windows in zip(hidden, batches)])
    nll = nll[: len(tokens)].astype(np.float64)
    if not np.isfinite(nll).all():
        window = int(np.flatnonzero(~np.isfinite(nll))[0])
        raise JpruneError(
            f"The cross-entropy of window {window} is {nll[window]} in {jnp.dtype(dtype)}: weights are not finite or "
            "activations overflow. Compute in float32 or bfloat16, and check the checkpoint."
        )
    done(config.layers + 1)
    return nll


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


def _nll(
    head: Callable,
    shares: int,
    width: int | None,
    params: dict[str, Any],
    x: Float[Array, "batch length d_model"],
    tokens: Int[Array, "batch length"],
) -> Float[Array, " batch"]:
    """Mean cross-entropy of each window from the last block's output, the windows in `shares` side by side.

    `width` is how many tokens of the vocabulary are taken at a time, None for all of them.
    """
    batch, length, d_model = x.shape
    rows = batch // shares * (length - 1)
    vocab = jax.eval_shape(head, params, x).shape[-1]
    tiles = 1 if width is None else math.ceil(vocab / width)
    width = math.ceil(vocab / tiles)
    chunks = math.ceil(rows / max(1, LOGITS_BYTES // (4 * width)))
    size = math.ceil(rows / chunks)
    fill = (0, 0), (0, chunks * size - rows)
    inputs = jnp.pad(x[:, :-1].reshape(shares, rows, d_model), (*fill, (0, 0)))
    targets = jnp.pad(tokens[:, 1:].reshape(shares, rows), fill)

    def chunk(part: tuple[Array, Array]) -> Array:
        h, target = part

        def tile(state: tuple[Array, Array, Array], number: Array) -> tuple[tuple[Array, Array, Array], None]:
            most, total, hit = state
            first = jnp.minimum(number * width, vocab - width)  # the last one begins within the one before it
            logits = head(decoder.head_of(params, first, width), h)
            place = (target - first)[..., None]
            own = jnp.take_along_axis(logits, jnp.clip(place, 0, width - 1), axis=-1)
            hit = jnp.where((place >= 0) & (place < width), own, hit[..., None])[..., 0]
            if vocab % width:
                logits = jnp.where(jnp.arange(width) + first >= number * width, logits, -jnp.inf)
            higher = jnp.maximum(most, jnp.max(logits, axis=-1))
            total = total * jnp.exp(most - higher) + jnp.sum(jnp.exp(logits - higher[..., None]), axis=-1)
            return (higher, total, hit), None

        zero = jnp.zeros(target.shape, jnp.float32)
        (most, total, hit), _ = jax.lax.scan(tile, (zero - jnp.inf, zero, zero), jnp.arange(tiles))
        return most + jnp.log(total) - hit

    parts = (inputs.reshape(shares, chunks, size, d_model), targets.reshape(shares, chunks, size))
    nll = jax.lax.map(chunk, jax.tree.map(lambda part: jnp.swapaxes(part, 0, 1), parts))
    nll = jnp.swapaxes(nll, 0, 1).reshape(shares, chunks * size)[:, :rows]
    return nll.reshape(batch, length - 1).mean(axis=1)


# The decoder returns one function object for equal blocks, so these caches make equal blocks share one compilation.


@functools.lru_cache(maxsize=64)
def _jit(function: Callable, sharding: NamedSharding) -> Callable:
    return jax.jit(function, out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _jit_in_place(function: Callable, sharding: NamedSharding) -> Callable:
    """The output overwrites the hidden states that came in."""
    return jax.jit(function, donate_argnums=1, out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _jit_nll(head: Callable, mesh: Mesh) -> Callable:
    # A kernel that is cut along the vocabulary stays where it lies: its tiles would go from device to device.
    width = TILE if mesh.shape[devices.MODEL] == 1 else None
    nll = functools.partial(_nll, head, mesh.shape[devices.DATA], width)
    return jax.jit(nll, out_shardings=devices.replicated(mesh))

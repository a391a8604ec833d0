"""Perplexity by the standard protocol of SparseGPT and Wanda, over models larger than memory.

`exp` of the mean over windows of the mean cross-entropy of the L - 1 tokens of each window that follow another in it.
Windows do not overlap, so the first tokens of each are guessed from little: the same text gives a lower perplexity in
longer windows, and a perplexity without its sequence length means nothing.

All windows pass block after block (`jprune.evaluate.passing`), then the head, which computes
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
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jprune import devices
from jprune.annotations import Array, Float, Float64, Int, Integer
from jprune.evaluate.passing import check_finite, through_blocks
from jprune.evaluate.rows import over_rows
from jprune.models.weights import Weights

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
    with jax.default_matmul_precision("highest"):  # float32 means float32: no TF32, no bfloat16 passes
        mesh = mesh or devices.make_mesh()
        passed = through_blocks(weights, tokens, batch=batch, dtype=dtype, mesh=mesh, progress=progress)
        head_nll, params = _jit_nll(passed.head, passed.head_of, mesh), passed.read()
        nll = np.concatenate([head_nll(params, x, windows) for x, windows in passed])
    nll = nll[: passed.count].astype(np.float64)
    check_finite(nll, dtype)
    if progress is not None:
        progress(weights.model.layers + 1, weights.model.layers + 1)
    return nll


def _nll(
    head: Callable,
    head_of: Callable,
    shares: int,
    width: int | None,
    params: dict[str, Any],
    x: Float[Array, "batch length d_model"],
    tokens: Int[Array, "batch length"],
) -> Float[Array, " batch"]:
    """Mean cross-entropy of each window from the last block's output, the windows in `shares` side by side.

    `width` is how many tokens of the vocabulary are taken at a time, None for all of them.
    """
    vocab = jax.eval_shape(head, params, x).shape[-1]
    tiles = 1 if width is None else math.ceil(vocab / width)
    width = math.ceil(vocab / tiles)

    def of_rows(h: Array, target: Array) -> tuple[Array]:
        def tile(state: tuple[Array, Array, Array], number: Array) -> tuple[tuple[Array, Array, Array], None]:
            most, total, hit = state
            first = jnp.minimum(number * width, vocab - width)  # the last one begins within the one before it
            logits = head(head_of(params, first, width), h)
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
        return (most + jnp.log(total) - hit,)

    (nll,) = over_rows(of_rows, (x[:, :-1], tokens[:, 1:]), shares=shares, most=LOGITS_BYTES // (4 * width))
    return nll.mean(axis=1)


@functools.lru_cache(maxsize=64)
def _jit_nll(head: Callable, head_of: Callable, mesh: Mesh) -> Callable:
    # A kernel that is cut along the vocabulary stays where it lies: its tiles would go from device to device.
    width = TILE if mesh.shape[devices.MODEL] == 1 else None
    nll = functools.partial(_nll, head, head_of, mesh.shape[devices.DATA], width)
    return jax.jit(nll, out_shardings=devices.replicated(mesh))

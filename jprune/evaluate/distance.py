"""How far the predictions of a pruned model are from the dense one's on the same windows, beyond memory's size.

Perplexity hides what changes: a model can lose as much on some tokens as it gains on others ("Accuracy is not all you
need", Dutta et al. 2024, https://arxiv.org/abs/2407.09141). Of every predicted token

- the Kullback-Leibler divergence KL(dense || pruned) of the two distributions over the vocabulary, in nats,
- and whether both models hold the same token for the most likely one.

Both models pass block by block (`jprune.evaluate.passing`), one after the other: hidden states of both are in memory,
and in the end both heads, never a whole model, nor a head beside a block. The heads see few enough tokens at a time
that the logits of both fit `LOGITS_BYTES`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jprune import devices
from jprune.annotations import Array, Bool, Float, Float64, Int, Integer
from jprune.errors import JpruneError
from jprune.evaluate.passing import Passed, check_finite, through_blocks
from jprune.evaluate.rows import over_rows
from jprune.models.weights import Weights

LOGITS_BYTES = 2**26
"""Of the logits of two models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """What two models predict for the tokens of the same windows, n of L; of each all but the first are predicted."""

    nll: Float64[np.ndarray, " n"]
    """Mean cross-entropy of each window under the model that is held against the reference, in nats."""
    divergence: Float[np.ndarray, "n predicted"]
    """KL(reference || model) of each predicted token, in nats."""
    agrees: Bool[np.ndarray, "n predicted"]
    """Whether both hold the same token for the most likely one; the first of those that are equally likely."""


class Reference:
    """A model that others are held against, with its windows passed through its blocks.

    Args:
        weights: the model.
        tokens: windows of token ids.
        dtype: of parameters and hidden states in the computation; distances are always float32.
        mesh: the devices, see `jprune.devices`; by default all of them, with the windows shared out.
        progress: called with (done, total) after each block.

    Raises:
        JpruneError: as `jprune.evaluate.perplexity.mean_nll` does.
    """

    def __init__(
        self,
        weights: Weights,
        tokens: Integer[np.ndarray, "n length"],
        *,
        dtype: DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        self._tokens, self._dtype, self._mesh = tokens, dtype, mesh or devices.make_mesh()
        self._vocab = weights.model.vocab
        with jax.default_matmul_precision("highest"):
            self._own = through_blocks(weights, tokens, dtype=dtype, mesh=self._mesh, progress=progress)

    def to(self, weights: Weights, *, progress: Callable[[int, int], None] | None = None) -> Distance:
        """The distance to another model.

        Raises:
            JpruneError: it has another vocabulary, or a result that is not finite.
        """
        if weights.model.vocab != self._vocab:
            raise JpruneError(
                f"expected two models of one vocabulary, got {self._vocab} tokens and {weights.model.vocab}: what "
                "they predict cannot be held against each other"
            )
        with jax.default_matmul_precision("highest"):
            other = through_blocks(weights, self._tokens, dtype=self._dtype, mesh=self._mesh, progress=progress)
            return self._measured(other)

    def to_itself(self) -> Distance:
        """The distance to the same model: none, and its own cross-entropies."""
        with jax.default_matmul_precision("highest"):
            return self._measured(self._own)

    def _measured(self, other: Passed) -> Distance:
        measure = _jit_distance(self._own.head, other.head, self._mesh)
        params = self._own.read()
        theirs = params if other is self._own else other.read()
        found = [
            measure(params, theirs, x, y, windows) for (x, windows), y in zip(self._own, other.hidden, strict=True)
        ]
        nll, divergence, agrees = (np.concatenate(each)[: other.count] for each in zip(*found))
        means = nll.astype(np.float64).mean(axis=1)
        check_finite(means, self._dtype)
        return Distance(nll=means, divergence=divergence, agrees=agrees)


def _distance(
    heads: tuple[Callable, Callable],
    shares: int,
    own: dict[str, Any],
    other: dict[str, Any],
    x: Float[Array, "batch length d_model"],
    y: Float[Array, "batch length _"],
    tokens: Int[Array, "batch length"],
) -> tuple[Float[Array, "batch predicted"], Float[Array, "batch predicted"], Bool[Array, "batch predicted"]]:
    """Cross-entropy, divergence and agreement of every predicted token, the windows in `shares` side by side."""
    vocab = jax.eval_shape(heads[0], own, x).shape[-1]

    def of_rows(x: Array, y: Array, target: Array) -> tuple[Array, Array, Array]:
        p, q = (head(params, h).astype(jnp.float32) for head, params, h in zip(heads, (own, other), (x, y)))
        agrees = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
        p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
        nll = -jnp.take_along_axis(q, target[..., None], axis=-1)[..., 0]
        return nll, jnp.sum(jnp.exp(p) * (p - q), axis=-1), agrees

    values = (x[:, :-1], y[:, :-1], tokens[:, 1:])
    nll, divergence, agrees = over_rows(of_rows, values, shares=shares, most=LOGITS_BYTES // (2 * 4 * vocab))
    return nll, divergence, agrees


@functools.lru_cache(maxsize=64)
def _jit_distance(own: Callable, other: Callable, mesh: Mesh) -> Callable:
    distance = functools.partial(_distance, (own, other), mesh.shape[devices.DATA])
    return jax.jit(distance, out_shardings=devices.replicated(mesh))

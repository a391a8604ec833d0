"""What pruning one block alone does to the predictions of a model, for every block in one pass.

Beside the hidden states of the dense model go those of as many models as blocks have been passed, each with one of them
pruned and all that follows dense. So half as many blocks are computed as there are pairs of them; for few tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jprune import devices, trees
from jprune.anatomy.parts import Part
from jprune.annotations import Array, Float
from jprune.pipeline.forecast import programs
from jprune.pipeline.job import TRIED, Job
from jprune.pipeline.oneshot.blocks import embedding


class Damage:
    """The hidden states of a dense model, and of those in which one block is pruned.

    Args:
      job: the pass over the dense model.
    """

    def __init__(self, job: Job):
        assert job.calibration is not None
        self._job = job
        windows, length = TRIED
        tokens = job.calibration.tokens[:windows, :length]
        self._sharding = devices.batch(job.mesh, len(tokens))
        self._dense = embedding(job)(tokens, self._sharding)
        self._pruned: dict[str, jax.Array] = {}

    def pass_through(self, part: Part, params: dict[str, jax.Array], pruned: dict[str, jax.Array]) -> None:
        """The next block.

        Args:
          part: the block.
          params: its parameters.
          pruned: those of them that pruning would change; none if the block is to be left alone.
        """
        run = programs.forward(part.function, self._sharding)
        whole = trees.unflatten(params)
        before = self._dense
        # One after the other: what is computed for all at once would take memory.
        self._pruned = {name: jax.block_until_ready(run(whole, x)) for name, x in self._pruned.items()}
        self._dense = run(whole, before)
        if pruned:
            self._pruned[part.name] = run(trees.unflatten(params | pruned), before)

    def all(self) -> dict[str, float]:
        """The damage of every block that was pruned: the divergence from the dense model, in nats a token."""
        checkpoint = self._job.checkpoint
        everywhere = devices.replicated(self._job.mesh)
        params = {
            name: jax.tree.map(lambda value: devices.place(value, everywhere), checkpoint.params(name))
            for name in checkpoint.model.head_parts
        }
        measure = _divergence(checkpoint.model.head)
        return {name: float(measure(params, self._dense, x)) for name, x in self._pruned.items()}


@functools.lru_cache(maxsize=8)
def _divergence(head: Callable) -> Any:
    def divergence(
        params: Any, dense: Float[Array, "B T d_model"], other: Float[Array, "B T d_model"]
    ) -> Float[Array, ""]:
        def of_window(pair: tuple[Array, Array]) -> Array:
            p, q = (jax.nn.log_softmax(head(params, x[None])[0].astype(jnp.float32)) for x in pair)
            return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))

        return jnp.mean(jax.lax.map(of_window, (dense, other)))

    return jax.jit(divergence)

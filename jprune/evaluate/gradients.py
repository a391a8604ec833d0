"""Gradients of the language-modelling loss, one block at a time: a backward pass that never holds the model.

The forward pass keeps the input of every block on the host (calibration for gradients is some ten short texts). The
backward pass then goes from the head down: it reads a block's weights, recomputes the block from its input, turns the
gradient of its output into those of its weights and of its input, shows the former to the caller, and drops them. So a
model needs the memory of one block's weights and gradients, in float32 whatever its own dtype is, where the original
LLM-Pruner holds all weights and all gradients (80 GB for 7 B parameters).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.annotations import Array, Float, Int, Int32
from jprune.models import decoder
from jprune.models.config import DecoderConfig
from jprune.models.weights import NativeWeights

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    """What is known of the parameters of one part (a block, or the ends of the model) after the backward pass."""

    prefix: str
    """What their paths in the model begin with; "" for the ends: embedding, final norm and head."""
    params: PyTree
    """The parameters, float32."""
    mean: PyTree
    """Mean over the examples of the gradient of an example's loss: the gradient of the mean loss."""
    square: PyTree | None
    """Mean over the examples of the squared gradient of an example's loss; None if not asked for."""


def stream(
    weights: NativeWeights,
    tokens: Int32[np.ndarray, "n L"],
    *,
    visit: Callable[[Gradients], None],
    squares: bool = False,
    ends: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Shows the gradients of every block to `visit`, from the last to the first, then those of the ends if asked.

    The loss of an example is the mean cross-entropy of its L - 1 predicted tokens, in nats.

    Args:
      weights: the model, read part by part.
      tokens: n examples.
      visit: called with the gradients of one unit at a time; what it does not keep is gone.
      squares: whether the mean of the squared gradients of the single examples is wanted as well.
      ends: whether the gradients of embedding, final norm and head are wanted.
      progress: called with blocks done and the total, forward and backward counted.

    Returns:
      The mean loss.
    """
    config = weights.config
    steps = iter(range(1, 2 * config.layers + 3))

    def done() -> None:
        progress(next(steps), 2 * config.layers + 2)

    head_params = _wide(_ends(weights, config, with_embedding=config.tied))
    embed_params = head_params if config.tied else _wide({"embed": weights.params("embed")})
    x = np.asarray(jax.jit(decoder.embed(config))(embed_params, tokens))
    inputs = []
    for i in range(config.layers):
        inputs.append(x)
        x = np.asarray(_forward(decoder.block(config, i))(_block(weights, i), x))
        done()
    loss, dy = _head_gradient(decoder.head(config))(head_params, x, tokens)
    done()
    del head_params, embed_params
    for i in reversed(range(config.layers)):
        params = _block(weights, i)
        mean, square, dy = _backward(decoder.block(config, i), squares)(params, inputs.pop(), dy)
        visit(Gradients(prefix=f"blocks/{i}", params=params, mean=mean, square=square))
        del params, mean, square
        done()
    if ends:
        params = _wide(_ends(weights, config, with_embedding=True))
        mean, square = _ends_backward(decoder.embed(config), decoder.head(config), squares)(params, x, tokens, dy)
        visit(Gradients(prefix="", params=params, mean=mean, square=square))
    done()
    return float(loss)


def _block(weights: NativeWeights, index: int) -> PyTree:
    return _wide(weights.params(f"blocks/{index}"))


def _ends(weights: NativeWeights, config: DecoderConfig, *, with_embedding: bool) -> PyTree:
    names = dict.fromkeys([*decoder.head_parts(config), *(["embed"] if with_embedding else [])])
    return {name: weights.params(name) for name in names}


def _wide(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), params)


def example_loss(
    head: Callable, params: PyTree, x: Float[Array, "L d_model"], tokens: Int[Array, " L"]
) -> Float[Array, ""]:
    """Mean cross-entropy in nats of the tokens after the first, given the last block's output."""
    logits = head(params, x[None, :-1])[0]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1))


# Each of these is compiled once per function and shapes; equal blocks are one function.


@functools.lru_cache(maxsize=64)
def _forward(block: Callable) -> Callable:
    return jax.jit(block)


@functools.lru_cache(maxsize=8)
def _head_gradient(head: Callable) -> Callable:
    """(params, x [n, L, d], tokens [n, L]) -> mean loss, and the gradient of each example's loss by x."""

    @jax.jit
    def run(params: PyTree, x: Array, tokens: Array) -> tuple[Array, Array]:
        def one(example: tuple[Array, Array]) -> tuple[Array, Array]:
            hidden, ids = example
            return jax.value_and_grad(lambda h: example_loss(head, params, h, ids))(hidden)

        losses, dy = jax.lax.map(one, (x, tokens))
        return jnp.mean(losses), dy

    return run


@functools.lru_cache(maxsize=64)
def _backward(block: Callable, squares: bool) -> Callable:
    """(params, x [n, L, d], dy [n, L, d]) -> mean gradient, mean squared gradient or None, dx [n, L, d]."""

    @functools.partial(jax.jit, donate_argnums=(2,))
    def run(params: PyTree, x: Array, dy: Array) -> tuple[PyTree, PyTree | None, Array]:
        def gradient(example: tuple[Array, Array]) -> tuple[PyTree, Array]:
            hidden, cotangent = example
            _, pull = jax.vjp(lambda p, h: block(p, h[None])[0], params, hidden)
            return pull(cotangent)

        return _accumulate(gradient, params, (x, dy), squares)

    return run


@functools.lru_cache(maxsize=8)
def _ends_backward(embed: Callable, head: Callable, squares: bool) -> Callable:
    """The backward pass of embedding, final norm and head; a tied embedding's gradients are added per example."""

    @jax.jit
    def run(params: PyTree, x: Array, tokens: Array, dy: Array) -> tuple[PyTree, PyTree | None]:
        def gradient(example: tuple[Array, Array, Array]) -> tuple[PyTree, Array]:
            hidden, ids, cotangent = example
            top = jax.grad(lambda p: example_loss(head, p, hidden, ids))(params)
            _, pull = jax.vjp(lambda p: embed(p, ids[None])[0], params)
            (bottom,) = pull(cotangent)
            return jax.tree.map(jnp.add, top, bottom), jnp.zeros(())

        mean, square, _ = _accumulate(gradient, params, (x, tokens, dy), squares)
        return mean, square

    return run


def _accumulate(
    gradient: Callable[[Any], tuple[PyTree, Array]], params: PyTree, examples: Any, squares: bool
) -> tuple[PyTree, PyTree | None, Array]:
    """Means over the examples of the gradients and of their squares, and the second results of all examples."""
    n = jax.tree.leaves(examples)[0].shape[0]
    zeros = jax.tree.map(jnp.zeros_like, params)

    def add(sums: tuple[PyTree, PyTree], example: Any) -> tuple[tuple[PyTree, PyTree], Array]:
        total, total_square = sums
        g, rest = gradient(example)
        total = jax.tree.map(lambda s, x: s + x / n, total, g)
        if squares:
            total_square = jax.tree.map(lambda s, x: s + x * x / n, total_square, g)
        return (total, total_square), rest

    (mean, square), rest = jax.lax.scan(add, (zeros, zeros if squares else None), examples)
    return mean, square, rest

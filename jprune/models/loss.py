"""Losses of language models, with head and cross-entropy over a few tokens at a time.

The logits of a micro-batch ``[B, L, vocab]`` would often be the largest array of all, and their gradient as large.
Here the head runs over chunks of time, rematerialised: at no moment are there more float32 logits than `LOGITS_BYTES`
(or those of B tokens, if these are more). Chunks cut time and not the batch, so that a batch sharded over devices stays
where it is.

A batch is ``{"tokens": int32 [B, L], "weights": float32 [B, L]}``: ``weights[b, t]`` is the weight of the loss of
predicting ``tokens[b, t]`` from those before it, so ``weights[:, 0]`` counts for nothing. Losses are returned as (sum
of weighted losses, sum of weights): gradients of sums add over micro-batches, whatever number of tokens each has.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jprune.annotations import Array, Float, Int
from jprune.errors import JpruneError
from jprune.models import decoder, stacked
from jprune.models.config import DecoderConfig
from jprune.train import distill

PyTree = Any
Batch = Mapping[str, Array]
Sums = tuple[Float[Array, ""], Float[Array, ""]]

LOGITS_BYTES = 2**26


def causal_lm(
    config: DecoderConfig, *, around: stacked.Around | None = None, frozen: bool = False
) -> Callable[..., Sums]:
    """``f(params, batch, aside=None) -> (sum of weighted cross-entropies in nats, sum of weights)``.

    Args:
      config: the decoder's.
      around: see `stacked.hidden`, also for `aside`. Params may be stacked or not.
      frozen: see `stacked.hidden`.
    """
    hidden, head = stacked.hidden(config, around=around, frozen=frozen), decoder.head(config)

    def loss(params: PyTree, batch: Batch, aside: PyTree = None) -> Sums:
        x = hidden(params, batch["tokens"], aside)

        def chunk(x: Array, targets: Array, weights: Array) -> Array:
            return jnp.sum(cross_entropy(head(params, x), targets) * weights)

        return over_time(chunk, x, batch, vocab=config.vocab), jnp.sum(batch["weights"][:, 1:])

    return loss


def distillation(
    config: DecoderConfig,
    teacher: DecoderConfig,
    *,
    temperature: float = 1.0,
    teacher_weight: float = 1.0,
    hidden_weight: float = 0.0,
    around: stacked.Around | None = None,
    frozen: bool = False,
) -> Callable[..., Sums]:
    """``f(params, teacher's params, batch, aside=None) -> (loss sum, weight sum)`` of learning from a teacher.

    The loss of a token is ``(1 - teacher_weight) * cross-entropy + teacher_weight * KL + hidden_weight * distance``:
    the forward divergence of the logits at `temperature` (`distill.forward_kl`), and the mean over the student's blocks
    of `distill.hidden_distance` to the teacher's. Where the student has fewer blocks, they are matched by their depth.
    `around` and `frozen` are of the student, see `stacked.hidden`.

    Raises:
      JpruneError: vocabularies differ, or hidden sizes do although hidden states are to be compared.
    """
    if config.vocab != teacher.vocab:
        raise JpruneError(
            f"the teacher's vocabulary has {teacher.vocab} tokens and the model's {config.vocab}: distillation "
            "compares their logits token by token; give a teacher with the same tokenizer, such as the model before "
            "pruning"
        )
    if hidden_weight and config.d_model != teacher.d_model:
        raise JpruneError(
            f"the hidden size is {config.d_model} and the teacher's {teacher.d_model}: hidden states can only be "
            "compared where they are equal; leave the hidden loss out"
        )
    every = bool(hidden_weight)
    student_hidden = stacked.hidden(config, around=around, frozen=frozen, every=every)
    teacher_hidden = stacked.hidden(teacher, every=every)
    student_head, teacher_head = decoder.head(config), decoder.head(teacher)
    matched = [math.ceil((i + 1) * teacher.layers / config.layers) - 1 for i in range(config.layers)]

    def loss(params: PyTree, teacher_params: PyTree, batch: Batch, aside: PyTree = None) -> Sums:
        x, y = student_hidden(params, batch["tokens"], aside), teacher_hidden(teacher_params, batch["tokens"])
        extra = jnp.zeros((), jnp.float32)
        if every:
            (x, all_x), (y, all_y) = x, y
            distance = distill.hidden_distance(all_x, all_y[jnp.asarray(matched)])  # [layers, B, L]
            # The state at t - 1 is what predicts token t.
            extra = hidden_weight * jnp.sum(jnp.mean(distance, axis=0)[:, :-1] * batch["weights"][:, 1:])

        def chunk(x: Array, y: Array, targets: Array, weights: Array) -> Array:
            logits = student_head(params, x)
            each = teacher_weight * distill.forward_kl(logits, teacher_head(teacher_params, y), temperature)
            if teacher_weight != 1.0:
                each += (1.0 - teacher_weight) * cross_entropy(logits, targets)
            return jnp.sum(each * weights)

        return over_time(chunk, (x, y), batch, vocab=2 * config.vocab) + extra, jnp.sum(batch["weights"][:, 1:])

    return loss


def cross_entropy(logits: Float[Array, "... vocab"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """-log softmax(logits)[target], in nats."""
    # Not by take_along_axis, whose gradient is a scatter into a second array as large as the logits.
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0), axis=-1)


def over_time(chunk: Callable[..., Array], states: PyTree, batch: Batch, *, vocab: int) -> Float[Array, ""]:
    """The sum over chunks of time of ``chunk(*states, targets, weights)``, each rematerialised.

    Args:
      chunk: gives a scalar for hidden states ``[B, t, d_model]``, and the tokens and weights ``[B, t]`` that they
        predict.
      states: hidden states ``[B, L, d_model]``, one array or a tuple.
      batch: tokens and weights ``[B, L]``; the state at t - 1 meets the token at t.
      vocab: float32 logits that a token takes.
    """
    states = states if isinstance(states, tuple) else (states,)
    size, length = batch["tokens"].shape
    at_once = max(1, LOGITS_BYTES // (4 * vocab * size))
    count = max(1, math.ceil((length - 1) / at_once))
    step = math.ceil((length - 1) / count)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * step - (length - 1)), *((0, 0),) * (x.ndim - 2)))  # padding weighs nothing
        return jnp.moveaxis(x.reshape(size, count, step, *x.shape[2:]), 1, 0)

    parts = tuple(cut(x[:, :-1]) for x in states), cut(batch["tokens"][:, 1:]), cut(batch["weights"][:, 1:])
    again = jax.checkpoint(chunk, prevent_cse=False)

    def add(total: Array, part: tuple) -> tuple[Array, None]:
        states, targets, weights = part
        return total + again(*states, targets, weights), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)[0]

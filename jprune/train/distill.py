"""Learning from a teacher: distances between logits and between hidden states, token by token.

Logits: Hinton, Vinyals, Dean (arXiv:1503.02531): the forward divergence at a temperature T,
``T^2 KL(softmax(teacher / T) || softmax(student / T))``; the factor keeps the size of the gradient when T changes.

Hidden states: as in SquareHead (Kurtic et al., arXiv:2310.06927), the squared distance relative to the teacher's own
square, so that layers with large activations do not drown the others; here per token, where the authors divide means
over the batch.
"""

import jax
import jax.numpy as jnp

from jprune.annotations import Array, Float


def forward_kl(
    student: Float[Array, "... vocab"], teacher: Float[Array, "... vocab"], temperature: float = 1.0
) -> Float[Array, "..."]:
    """``T^2 sum_v p_v (log p_v - log q_v)`` in nats, p the teacher's and q the student's softmax at temperature T."""
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature, axis=-1)
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def hidden_distance(
    student: Float[Array, "... d_model"], teacher: Float[Array, "... d_model"], eps: float = 1e-6
) -> Float[Array, "..."]:
    """``mean (s - t)^2 / (mean t^2 + eps)`` over the last axis, in float32."""
    s, t = student.astype(jnp.float32), teacher.astype(jnp.float32)
    return jnp.mean(jnp.square(s - t), axis=-1) / (jnp.mean(jnp.square(t), axis=-1) + eps)

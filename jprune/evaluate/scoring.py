"""How likely a model finds given tokens after others: what tasks of several choices are scored by.

Sequences of many lengths pass through a model block by block, as windows do (`jprune.evaluate.passing`): those of
about one length together, filled up on the right, which no token before it sees.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jprune import devices
from jprune.annotations import Array, Bool, Float, Float64, Int
from jprune.errors import JpruneError
from jprune.evaluate.passing import pass_blocks
from jprune.evaluate.rows import over_rows
from jprune.models.batching import windows_at_once
from jprune.models.weights import Weights

LOGITS_BYTES = 2**25
BUCKET = 32
"""Lengths are rounded up to a multiple of it: so many programs are compiled for each kind of block."""


def scores(
    weights: Weights,
    sequences: Sequence[Sequence[int]],
    counts: Sequence[int],
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Float64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The log-likelihood of the last tokens of each sequence given those before them.

    Args:
        weights: the model.
        sequences: token ids; one more than the context holds, since the last is predicted only.
        counts: how many tokens of each are predicted, from its end; at least one stands before them.
        dtype: of parameters and hidden states in the computation.
        mesh: the devices, see `jprune.devices`; by default all of them.
        progress: called with (done, total) after each block.

    Returns:
        The sums of the logarithms of the probabilities, in nats; and whether each of these tokens is the likeliest in
        its place.

    Raises:
        JpruneError: a sequence is too short or too long, or has ids outside the vocabulary; a result is not finite.
    """
    context, vocab = weights.model.context, weights.model.vocab
    for sequence, count in zip(sequences, counts, strict=True):
        if not 0 < count < len(sequence) <= context + 1:
            raise JpruneError(
                f"expected sequences of 2 to {context + 1} tokens of which some are predicted, got one of "
                f"{len(sequence)} with {count} predicted"
            )
        if min(sequence) < 0 or max(sequence) >= vocab:
            raise JpruneError(f"Token ids lie in [{min(sequence)}, {max(sequence)}], outside the model's [0, {vocab}).")
    mesh = mesh or devices.make_mesh()
    if not sequences:
        return np.zeros(0), np.zeros(0, bool)
    batches = _batches([len(s) - 1 for s in sequences], context, mesh.shape[devices.DATA])
    inputs, targets = [], []
    for length, members in batches:
        rows = np.zeros((2, len(members), length), np.int32)
        for row, index in enumerate(members):
            sequence = sequences[index]
            rows[0, row, : len(sequence) - 1] = sequence[:-1]
            rows[1, row, : len(sequence) - 1] = sequence[1:]
        where = devices.batch(mesh, len(members))
        inputs.append(devices.place(rows[0], where))
        targets.append(devices.place(rows[1], where))
    sums, likeliest = np.zeros(len(sequences)), np.zeros(len(sequences), bool)
    with jax.default_matmul_precision("highest"):
        passed = pass_blocks(weights, inputs, dtype=dtype, mesh=mesh, progress=progress)
        score, params = _jit_scores(passed.head, mesh), passed.read()
        for (_, members), x, target in zip(batches, passed.hidden, targets, strict=True):
            found, top = (np.asarray(own) for own in score(params, x, target))
            for row, index in enumerate(members):
                stop = len(sequences[index]) - 1
                own = slice(stop - counts[index], stop)
                sums[index] = found[row, own].astype(np.float64).sum()
                likeliest[index] = top[row, own].all()
    if not np.isfinite(sums).all():
        worst = int(np.flatnonzero(~np.isfinite(sums))[0])
        raise JpruneError(
            f"the log-likelihood of sequence {worst} is {sums[worst]} in {jnp.dtype(dtype)}: weights are not finite or "
            "activations overflow. Compute in float32 or bfloat16, and check the checkpoint."
        )
    return sums, likeliest


def _batches(lengths: Sequence[int], context: int, shares: int) -> list[tuple[int, list[int]]]:
    """(length, numbers of the sequences) of every micro-batch; the last of a length is filled up with its last one."""
    by_length: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        by_length.setdefault(min(-(-lengths[index] // BUCKET) * BUCKET, context), []).append(index)
    batches = []
    for length, members in by_length.items():
        size = shares * min(windows_at_once(length), -(-len(members) // shares))
        for start in range(0, len(members), size):
            own = members[start : start + size]
            batches.append((length, own + own[-1:] * (size - len(own))))
    return batches


def _scores(
    head: Callable,
    shares: int,
    params: dict[str, Any],
    x: Float[Array, "batch length d"],
    target: Int[Array, "batch length"],
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """Of every token the logarithm of its probability, and whether none is likelier."""
    vocab = jax.eval_shape(head, params, x).shape[-1]

    def of_rows(h: Array, target: Array) -> tuple[Array, Array]:
        logits = jax.nn.log_softmax(head(params, h).astype(jnp.float32))
        own = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return own, jnp.argmax(logits, axis=-1) == target

    own, top = over_rows(of_rows, (x, target), shares=shares, most=LOGITS_BYTES // (4 * vocab))
    return own, top


@functools.lru_cache(maxsize=64)
def _jit_scores(head: Callable, mesh: Mesh) -> Callable:
    scores = functools.partial(_scores, head, mesh.shape[devices.DATA])
    return jax.jit(scores, out_shardings=devices.replicated(mesh))

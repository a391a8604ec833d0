"""SparseGPT's inner loop, a block of inputs at a time, in one launch.

Frantar and Alistarh 2023 (https://arxiv.org/abs/2301.00774), their step over the inputs of one block: input by input,
what pruning takes away is divided by U_ii and moved to the inputs still to come by row i of U. As XLA runs it, every
input is a chain of small launches. Here a program keeps a block of inputs of some outputs in registers, goes through
all of them, and writes weights, mask and loss once. Outputs are independent, so nothing is shared between programs.

A register cannot be indexed, so an input's row is taken out by a masked sum over the block: 128 x 128 additions an
output for a block of 128, which is little for a GPU. The block is read transposed, so that the inputs of an output lie
in the lanes of one warp, and the sum needs neither shared memory nor a barrier.

Not yet measured on a GPU. jprune's solver uses its own loop until `scripts/gpu_check.sh` has shown this one to be
faster; `sweep_reference` has the signature at which the solver would switch over.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._shapes import Array, Bool, Float
from pallas_kernels.errors import FormatError

OUTPUTS = 32
"""Of a program: 128 inputs x 32 outputs are 32 registers of each of 128 threads."""
_WARPS = 4

Swept = tuple[Float[Array, "block d_out"], Bool[Array, "block d_out"], Float[Array, "d_out"]]
"""Weights after the block's own changes, pruned ones exactly zero; mask; loss of every output."""


def sparsegpt_sweep(
    weights: Float[Array, "block d_out"],
    inverse: Float[Array, "inputs inputs"],
    keep: Bool[Array, "inputs_kept outputs_kept"],
    *,
    nm: tuple[int, int] | None = None,
    interpret: bool = False,
) -> Swept:
    """Prunes the weights of one block of inputs and makes up for it within the block.

    Args:
      weights: float32 `[block, d_out]`, as earlier blocks left them.
      inverse: `[block, block]`, U of the block: upper triangular, U^T U = H^-1 (below the diagonal it is not read).
      keep: `[block, d_out]`, the mask, True = keep; with `nm`, what may be kept.
      nm: choose on the way: the n best of each m inputs by |w_i| / U_ii, among equals the later ones. m is 2, 4, 8 or
        16 and divides the block.
      interpret: run the GPU's kernel in Pallas' interpreter: for tests.

    Returns:
      See `Swept`; the loss is half the sum of squared errors (w_i / U_ii).

    Raises:
      FormatError: shapes that do not belong together; an m that does not fit.
    """
    block, d_out = weights.shape
    if inverse.shape != (block, block) or keep.shape != weights.shape:
        raise FormatError(
            f"{block} inputs and {d_out} outputs have inverse [{block}, {block}] and keep [{block}, {d_out}]; "
            f"got {list(inverse.shape)} and {list(keep.shape)}"
        )
    if nm is not None and (nm[1] not in (2, 4, 8, 16) or block % nm[1] or not 0 < nm[0] <= nm[1]):
        raise FormatError(f"{nm[0]}:{nm[1]} on a block of {block} inputs; m is 2, 4, 8 or 16 and divides the block")
    if interpret:
        return sweep_kernel(weights, inverse, keep, nm=nm, interpret=True)
    return lax.platform_dependent(
        weights,
        inverse,
        keep,
        cuda=functools.partial(sweep_kernel, nm=nm),
        default=functools.partial(sweep_reference, nm=nm),
    )


def sweep_reference(weights, inverse, keep, *, nm: tuple[int, int] | None = None) -> Swept:
    """The same in plain jnp, input by input."""
    block, d_out = weights.shape
    diagonal = jnp.diagonal(inverse)
    after = jnp.triu(inverse, 1)
    n, m = nm or (0, 1)

    def one(i, state):
        weights, keep, loss = state
        if nm is not None:
            here = lax.dynamic_slice_in_dim(weights, i // m * m, m)
            allowed = lax.dynamic_slice_in_dim(keep, i // m * m, m)
            scale = lax.dynamic_slice_in_dim(diagonal, i // m * m, m)
            chosen = jnp.where(i % m == 0, _best(jnp.abs(here) / scale[:, None], allowed, n), allowed)
            keep = lax.dynamic_update_slice_in_dim(keep, chosen, i // m * m, axis=0)
        error = jnp.where(keep[i], 0.0, weights[i]) / diagonal[i]
        return weights - after[i][:, None] * error, keep, loss + 0.5 * error * error

    weights, keep, loss = lax.fori_loop(0, block, one, (weights, keep, jnp.zeros(d_out, jnp.float32)))
    return jnp.where(keep, weights, 0.0), keep, loss


def _best(scores, allowed, n: int):
    """Mask of the n highest of axis 0; of equals the later."""
    order = jnp.arange(scores.shape[0])
    scores = jnp.where(allowed, scores, -jnp.inf)
    later = order[:, None] < order[None, :]
    beaten = (scores[None] > scores[:, None]) | ((scores[None] == scores[:, None]) & later[..., None])
    return (beaten.sum(1) < n) & allowed


def _kernel(weights_ref, inverse_ref, diagonal_ref, keep_ref, out_ref, loss_ref, *mask_ref, nm):
    block, outputs = weights_ref.shape[1], OUTPUTS
    columns = pl.ds(pl.program_id(0) * outputs, outputs)
    order = lax.broadcasted_iota(jnp.int32, (outputs, block), 1)
    n, m = nm or (0, 1)

    def row(x, i):
        return jnp.sum(jnp.where(order == i, x, jnp.zeros_like(x)), axis=1)

    def eliminate(i, kept, weights, loss):
        error = jnp.where(kept, 0.0, row(weights, i)) / diagonal_ref[i]
        return weights - error[:, None] * inverse_ref[i, :][None, :], loss + 0.5 * error * error

    def given(i, state):
        return eliminate(i, keep_ref[i, columns] != 0, *state)

    def chosen(group, state):
        weights, loss, keep = state
        first = group * m
        allowed = [keep_ref[first + j, columns] != 0 for j in range(m)]
        scores = [jnp.abs(row(weights, first + j)) / diagonal_ref[first + j] for j in range(m)]
        scores = [jnp.where(a, s, -jnp.inf) for a, s in zip(allowed, scores)]
        for j in range(m):
            beaten = jnp.zeros((outputs,), jnp.int32)
            for other in range(m):
                if other != j:
                    wins = scores[other] >= scores[j] if other > j else scores[other] > scores[j]
                    beaten += wins.astype(jnp.int32)
            kept = (beaten < n) & allowed[j]
            keep = jnp.where(order == first + j, kept.astype(jnp.int32)[:, None], keep)
            weights, loss = eliminate(first + j, kept, weights, loss)
        return weights, loss, keep

    state = weights_ref[columns, :], jnp.zeros((outputs,), jnp.float32)
    if nm is None:
        weights, loss = lax.fori_loop(0, block, given, state)
    else:
        no_mask = jnp.zeros((outputs, block), jnp.int32)
        weights, loss, keep = lax.fori_loop(0, block // m, chosen, (*state, no_mask))
        mask_ref[0][columns, :] = keep.astype(jnp.int8)
    out_ref[columns, :] = weights
    loss_ref[columns] = loss


def sweep_kernel(weights, inverse, keep, *, nm: tuple[int, int] | None = None, interpret: bool = False) -> Swept:
    """The Pallas kernel; shapes as `sparsegpt_sweep`, which checks them."""
    block, d_out = weights.shape
    padded, columns = 1 << (block - 1).bit_length(), -d_out % OUTPUTS
    rows = padded - block
    # What pads is kept, zero and independent of the rest.
    transposed = jnp.pad(weights, ((0, rows), (0, columns))).T
    kept = jnp.pad(keep.astype(jnp.int8), ((0, rows), (0, columns)), constant_values=1)
    diagonal = jnp.pad(jnp.diagonal(inverse), (0, rows), constant_values=1.0)
    after = jnp.pad(jnp.triu(inverse, 1), (0, rows))
    outputs, results = transposed.shape[0], 2 if nm is None else 3  # a given mask need not be written again

    def whole(*shape):
        return pl.BlockSpec(shape, lambda *ids: (0,) * len(shape))

    swept, loss, *chosen = pl.pallas_call(
        functools.partial(_kernel, nm=nm),
        grid=(outputs // OUTPUTS,),
        in_specs=[whole(outputs, padded), whole(padded, padded), whole(padded), whole(padded, outputs)],
        out_specs=[whole(outputs, padded), whole(outputs), whole(outputs, padded)][:results],
        out_shape=[
            jax.ShapeDtypeStruct((outputs, padded), jnp.float32),
            jax.ShapeDtypeStruct((outputs,), jnp.float32),
            jax.ShapeDtypeStruct((outputs, padded), jnp.int8),
        ][:results],
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="sparsegpt_sweep",
    )(transposed, after, diagonal, kept)
    mask = chosen[0][:d_out, :block].T != 0 if chosen else keep
    return jnp.where(mask, swept[:d_out, :block].T, 0.0), mask, loss[:d_out]

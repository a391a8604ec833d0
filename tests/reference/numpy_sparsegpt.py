"""SparseGPT as its paper writes it: an explicit inverse, its Cholesky factor, and one column after the other.

Float64 and as slow as it looks. The paper's layout [d_out, d_in] is used inside, [d_in, d_out] outside. It differs from
the authors' code where jprune says it does: exact counts, dead inputs filled with the live mean, frozen old zeros.
"""

import itertools
from typing import NamedTuple

import numpy as np
from numpy_scores import drop


class Result(NamedTuple):
    kernel: np.ndarray
    mask: np.ndarray
    loss: float
    inversion: float
    """Highest (pruned score / kept score) among scores that competed, 1 or less if only the lowest were pruned."""


def damped(gram, damping=0.01):
    """The Gram matrix that is solved with."""
    gram = np.array(gram, np.float64)
    diagonal = np.diagonal(gram).copy()
    mean = diagonal[diagonal != 0].mean()
    return gram + np.diag(np.where(diagonal == 0, mean, 0.0) + damping * mean)


def reconstruction(new, old, gram):
    """1/2 tr(D^T H D) of the change D = new - old."""
    change = np.asarray(new, np.float64) - np.asarray(old, np.float64)
    return 0.5 * np.trace(change.T @ gram @ change)


def sparsegpt(
    kernel,
    gram,
    *,
    sparsity=None,
    per="block",
    nm=None,
    mask=None,
    keep=None,
    damping=0.01,
    block_size=128,
    follow=None,
):
    """Prunes `kernel` by a sparsity, by N:M, or by a given mask.

    With `follow`, the masks are taken from there instead of being chosen, and `inversion` says how far that choice is
    from one by these scores: a solver in float32 may settle differently what is equal up to rounding, and everything
    that comes after would follow from that.
    """
    W = np.array(kernel, np.float64).T
    d_out, d_in = W.shape
    allowed = np.ones(W.shape, bool) if keep is None else np.asarray(keep).T
    followed = None if follow is None else np.asarray(follow).T
    W[:, np.diagonal(gram) == 0] = 0
    U = np.linalg.cholesky(np.linalg.inv(damped(gram, damping))).T
    d = np.diagonal(U)
    M = np.ones(W.shape, bool)
    loss, inversion = 0.0, 0.0

    def choose(rows, columns, count):
        """Prunes `count` of the elements rows x columns by the weights as they are now; of ties, the first inputs."""
        nonlocal inversion
        scores = (np.where(allowed[rows, columns], W[rows, columns], 0) / d[columns]) ** 2
        scores[~allowed[rows, columns]] = -np.inf
        chosen = drop(scores.T.reshape(-1), count).reshape(scores.T.shape).T & allowed[rows, columns]
        if followed is not None:
            chosen = followed[rows, columns]
        M[rows, columns] = chosen
        pruned = scores[allowed[rows, columns] & ~chosen].max(initial=0)
        if pruned > 0 and chosen.any():
            inversion = max(inversion, pruned / scores[chosen].min())

    def block_quotas():
        """Zeros of each block: evenly; where `keep` has more in some blocks, the others get less new ones."""
        ends = [min(e, d_in) for e in range(0, d_in + block_size, block_size)]
        quotas = np.diff([int(e * d_out * sparsity) for e in ends])
        old = [(~allowed[:, a:b]).sum() for a, b in itertools.pairwise(ends)]
        new = np.maximum(quotas - old, 0)
        wanted = max(quotas.sum() - sum(old), 0)
        reached = [round(wanted * part / max(new.sum(), 1)) for part in np.cumsum(new)]
        return old + np.diff([0, *reached])

    everything = slice(0, d_out)
    if mask is not None:
        M = np.asarray(mask).T & allowed
    elif nm is None and per == "kernel":
        choose(everything, slice(0, d_in), int(d_in * d_out * sparsity))
    for i in range(d_in):
        if mask is None and nm is not None and i % nm[1] == 0:
            for output in range(d_out):
                choose(slice(output, output + 1), slice(i, i + nm[1]), nm[1] - nm[0])
        elif mask is None and nm is None and i % block_size == 0 and per != "kernel":
            end = min(i + block_size, d_in)
            if per == "block":
                choose(everything, slice(i, end), block_quotas()[i // block_size])
            else:
                for output in range(d_out):
                    choose(slice(output, output + 1), slice(i, end), int(end * sparsity) - int(i * sparsity))
        error = np.where(M[:, i], 0, W[:, i]) / d[i]
        W[:, i:] -= np.outer(error, U[i, i:])
        W[~M[:, i], i] = 0
        loss += 0.5 * (error**2).sum()
    return Result(W.T, M.T, loss, inversion)

"""ADMM pruning as its paper writes it, in NumPy float64: X, Z, the scaled dual U, and a mask that closes by and by."""

from typing import NamedTuple

import numpy as np
from numpy_scores import drop, select
from numpy_sparsegpt import damped


class Result(NamedTuple):
    kernel: np.ndarray
    mask: np.ndarray
    inversion: float = 1.0


def least_squares(kernel, matrix, mask):
    """The best weights under a mask, output by output."""
    new = np.zeros(kernel.shape)
    for j in range(kernel.shape[1]):
        kept = mask[:, j]
        new[kept, j] = np.linalg.solve(matrix[np.ix_(kept, kept)], matrix[kept] @ kernel[:, j])
    return new


def admm(kernel, gram, *, sparsity=None, per="kernel", nm=None, iterations=20, damping=0.01, follow=None):
    """Prunes by a sparsity or by N:M; `follow` is not needed, since nothing that is chosen stays chosen."""
    del follow
    matrix = damped(gram, damping)
    n = np.sqrt(np.diagonal(matrix))
    A, W = matrix / np.outer(n, n), n[:, None] * np.asarray(kernel, np.float64)
    P = np.linalg.inv(A + np.eye(len(A)))
    X, U = W, np.zeros_like(W)
    for t in range(1, iterations + 1):
        final = select(abs(X + U), sparsity=sparsity, per=per, nm=nm)
        share = 1 - max(1 - t / (0.75 * iterations), 0) ** 3
        scores = np.where(final, np.inf, abs(X + U))
        M = drop(scores.reshape(-1), round(share * (~final).sum())).reshape(W.shape)
        Z = (X + U) * M
        U = U + X - Z
        X = P @ (A @ W + Z - U)
    mask = select(abs(X + U), sparsity=sparsity, per=per, nm=nm)
    return Result(least_squares(np.asarray(kernel, np.float64), matrix, mask), mask)

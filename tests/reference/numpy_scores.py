"""Slow, obvious NumPy truths for statistics, scores and masks. True = keep; kernels are [d_in, d_out]; float64."""

import numpy as np


def gram(x):
    """sum over tokens of x x^T, one token at a time."""
    x = np.asarray(x, np.float64)
    total = np.zeros((x.shape[1], x.shape[1]))
    for token in x:
        total += np.outer(token, token)
    return total


def squared_norm(x):
    """sum over tokens of x_i^2."""
    return np.diagonal(gram(x))


def magnitude(kernel):
    """|W|."""
    return np.abs(np.asarray(kernel, np.float64))


def wanda(kernel, x):
    """|W_ij| times the Euclidean norm of input i over all tokens."""
    kernel = magnitude(kernel)
    norms = [np.linalg.norm(np.asarray(x, np.float64)[:, i]) for i in range(kernel.shape[0])]
    return np.stack([row * norm for row, norm in zip(kernel, norms)])


def drop(scores, count):
    """Keeps all of a list of competing scores but the `count` lowest; of equal ones the first go first."""
    keep = np.ones(len(scores), bool)
    keep[np.argsort(scores, kind="stable")[:count]] = False
    return keep


def select(scores, *, sparsity=None, per="output", nm=None, keep=None):
    """The mask with the highest scores; `keep` False is pruned first and never kept."""
    scores = np.array(scores, np.float64)
    if keep is not None:
        scores[~keep] = -np.inf
    d_in, d_out = scores.shape
    if nm is None and per == "kernel":
        mask = drop(scores.reshape(-1), int(d_in * d_out * sparsity)).reshape(d_in, d_out)
    else:
        mask = np.ones((d_in, d_out), bool)
        n, m = nm or (None, d_in)
        for output in range(d_out):
            for start in range(0, d_in, m):
                zeros = int(d_in * sparsity) if nm is None else m - n
                mask[start : start + m, output] = drop(scores[start : start + m, output], zeros)
    return mask if keep is None else mask & keep

"""ALPS as its paper writes it (algorithm 1), in NumPy float64, with an unscaled dual V and a rho that rises evenly."""

import numpy as np
from numpy_admm import Result, least_squares
from numpy_scores import select
from numpy_sparsegpt import damped


def alps(kernel, gram, *, sparsity=None, per="kernel", nm=None, iterations=300, damping=0.01, growth=1.3, follow=None):
    """Prunes by a sparsity or by N:M; `follow` is not needed, since nothing that is chosen stays chosen."""
    del follow
    matrix = damped(gram, damping)
    d = np.sqrt(np.diagonal(matrix))
    A, W = matrix / np.outer(d, d), d[:, None] * np.asarray(kernel, np.float64)
    rho, V = 0.1, np.zeros_like(W)
    M = last = select(abs(W), sparsity=sparsity, per=per, nm=nm)
    Z = W * M
    for t in range(1, iterations + 1):
        B = np.linalg.solve(A + rho * np.eye(len(A)), A @ W - V + rho * Z)
        M = select(abs(B + V / rho), sparsity=sparsity, per=per, nm=nm)
        Z = (B + V / rho) * M
        V = V + rho * (B - Z)
        if t % 3 == 0:
            changed = np.count_nonzero(last != M)
            if changed == 0 or (t >= 30 and changed < 3e-4 * M.sum()):
                break
            rho, last = rho * growth, M
    return Result(least_squares(np.asarray(kernel, np.float64), matrix, M), M)

"""Programs that note what their kernels are multiplied with.

They call `see(path, x)` beside each of their products. In an eager run, where JAX runs scans and branches as Python
does, it notes the values; when the program is traced it does nothing.
"""

import contextlib

import jax
import numpy as np

SEEN: dict[str, list] | None = None


def see(path, x, index=None):
    """Notes what a kernel is multiplied with: rows by features; of a stack, for the kernel number `index`."""
    if SEEN is not None:
        SEEN.setdefault(path, []).append(
            (None if index is None else int(index), np.asarray(x).reshape(-1, x.shape[-1]))
        )
    return x


@contextlib.contextmanager
def noting():
    """Within it, what programs `see` is noted by path: (number of the kernel in its stack, rows) for each product."""
    global SEEN
    SEEN = {}
    try:
        with jax.disable_jit():
            yield SEEN
    finally:
        SEEN = None


def is_noting():
    """Whether this is the eager run."""
    return SEEN is not None

"""Whether a function is traced to be read, or to be run.

A function that has two forms, one that is fast and one whose matmuls are plain to see, shows the latter to
`jprune.trace`. JAX keeps the two apart wherever it remembers what it traced.
"""

import jax

reading = jax.make_user_context(False)
"""``with reading(True)``: what JAX traces here is traced to be read."""


def is_read() -> bool:
    """Whether the function that is traced now is traced to be read."""
    return reading.value


sorting = jax.make_user_context(False)
"""``with sorting(True)``: what is read here may sort rows by the kernel of a stack that they are for, and have products
of `jprune.sorted_rows` with them. That computes less, and hides which axes go together."""


def is_sorted() -> bool:
    """Whether products of sorted rows are wanted of the function that is traced now to be read."""
    return sorting.value

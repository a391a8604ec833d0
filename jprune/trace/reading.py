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

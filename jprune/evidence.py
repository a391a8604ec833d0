"""Whether a statistic of inputs is one that inputs can have, and whether any were seen.

What is no sum of squares, as a Gram matrix with NaN or a negative diagonal, says nothing, and neither does one that no
token went into. Inputs that were zero for every token are dead: methods say what they do with those.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.errors import JpruneError
from jprune.statistics import Gram, SquaredNorm


def check_kind(statistic: Any, wanted: type | None, where: str, method: str) -> None:
    """Raises a `JpruneError` that names `where` and `method` if this is not the kind of statistic that it wants."""
    if wanted is not None and not isinstance(statistic, wanted):
        raise JpruneError(
            f"{where}: {method} needs a {wanted.__name__} of its inputs, got {type(statistic).__name__}; gather it "
            "with jprune.observe, and see jprune.report if it leaves this kernel out"
        )


def check(statistic: Any, where: str) -> None:
    """Raises a `JpruneError` that names `where` if no inputs can have this statistic; nothing under a trace.

    Of any statistic, one of a user's own too, every number must be finite; of sums of squares none may be negative.
    """
    check_seen(statistic, where)
    if _is_traced(statistic):
        return
    if count := _not_finite(statistic):
        raise JpruneError(
            f"{where}: the statistic of its inputs has NaN or inf in {count} of {statistic.d_in} inputs; the "
            "activations overflow before this kernel, or padding has no weight of 0: use a wider dtype, or check the "
            "weights"
        )
    if _is_sum(statistic) and (count := int((_squares(statistic) < 0).sum())):
        raise JpruneError(
            f"{where}: the statistic of its inputs, a sum of squares, is negative in {count} of {statistic.d_in} "
            "inputs; gather it with jprune.observe, or with `update` from zeros"
        )


def check_seen(statistic: Any, where: str) -> None:
    """Raises a `JpruneError` that names `where` if no token went into a sum."""
    if has_seen_nothing(statistic):
        raise JpruneError(f"{where}: its statistic has seen no token; use more calibration tokens, or `skip` it")


def has_seen_nothing(statistic: Any) -> bool:
    """Whether no token went into a sum; False under a trace, and of other statistics."""
    if not _is_sum(statistic) or _is_traced(statistic):
        return False
    return int(statistic.tokens) == 0 and not _squares(statistic).any()


def _is_sum(statistic: Any) -> bool:
    return isinstance(statistic, SquaredNorm | Gram)


def _is_traced(statistic: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(statistic))


def _not_finite(statistic: Any) -> int:
    """How many inputs have NaN or inf in what is kept of them; all, if a number is of no input alone."""
    bad = np.zeros(statistic.d_in, bool)
    for leaf in jax.tree.leaves(statistic):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        wrong = ~np.isfinite(np.asarray(leaf))
        if wrong.shape == (len(bad),) * 2 and wrong.diagonal().any():
            bad |= wrong.diagonal()  # one bad input spoils what it has in common with all others
        elif wrong.shape[:1] == bad.shape:
            bad |= wrong.reshape(len(bad), -1).any(1)
        else:
            bad |= wrong.any()
    return int(bad.sum())


def _squares(statistic: Any) -> np.ndarray:
    """Sum of x_i^2 of every input, [d_in]."""
    return np.asarray(statistic.total if statistic.total.ndim == 1 else statistic.total.diagonal())

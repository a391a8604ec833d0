"""Whether a sum over inputs is one that inputs can have, and whether any were seen.

What is no sum of squares, as a Gram matrix with NaN or a negative diagonal, says nothing, and neither does one that no
token went into. Inputs that were zero for every token are dead: methods say what they do with those.
"""

from typing import Any

import jax
import numpy as np

from jprune.errors import JpruneError
from jprune.statistics import Gram, SquaredNorm


def check(statistic: Any, where: str) -> None:
    """Raises a `JpruneError` that names `where` if no inputs can have this statistic; of sums, outside of a trace."""
    if not _is_known(statistic):
        return
    check_seen(statistic, where)
    squares = _squares(statistic)
    if count := int((~np.isfinite(squares)).sum()):
        raise JpruneError(
            f"{where}: the statistic of its inputs has NaN or inf in {count} of {len(squares)} inputs; the activations "
            "overflow before this kernel, or padding has no weight of 0: use a wider dtype, or check the weights"
        )
    if count := int((squares < 0).sum()):
        raise JpruneError(
            f"{where}: the statistic of its inputs, a sum of squares, is negative in {count} of {len(squares)} inputs; "
            "gather it with jprune.observe, or with `update` from zeros"
        )


def check_seen(statistic: Any, where: str) -> None:
    """Raises a `JpruneError` that names `where` if no token went into a sum."""
    if has_seen_nothing(statistic):
        raise JpruneError(f"{where}: its statistic has seen no token; use more calibration tokens, or `skip` it")


def has_seen_nothing(statistic: Any) -> bool:
    """Whether no token went into a sum; False under a trace, and of other statistics."""
    return _is_known(statistic) and int(statistic.tokens) == 0 and not _squares(statistic).any()


def _is_known(statistic: Any) -> bool:
    """Whether it is a sum whose values can be looked at."""
    traced = (isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(statistic))
    return isinstance(statistic, SquaredNorm | Gram) and not any(traced)


def _squares(statistic: Any) -> np.ndarray:
    """Sum of x_i^2 of every input, [d_in]."""
    return np.asarray(statistic.total if statistic.total.ndim == 1 else statistic.total.diagonal())

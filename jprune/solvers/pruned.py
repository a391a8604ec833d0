"""What every pruning method returns for one kernel."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pruned:
    """A pruned kernel. All arrays have the kernel's shape; pruned elements are exactly zero."""

    kernel: Any
    """The new weights, in the dtype of the old ones."""
    mask: Any
    """bool; True = kept."""
    loss: Any = None
    """float32 []: reconstruction loss 1/2 ||X (W_new - W_old)||^2, damped where a solver damps (but not for inputs that
    were zero for every token, whose weights cost nothing); None if not known."""

"""What every pruning method returns for one kernel."""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pruned:
    """A pruned kernel. All arrays have the kernel's shape; pruned elements are exactly zero."""

    kernel: Float[Array, "..."]
    """The new weights, in the dtype of the old ones."""
    mask: Bool[Array, "..."]
    """True = kept."""
    loss: Float[Array, ""] | None = None
    """Reconstruction loss 1/2 ||X (W_new - W_old)||^2 (with the damping, where a solver damps); None if not known."""

"""The statistic of two models side by side: how the inputs of a pruned one lie to those of the dense one.

A kernel late in a pruned model reads x', where the dense model reads x. The Gram matrix G = sum x' x'^T says what its
weights do there; the cross-Gram C = sum x' x^T says what of the dense model's outputs can be made of x'
(`jprune.solvers.targets`). What is kept is not C but C - G = sum x' (x - x')^T: it is exactly zero as long as the two
models agree, where a difference of two large sums would be rounding.

Where the outputs of a kernel are added to a residual stream, which is h' in the pruned model and h in the dense one,
the sum of x' (h - h')^T says what of that error the kernel can take away.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jprune import weighting
from jprune.annotations import Array, Float
from jprune.errors import JpruneError
from jprune.statistics import Gram
from jprune.weighting import Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossGram(Gram):
    """A `Gram` of the pruned model's inputs x', and of how far the dense model's inputs x are from them.

    It sees both at once, as `beside` puts them side by side.
    """

    streams: ClassVar[int] = 2
    """Models whose inputs it sees."""

    apart: Any
    """Sum over tokens of x' (x - x')^T, float32 [d_in, d_in]; the cross-Gram is `total` + `apart`."""
    residual: Any = None
    """Sum over tokens of x' (h - h')^T, float32 [d_in, d_out], of the one kernel that reads x; None if it is not
    known what its outputs are added to."""

    @classmethod
    def zeros(cls, d_in: int, d_out: int = 0) -> "CrossGram":
        """Nothing seen yet; with the number of outputs, if what they are added to is to be seen."""
        residual = jnp.zeros((d_in, d_out), jnp.float32) if d_out else None
        return cls(**vars(Gram.zeros(d_in)), apart=jnp.zeros((d_in, d_in), jnp.float32), residual=residual)

    @classmethod
    def flops(cls, tokens: int, d_in: int) -> float:
        """Operations of seeing so many tokens: those of a `Gram`, and one whole product."""
        return Gram.flops(tokens, d_in) + 2.0 * tokens * d_in**2

    @classmethod
    def nbytes(cls, d_in: int) -> int:
        """Bytes of one statistic: two float32 matrices, and the count."""
        return Gram.nbytes(d_in) + 4 * d_in**2

    def update(self, x: Float[Array, "tokens both"], weights: Weights | None = None) -> "CrossGram":
        """Having seen `x` too, the inputs of both models side by side, and the error of what is added to the outputs.

        Raises:
          JpruneError: the columns are not those.
        """
        d_out = 0 if self.residual is None else self.residual.shape[-1]
        if x.shape[-1] != 2 * self.d_in + d_out:
            and_error = f", and {d_out} of what the outputs are added to" if d_out else ""
            raise JpruneError(
                f"expected the {self.d_in} inputs of the pruned model and of the dense one side by side{and_error}, as "
                f"jprune.cross_gram.beside puts them, got {x.shape[-1]} columns; where one model is observed, gather a "
                "Gram"
            )
        pruned, dense, error = (x.astype(jnp.float32) for x in jnp.split(x, [self.d_in, 2 * self.d_in], axis=-1))
        seen = Gram(self.total, self.tokens).update(pruned, weights)
        pruned, _ = weighting.scaled(pruned, weights)
        dense, _ = weighting.scaled(dense, weights)
        apart = self.apart + jnp.matmul(pruned.T, dense - pruned, precision="highest")
        residual = self.residual
        if residual is not None:
            error, _ = weighting.scaled(error, weights)
            residual = residual + jnp.matmul(pruned.T, error, precision="highest")
        return CrossGram(seen.total, seen.tokens, apart, residual)


def beside(
    pruned: Float[Array, "*stack tokens d_in"],
    dense: Float[Array, "*stack tokens d_in"],
    error: Float[Array, "tokens d_out"] | None = None,
) -> Float[Array, "*stack tokens both"]:
    """The inputs of a kernel in two models, as a `CrossGram` takes them; and if its `residual` is wanted, the error
    h - h' of what its outputs are added to.

    Of a stack of kernels with inputs of their own, such as experts, the models may send a token to different kernels;
    it has zeros where it is not sent. Where only the pruned model sends it, nothing says what the dense model wants
    there, and it counts as if both had the pruned one's inputs; where only the dense model does, it does not count.
    """
    if pruned.ndim > 2:
        sent, wanted = (jnp.any(x != 0, axis=-1, keepdims=True) for x in (pruned, dense))
        dense = jnp.where(sent & wanted, dense, pruned)
    return jnp.concatenate([pruned, dense] if error is None else [pruned, dense, error], axis=-1)


def streams(kind: Any) -> int:
    """Models whose inputs a class of statistics sees: 1, or 2 if the dense model's belong to it."""
    return getattr(kind, "streams", 1)

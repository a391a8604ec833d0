"""What a backward pass keeps of a block, and what it computes again.

A block that is computed again from its input keeps one hidden state ``[B, L, d_model]``, and costs a forward pass more
in every step. Beside frozen kernels that is a third of the step. There the outputs of kernels and of attention, and
what was drawn for dropout (`named`), are kept where they fit in little memory, and only what is cheap is computed
again: norms, activations, the scores of attention. Where all weights are trained it gained nothing that could be
measured, and took memory, so those keep nothing.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from jprune.annotations import Array, Shaped

PyTree = Any

KEEP_BYTES = 2 << 30
"""What may be kept of all blocks together, or half of what their parameters take if that is more."""

_NAME = "kept of a block"


def named(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The same array; `keeping` keeps it, if it keeps anything."""
    return checkpoint_name(x, _NAME)


def keeping(block: Callable[..., Array], layers: int, *operands: PyTree) -> Callable[..., bool]:
    """The policy of `jax.checkpoint` that keeps what is named of a block, or nothing if that is too much.

    Args:
      block: of a model.
      layers: how many the model has; what is kept of this one is counted as often.
      *operands: of the block: its parameters, what belongs to them, and its input.
    """
    kept = layers * _named_bytes(jax.make_jaxpr(block)(*operands))
    weights = layers * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(operands[:-1]))
    policies = jax.checkpoint_policies
    few = kept <= max(KEEP_BYTES, weights // 2)
    return policies.save_only_these_names(_NAME) if few else policies.nothing_saveable


def _named_bytes(jaxpr: Any) -> int:
    """Of the named values of a jaxpr and of those inside it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    own = [x.aval for e in jaxpr.eqns if e.primitive.name == "name" and e.params["name"] == _NAME for x in e.outvars]
    inner = itertools.chain.from_iterable(jex.jaxprs_in_params(equation.params) for equation in jaxpr.eqns)
    return sum(aval.size * aval.dtype.itemsize for aval in own) + sum(map(_named_bytes, inner))

"""Local reconstruction: the kept weights of a pruned block are trained towards what the dense one gives.

An eighth of the micro-batches is held out. After every pass over the others the error on these is measured; the weights
of the pass with the lowest are taken, those before training if none is lower, and training ends when it has not fallen
for half of the passes. The error is measured with the weights in their own dtype.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jprune.anatomy.kernels import Kernel
from jprune.pipeline.forecast import learning
from jprune.pipeline.forecast.learning import Params
from jprune.pipeline.forecast.programs import Spec
from jprune.runs.activations import Batches
from jprune.train import locally

RATE = 0.01
"""The highest step, as a share of the size of a kernel's weights."""
WARMUP = 0.2
"""Share of the steps in which that is reached; Adam's first are of full size whatever the gradient."""


def held_out(count: int) -> list[int]:
    """The micro-batches that are held out."""
    return [j for j in range(count) if j % 8 == min(7, count - 1)]


def reconstruct(
    specs: Sequence[Spec],
    hidden: Batches,
    targets: Batches,
    params: Params,
    kernels: Mapping[str, Kernel],
    *,
    passes: int,
    tell: Callable[[float], None],
) -> tuple[Params, float]:
    """The kernels trained, and the held-out error that is left, as a share of what there was before.

    Args:
      specs: of the part, for each micro-batch.
      hidden: the hidden states before it, the pruned model's first.
      targets: what it is to give.
      params: of the part, pruned.
      kernels: those to train, by path in the part; of a stack only the chosen ones.
      passes: over the micro-batches, at most.
      tell: called with the share of the passes that is done.
    """
    zeros = {path: jnp.zeros_like(params[path]) for path, kernel in kernels.items() if kernel.chosen is not None}
    pruned = {path: params[path] for path in kernels}
    pruned |= {path: kernels[path].joined(params[path], zero) for path, zero in zeros.items()}
    rest = {path: x for path, x in params.items() if path not in pruned}
    rest |= {path: kernels[path].joined(zero, params[path]) for path, zero in zeros.items()}
    out = held_out(len(specs))
    train = [j for j in range(len(specs)) if j not in out]

    def measured(weights: Params) -> float:
        rows = [specs[j].x[0][0] for j in out]
        found = [learning.error(specs[j])(weights, pruned, rest, targets.get(j)[0], hidden.get(j)[0]) for j in out]
        return math.fsum(n * float(x) for n, x in zip(rows, found, strict=True)) / sum(rows)

    state = locally.begin(pruned)
    before = measured(state.weights)
    if not (math.isfinite(before) and before):
        return {path: params[path] for path in kernels}, 1.0  # nothing is lost, or what is lost cannot be measured
    scale = jnp.float32(before)
    best, least, since = pruned, 1.0, 0
    for done in range(passes):
        for i, j in enumerate(train):
            tell((done + i / len(train)) / passes)
            rate = jnp.float32(_rate(done * len(train) + i, passes * len(train)))
            state = learning.step(specs[j])(state, pruned, rest, targets.get(j)[0], hidden.get(j)[0], scale, rate)
            jax.block_until_ready(state)  # or the activations of all steps would be in memory together
        error = measured(state.weights) / before
        since = 0 if error < least else since + 1
        if error < least:
            best, least = locally.of_dtypes(state.weights, pruned), error
        if since >= max(passes // 2, 2):
            break
    return {path: kernel.joined(best[path], params[path]) for path, kernel in kernels.items()}, least


def _rate(step: int, steps: int) -> float:
    """Rises along a line, and falls along a cosine."""
    return RATE * min(1.0, (step + 1) / (WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))

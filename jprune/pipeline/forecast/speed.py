"""How fast this machine is at what a run does: measured, in about two seconds."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jprune import statistics
from jprune.cross_gram import streams
from jprune.methods import Method
from jprune.models.batching import windows_at_once
from jprune.pipeline.forecast.costs import UnitCost

DISK = 1e9
"""Bytes a second, read or written: assumed, since measuring it would write. Matters only where little is computed."""
_LARGEST = 2048  # inputs of a matmul that is measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Flops a second, as `costs` counts them."""

    forward: float
    statistic: float
    solve: float
    step: float
    """Seconds for every element that is solved for, beside its flops: a sweep's small steps, the search for a mask. Of
    a narrow kernel they are most of the time, and of a wide one a part."""

    def seconds(self, cost: UnitCost) -> float:
        """Expected for a unit: reading and writing go on while it computes."""
        passing = (cost.forward_flops + cost.training_flops) / self.forward
        solving = cost.solve_flops / self.solve + cost.solve_elements * self.step
        computing = passing + cost.statistic_flops / self.statistic + solving
        return max(computing, 2 * cost.weights / DISK)


def measure(method: Method, *, d_model: int, d_ff: int, dtype: DTypeLike) -> Speed:
    """Times a feed-forward layer of the model's width, the method's statistic of it, and solving for a kernel.

    At most 2048 inputs and 1024 of the solver: wider ones take longer.
    """
    width, inner = min(d_model, _LARGEST), min(d_ff, 4 * _LARGEST)
    solved = min(d_model, _LARGEST // 2)
    tokens = windows_at_once(1)
    rng = np.random.default_rng(0)  # JAX's would be compiled for every shape
    x = jnp.asarray(rng.standard_normal((tokens, width), np.float32), dtype)
    up = jnp.asarray(rng.standard_normal((width, inner), np.float32), dtype)
    kernel = jnp.asarray(rng.standard_normal((solved, solved), np.float32))

    def layer(x: jax.Array, up: jax.Array) -> jax.Array:
        return x + jax.nn.silu(x @ up) @ up.T

    with jax.default_matmul_precision("highest"):
        forward = 4 * tokens * width * inner / _time(jax.jit(layer), x, up)
        if method.statistic is None:
            statistic = float("inf")
            known = None
        else:
            update = jax.jit(lambda s, x: s.update(x))
            seen = jnp.concatenate([x] * streams(method.statistic), axis=1)
            seconds = _time(update, method.statistic.zeros(width), seen)
            statistic = statistics.flops(method.statistic, tokens, width) / seconds
            known = update(method.statistic.zeros(solved), seen[:, : solved * streams(method.statistic)])
        together = lambda: method.together({"kernel": kernel}, known, {"kernel": method.timed}, {})  # noqa: E731
        flops, seconds = method.flops(solved, solved), _time(together)
    # Its products are of float32, as those of a Gram matrix are; what they do not explain goes with the elements.
    solve = max(statistic, flops / seconds)
    step = (seconds - flops / solve) / solved**2
    return Speed(forward=forward, statistic=statistic, solve=solve, step=step)


def _time(f: Callable, *args: Any) -> float:
    """Seconds of the faster of two calls, after one that compiles."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return min(times)

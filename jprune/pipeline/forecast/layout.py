"""How calibration is cut up: what decides the last bits of the result, apart from the inputs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jprune import devices
from jprune.runs.activations import Specs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Chosen when a run begins and kept when it is resumed, whatever memory there is then."""

    windows: int
    """Calibration windows in a micro-batch."""
    carry_limit: int | None = None
    """Bytes that the values between two stages may take over all micro-batches. Where they would take more they are
    recomputed from the last that were kept. None: they are always kept, in memory or on disk."""

    def keeps(self, nbytes: int) -> bool:
        """Whether values between two stages that take `nbytes` are kept."""
        return self.carry_limit is None or nbytes <= self.carry_limit


def at_once(windows: int, data: int, most: int, *, held_out: bool) -> int:
    """Windows in a micro-batch on each device, `most` if there are enough of them.

    Args:
      windows: in all.
      data: devices that share them out.
      most: as many as are fast.
      held_out: of the micro-batches some are trained on, one a step, and others held out: there must be many.
    """
    fair = windows // (16 * data) if held_out else -(-windows // data)
    return max(1, min(most, fair))


def hidden_specs(
    d_model: int, shape: tuple[int, ...], layout: Layout, dtype: DTypeLike, mesh: Mesh, streams: int = 1
) -> tuple[Specs, ...]:
    """The hidden states between blocks of token windows [n, length], in each of `streams` models, and where they lie.

    Micro-batches are of at most two sizes that can be shared out evenly. The windows that are left over, fewer than
    there are devices, follow in smaller ones, which every device computes.
    """
    n, length = shape
    data = mesh.shape[devices.DATA]
    at_once = max(layout.windows // data, 1)  # on each device
    even = n // data
    size = math.ceil(even / math.ceil(even / at_once)) if even else 0
    counts = [min(size, even - start) * data for start in range(0, even, max(size, 1))]
    counts += [min(at_once, n - start) for start in range(even * data, n, at_once)]
    return tuple(
        (jax.ShapeDtypeStruct((count, length, d_model), jnp.dtype(dtype), sharding=devices.batch(mesh, count)),)
        * streams
        for count in counts
    )

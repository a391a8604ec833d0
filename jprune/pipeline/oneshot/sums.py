"""The statistics of the inputs of one stage, summed over micro-batches and devices."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jprune import devices
from jprune.anatomy.kernels import Kernel
from jprune.pipeline.forecast.programs import Spec, zero_parts
from jprune.statistics import Statistic, merge_parts

ByInput = dict[int, Statistic]


class Sums:
    """Two sums of every statistic, so that two micro-batches can be computed side by side.

    Each is in as many parts as the tokens of its micro-batches can be cut into.

    Args:
      kind: class of the statistic.
      kernels: of every input, one kernel that reads it.
      outputs: of inputs of which it is known what the kernel's outputs are added to, how many there are.
    """

    def __init__(self, kind: Any, kernels: Mapping[int, Kernel], outputs: Mapping[int, int]):
        self._kind, self._kernels, self._outputs = kind, kernels, outputs
        self._sums: dict[tuple[int, int], ByInput] = {}

    def take(self, j: int, spec: Spec) -> ByInput:
        """The sums that micro-batch `j` adds to; they may be overwritten by whoever takes them and puts new ones."""
        return self._sums.get((spec.pieces, j % 2)) or self._zeros(spec)

    def put(self, j: int, spec: Spec, sums: ByInput) -> None:
        """The same, with micro-batch `j`."""
        self._sums[spec.pieces, j % 2] = sums

    def merged(self, mesh: Mesh) -> ByInput:
        """All sums as one that every device has; they are used up."""
        sums = [self._sums.pop(key) for key in list(self._sums)]
        return jax.block_until_ready(_merged(mesh, sums))

    def _zeros(self, spec: Spec) -> ByInput:
        where = devices.parts(spec.mesh) if spec.pieces > 1 else devices.replicated(spec.mesh)
        return {
            i: zero_parts(self._kind, spec.pieces, where, k.d_in, *k.stack, d_out=self._outputs.get(i, 0))()
            for i, k in self._kernels.items()
        }


def _merged(mesh: Mesh, sums: list[ByInput]) -> ByInput:
    """All sums, each in parts, as one that every device has: reduced over the devices once. The list is emptied, so
    that no more of them are in memory than must be."""
    alike: dict[int, ByInput] = {}
    while sums:
        own = sums.pop(0)
        count = len(jax.tree.leaves(own)[0])
        alike[count] = jax.block_until_ready(_merge_alike(alike[count], own)) if count in alike else own
    del own
    return _merge_parts(mesh)(list(alike.values()))


@functools.partial(jax.jit, donate_argnums=0)
def _merge_alike(a: ByInput, b: ByInput) -> ByInput:
    return {i: jax.vmap(lambda a, b: a.merge(b))(a[i], b[i]) for i in a}


@functools.lru_cache(maxsize=8)
def _merge_parts(mesh: Mesh) -> Any:
    def merge(sums: list[ByInput]) -> ByInput:
        merged = [{i: merge_parts(parts) for i, parts in own.items()} for own in sums]
        return {i: functools.reduce(lambda a, b: a.merge(b), [own[i] for own in merged]) for i in merged[0]}

    return jax.jit(merge, out_shardings=devices.replicated(mesh))

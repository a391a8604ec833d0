"""Which kernels share out the zeros of a model between them, and the patterns that come of it."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from jprune.allocations import spread
from jprune.anatomy.kernels import HEAD, Kernel
from jprune.patterns import Scope, Steps


def sharing(kernels: Iterable[Kernel], fixed: Collection[str], per: Scope) -> dict[str, list[Kernel]]:
    """The kernels that share out their zeros, by block: all of the blocks whose pattern is not `fixed`.

    Args:
      kernels: with the pattern that the model has on average.
      fixed: paths of kernels whose pattern is somebody's choice.
      per: where scores compete, if the pattern leaves it open.

    Raises:
      JpruneError: their pattern has no sparser and denser ones.
    """
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        if kernel.path not in fixed and kernel.path != HEAD:
            steps(kernel, per)
            found.setdefault(kernel.unit, []).append(kernel)
    return found


def share_out(
    kernels: Iterable[Kernel], shared: Mapping[str, list[Kernel]], sparsities: Mapping[str, float], per: Scope
) -> tuple[Kernel, ...]:
    """The kernels, each that is shared with the pattern of its block's sparsity; together they have as many zeros.

    Zeros go in steps (whole outputs, groups), and are shared out among kernels whose steps are of as many elements.

    Args:
      kernels: all of them, with the pattern that the model has on average.
      shared: what `sharing` found of them.
      sparsities: of the blocks, but for a number that is added to all.
      per: where scores compete, if the pattern leaves it open.
    """
    by_step: dict[int, list[tuple[Kernel, Steps]]] = {}
    for block in shared.values():
        for kernel in block:
            own = steps(kernel, per)
            by_step.setdefault(own.each, []).append((kernel, own))
    new: dict[str, Kernel] = {}
    for members in by_step.values():
        zeros, least, most, sizes, _ = (np.array(column, np.int64) for column in zip(*(own for _, own in members)))
        wanted = np.array([sparsities[kernel.unit] for kernel, _ in members])
        counts = spread.apportion(wanted, sizes, int(zeros.sum()), least, most)
        for (kernel, _), count in zip(members, counts.tolist()):
            pattern = kernel.pattern.among(per).with_zeros(count, kernel.d_in, kernel.d_out)
            new[kernel.path] = dataclasses.replace(kernel, pattern=pattern)
    return tuple(new.get(kernel.path, kernel) for kernel in kernels)


def steps(kernel: Kernel, per: Scope) -> Steps:
    """How the zeros of a kernel are counted; those of a stack, each of whose kernels has as many."""
    own = kernel.pattern.among(per).steps(kernel.d_in, kernel.d_out)
    return own._replace(each=own.each * kernel.count)


def achieved(shared: Mapping[str, list[Kernel]], kernels: Iterable[Kernel], per: Scope) -> dict[str, float]:
    """The sparsity of every block that shares, as its kernels now have it."""
    now = {kernel.path: kernel for kernel in kernels}
    found = {}
    for block, members in shared.items():
        own = [(now[kernel.path], steps(now[kernel.path], per)) for kernel in members]
        found[block] = sum(s.zeros * s.each for _, s in own) / sum(kernel.size for kernel, _ in own)
    return found

"""Sparsity schedules: how many zeros there are after how many steps.

From `initial` up to step `begin` (the warm-up) to `final` from step `end` on (the cool-down), and in between

    s(t) = final + (initial - final) (1 - (t - begin) / (end - begin))^power

with power 3 the schedule of Zhu and Gupta 2017 (https://arxiv.org/abs/1710.01878, eq. 1): many zeros at first, while
there is much that is redundant, and fewer and fewer then. Power 1 is linear; begin = end is one jump, and constant.

Steps may be traced, so a jitted training step can ask. Counts come from whole numbers at both ends, not from a float32
sparsity times a size, so that what is reached in the end is exactly what the pattern says of it.
"""

import dataclasses

import jax.numpy as jnp

from jprune import counts
from jprune.annotations import Array, Bool, Float, Int
from jprune.errors import JpruneError

Step = Int[Array, ""] | int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsitySchedule:
    """A share of zeros that grows with the step; made by `constant`, `linear` or `cubic`."""

    final: float
    """Share of zeros from step `end` on, in [0, 1)."""
    initial: float = 0.0
    """Share of zeros up to step `begin`, in [0, final]."""
    begin: int = 0
    """Steps of warm-up: the share is still `initial` at this step."""
    end: int
    """The step at which `final` is reached."""
    power: int = 3
    """Power of the time that is left: 1 linear, 3 cubic."""

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.final < 1:
            raise JpruneError(
                f"a sparsity schedule goes up within [0, 1): the share of zeros; got {self.initial} to {self.final}"
            )
        if not 0 <= self.begin <= self.end:
            raise JpruneError(f"a sparsity schedule needs 0 <= begin <= end in steps; got {self.begin} and {self.end}")
        if self.power < 1:
            raise JpruneError(f"the power of a sparsity schedule must be at least 1, got {self.power}")

    def progress(self, step: Step) -> Float[Array, ""]:
        """How much of the way is done: 0 up to `begin`, exactly 1 from `end` on."""
        left = (self.end - jnp.asarray(step)).astype(jnp.float32) / max(self.end - self.begin, 1)
        return jnp.where(jnp.asarray(step) >= self.end, jnp.float32(1), 1 - jnp.clip(left, 0, 1) ** self.power)

    def __call__(self, step: Step) -> Float[Array, ""]:
        """The share of zeros at a step, float32."""
        return self.initial + (self.final - self.initial) * self.progress(step)

    def zeros(self, step: Step, size: int) -> Int[Array, ""]:
        """How many of `size` are zero at a step: from floor(size x initial) to floor(size x final), both exactly.

        In between it is the nearest whole number, for the next lower one would hang on the last bit of a float32.
        """
        first, last = counts.floor(size, self.initial), counts.floor(size, self.final)
        progress = self.progress(step)
        between = jnp.minimum(jnp.round((last - first) * progress).astype(jnp.int32), last - first)
        return jnp.where(progress >= 1, last, first + between).astype(jnp.int32)

    def due(self, step: Step, every: int) -> Bool[Array, ""]:
        """Whether masks are to be chosen anew at a step: once in `every` steps from `begin`, and last at `end`.

        A last time of its own, because `end` may lie between two others, and the final sparsity must be reached.
        """
        after = jnp.asarray(step) - self.begin
        return (jnp.asarray(step) == self.end) | ((after >= 0) & (after % every == 0) & (jnp.asarray(step) < self.end))


def constant(sparsity: float, *, begin: int = 0) -> SparsitySchedule:
    """No zeros before step `begin`, and from then on all of them."""
    return SparsitySchedule(final=sparsity, begin=begin, end=begin)


def linear(final: float, *, end: int, initial: float = 0.0, begin: int = 0) -> SparsitySchedule:
    """The same number of new zeros in every step from `begin` to `end`."""
    return SparsitySchedule(final=final, initial=initial, begin=begin, end=end, power=1)


def cubic(final: float, *, end: int, initial: float = 0.0, begin: int = 0) -> SparsitySchedule:
    """Many more zeros at first, fewer and fewer towards `end` (Zhu and Gupta 2017)."""
    return SparsitySchedule(final=final, initial=initial, begin=begin, end=end, power=3)

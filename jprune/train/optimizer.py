"""AdamW with a schedule and clipping, out of Optax."""

from dataclasses import dataclass
from typing import Literal

import optax

from jprune.errors import JpruneError

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """How the parameters follow their gradients (Loshchilov and Hutter, arXiv:1711.05101)."""

    learning_rate: float = 1e-4
    """At its highest."""
    schedule: Schedule = "linear"
    """After the warm-up: constant, or down to the floor at the last step, linearly or along a cosine."""
    floor: float = 0.0
    """What the learning rate ends at, as a share of its highest."""
    warmup: int | None = None
    """Steps over which the learning rate rises to its highest; by default a tenth of all, but at most `most_warmup`."""
    most_warmup: int | None = 100
    """The most that `warmup` is by default; None for a tenth of all, however many these are."""
    weight_decay: float = 0.0
    """Share of every trained parameter that is taken off at each step, times the learning rate."""
    b1: float = 0.9
    """Decay of the mean of the gradients."""
    b2: float = 0.999
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of the second."""
    clip: float = 1.0
    """The global norm of the gradients is cut to this; 0 leaves it."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise JpruneError(f"the schedule is one of {', '.join(SCHEDULES)}; got {self.schedule!r}")
        if not self.learning_rate > 0:
            raise JpruneError(f"the learning rate must be above 0, got {self.learning_rate}")
        if self.warmup is not None and self.warmup < 0:
            raise JpruneError(f"warm-up steps cannot be negative, got {self.warmup}")
        if not 0 <= self.floor <= 1:
            raise JpruneError(f"the floor of the learning rate is a share of its highest, in [0, 1]; got {self.floor}")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0 and self.weight_decay >= 0 and self.clip >= 0):
            raise JpruneError(
                "expected b1 and b2 in [0, 1), eps above 0, weight_decay and clip not negative; got "
                f"b1 {self.b1}, b2 {self.b2}, eps {self.eps}, weight_decay {self.weight_decay}, clip {self.clip}"
            )

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate of each of `steps` steps, counted from 0. The first is above zero already.

        Raises:
          JpruneError: the warm-up takes all the steps.
        """
        tenth = steps // 10 if self.most_warmup is None else min(self.most_warmup, steps // 10)
        warmup = tenth if self.warmup is None else self.warmup
        if warmup and warmup >= steps:
            raise JpruneError(f"a warm-up of {warmup} steps leaves none of the {steps}; give fewer, or more steps")
        rest = steps - warmup
        after = {
            "constant": optax.constant_schedule(self.learning_rate),
            "linear": optax.linear_schedule(self.learning_rate, self.floor * self.learning_rate, rest),
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest, self.floor),
        }[self.schedule]
        if not warmup:
            return after
        rise = optax.linear_schedule(self.learning_rate / (warmup + 1), self.learning_rate, warmup)
        return optax.join_schedules([rise, after], [warmup])

    def clipping(self) -> optax.GradientTransformation:
        """What comes first."""
        return optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()

    def rule(self, steps: int) -> optax.GradientTransformation:
        """AdamW itself, for a run of `steps`."""
        return optax.adamw(self.rate(steps), b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay)

    def transformation(self, steps: int, *last: optax.GradientTransformation) -> optax.GradientTransformation:
        """Clipping, then AdamW, then `last` (such as `keep_masked`)."""
        return optax.chain(self.clipping(), self.rule(steps), *last)

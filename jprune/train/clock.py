"""How far a training run is, and how long the rest takes."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the training is."""

    step: float
    """Steps done; the fraction counts micro-batches."""
    steps: int
    loss: float | None
    """Loss of the last step, in nats a token."""
    tokens_per_second: float | None
    """Speed since the first micro-batch, which compiles."""
    seconds_left: float | None


class Clock:
    """Tokens a second and time left; compiling, evaluating and saving do not count."""

    def __init__(self, steps: int, first: int):
        self.steps = steps
        self.loss: float | None = None
        self._begin: float | None = None
        self._begin_step, self._tokens = float(first), 0
        self.speed: float | None = None

    def tick(self, step: float, tokens: int) -> Progress:
        """What is told after a number of steps, the last of them with a number of tokens."""
        now = time.perf_counter()
        left = None
        if self._begin is None:
            self._begin, self._begin_step = now, step
        else:
            self._tokens += tokens
            if tokens and now > self._begin:
                self.speed = self._tokens / (now - self._begin)
            if step > self._begin_step:
                left = (now - self._begin) / (step - self._begin_step) * (self.steps - step)
        return Progress(step=step, steps=self.steps, loss=self.loss, tokens_per_second=self.speed, seconds_left=left)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Time inside does not count."""
        start = time.perf_counter()
        yield
        if self._begin is not None:
            self._begin += time.perf_counter() - start

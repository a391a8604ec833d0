"""Micro-batches that are computed ahead of those that have been stored: a few, not all."""

from collections import deque
from typing import Any

import jax

from jprune.runs.activations import Arrays, Batches


class Flight:
    """Lets a few micro-batches run ahead, which keeps all cores busy; not all of them.

    Without waiting, the old and the new values of all micro-batches would be in memory together.
    """

    def __init__(self, batches: Batches | None, ahead: int = 2):
        self._batches = batches
        self._ahead = ahead
        self._flying: deque[tuple[int, Arrays]] = deque()

    def add(self, j: int, arrays: Arrays) -> None:
        """Stores a micro-batch, once it is computed; waits for the one that went a few before it."""
        self._flying.append((j, arrays))
        if len(self._flying) > self._ahead:
            self._land()

    def _land(self) -> None:
        j, arrays = self._flying.popleft()
        jax.block_until_ready(arrays)
        if self._batches is not None:
            self._batches.put(j, arrays)

    def __enter__(self) -> "Flight":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        while kind is None and self._flying:
            self._land()

"""What every stream of batches has, wherever its windows come from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jprune.data import windows
from jprune.errors import JpruneError

Batch = dict[str, np.ndarray]
"""`tokens` int32 [B, L] and `weights` float32 [B, L]: weights[b, t] is the loss weight of predicting tokens[b, t]."""


@dataclass(frozen=True, kw_only=True)
class Stream(Iterable[Batch]):
    """Batches of windows, each shared out equally among processes.

    Attributes:
        batch_size: windows a batch, over all processes.
        seed: of everything that is drawn, from 0 to 2**32 - 1.
        process_index: which of the equal parts of each batch's rows this process gets, from 0.
        process_count: how many parts there are.

    Raises:
        JpruneError: numbers that do not fit together.
    """

    batch_size: int
    seed: int = 0
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        windows.check_count("batch size", self.batch_size)
        if not 0 <= self.seed < 2**32:
            raise JpruneError(f"The seed of the data must be from 0 to {2**32 - 1}; it is {self.seed}.")
        if not 0 <= self.process_index < self.process_count:
            raise JpruneError(f"Process {self.process_index} of {self.process_count}: the first process is number 0.")
        if self.batch_size % self.process_count:
            raise JpruneError(
                f"A batch of {self.batch_size} windows cannot be shared equally by {self.process_count} processes."
            )

    @property
    def mine(self) -> slice:
        """The rows of a global batch that are this process's."""
        share = self.batch_size // self.process_count
        return slice(self.process_index * share, (self.process_index + 1) * share)

    def blank(self, length: int) -> Batch:
        """This process's rows before anything is in them: of weight 0."""
        shape = (self.batch_size // self.process_count, length)
        return {"tokens": np.zeros(shape, np.int32), "weights": np.zeros(shape, np.float32)}


def check_place(state: Mapping[str, Any], *, fingerprint: str, source: str) -> None:
    """An error if a saved place is in a stream of other data, another batch size or another seed."""
    if state.get("data") != fingerprint:
        raise JpruneError(
            f"{source}: the saved place in the data belongs to other data, another window length, batch size or seed; "
            "training can only go on with the same. Start anew in another folder."
        )

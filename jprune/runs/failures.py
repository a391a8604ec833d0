"""What a long run says when it fails, and what is kept of it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import jax

from jprune.checkpoints import writing
from jprune.errors import JpruneError
from jprune.runs import processes


class Kept(Protocol):
    """What of a run outlives a failure, such as a `RunFolder`."""

    @property
    def partial(self) -> Path:
        """Folder in which the result grows."""
        ...

    def close(self) -> str:
        """Leaves the run to be gone on with; says how, or that nothing was written."""
        ...


@contextlib.contextmanager
def explained(kept: Kept, smaller: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Whatever fails inside, Ctrl-C included: keeps what is done, and raises an error that says how to go on.

    Args:
      kept: the run.
      smaller: says what would make the run take less memory, the most telling first.

    Raises:
      JpruneError: for what the user can change: a lost process, too little memory, a full disk, and every JpruneError.
      KeyboardInterrupt: Ctrl-C.
    """
    try:
        yield
    except BaseException as error:
        advice = kept.close()
        if (gone := processes.lost(error)) is not None:
            raise JpruneError(f"{gone}. {advice}") from error
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(advice) from None
        if out_of_memory(error):
            raise JpruneError(f"out of memory; what helps is {'; '.join(smaller())}. {advice}") from error
        if writing.disk_full(error) and not isinstance(error, JpruneError):
            raise JpruneError(f"the disk of {kept.partial} is full; free some space there. {advice}") from error
        if isinstance(error, JpruneError) and advice:
            raise type(error)(f"{error}. {advice}") from error
        raise


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the host or of a device, was not enough."""
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )

"""What a run has done so far: read and checked when it begins, written behind it as it goes on.

Nothing is believed without its checksum: parameters are read back from the result, activations from the run folder.
What does not check out is done again; `route` says in which order, from which activations.
"""

import dataclasses
import functools
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jprune.checkpoints import writing
from jprune.checkpoints.huggingface import Writer
from jprune.pipeline.oneshot.cut import CutWriter
from jprune.pipeline.oneshot.report import KernelReport
from jprune.runs import processes
from jprune.runs.activations import Batches, Room, Specs
from jprune.runs.background import Background
from jprune.runs.folder import RunFolder, read_mark, write_mark
from jprune.trees import count_zeros

SHARE = 0.1
"""Of the time, that saving activations may take; they are saved after every part as long as it takes less."""


class Step(NamedTuple):
    """One part to go through."""

    unit: int
    """Its index."""
    prune: bool
    """False: it has been pruned, and only its output is wanted."""
    load: bool
    """Whether its input is to be loaded: the saved activations, or the embeddings for the first part."""


def route(todo: Collection[int], saved: Collection[int]) -> list[Step]:
    """The parts to go through so that those in `todo` get done.

    Args:
      todo: indices of the parts that are not done.
      saved: indices of the parts before which the activations are known, besides 0.
    """
    steps: list[Step] = []
    at: int | None = None  # the part whose input is at hand
    for index in sorted(todo):
        start = max((s for s in {0, *saved} if s <= index), default=0)
        jump = at is None or start > at
        at = start if jump or at is None else at
        steps += [Step(i, i == index, jump and i == at) for i in range(at, index + 1)]
        at = index + 1
    return steps


class Journal:
    """The record of one run.

    Args:
      run: its folder.
      result: where the parameters go.
      counted: paths of the parameters whose zeros are counted.
      room: memory for activations.

    Attributes:
      zeros: in the counted parameters that are done.
    """

    def __init__(self, run: RunFolder, result: Writer | CutWriter, counted: Collection[str], room: Room):
        self.run = run
        self.room = room
        self._result = result
        self._counted = frozenset(counted)
        self._marks: dict[str, dict[str, Any]] = {}
        self._saved_at: float | None = None
        self._cost = 0.0
        self._saved = self._saved_by_all = 0  # the latest activations, by the index of the part that starts from them

    @property
    def zeros(self) -> int:
        """Zeros in the counted parameters of the parts that are done."""
        return sum(mark["zeros"] for mark in self._marks.values())

    def done(self, name: str, paths: Iterable[str]) -> bool:
        """Whether a part is done, and its parameters lie undamaged in the result."""
        mark = self.run.marked(name)
        if mark is None or set(mark["tensors"]) != set(paths) or not self._result.keep(mark["tensors"]):
            return False
        self._marks[name] = mark
        return True

    def reports(self, name: str) -> list[KernelReport]:
        """On the pruned kernels of a part that is done."""
        return [KernelReport.from_json(report) for report in self._marks[name]["kernels"]]

    def read(self, path: str) -> np.ndarray:
        """A parameter of a part that is done."""
        return self._result.read(path)

    def batches(self, index: int, specs: Sequence[Specs], background: Background, *, save: bool) -> Batches:
        """Takes the activations before part `index`; if they are to be saved, what stays in memory is written too."""
        return Batches(specs, self.room, self._hidden(index), background if save else None)

    def due(self) -> bool:
        """Whether enough time has passed to save activations again, as process 0 sees it; called by all alike.

        The clock that is read only ever goes forward.
        """
        due = self._saved_at is None or time.monotonic() - self._saved_at >= self._cost / SHARE
        everywhere = processes.gathered([due, self._saved])
        self._saved_by_all = min(saved for _, saved in everywhere)
        return everywhere[0][0]

    def load(self, index: int, specs: Sequence[Specs]) -> Batches | None:
        """The saved activations before part `index`; None if there are none, or if they are damaged."""
        checksums = read_mark(self._hidden(index).with_suffix(".json"))
        batches = Batches(specs, self.room, self._hidden(index))
        return batches if checksums and batches.intact(checksums) else None

    def save(
        self,
        name: str,
        index: int,
        params: Mapping[str, jax.Array | np.ndarray],
        kernels: Sequence[KernelReport],
        hidden: Batches | None,
        background: Background,
        *,
        written: bool = False,
    ) -> None:
        """Writes the parameters of a part, and then marks it, in the background; process 0 does.

        The activations after it are saved by every process, as far as it has them.

        Args:
          name: of the part.
          index: of the part.
          params: by path in the model; each is written once in a run.
          kernels: reports on those that were pruned.
          hidden: the activations after it, if they are to be saved.
          background: runs it.
          written: the parameters are in the result already; only the activations are new.
        """
        written = written or not processes.is_first()
        held = {} if written else dict(params)
        job = functools.partial(self._save, name, index, held, tuple(kernels), hidden, written)
        background.submit(job, sum(value.nbytes for value in held.values()))

    def _save(
        self,
        name: str,
        index: int,
        params: Mapping[str, jax.Array | np.ndarray],
        kernels: tuple[KernelReport, ...],
        hidden: Batches | None,
        written: bool,
    ) -> None:
        if not written:
            tensors = {path: self._result.write(path, value) for path, value in params.items()}
            zeros = sum(count_zeros(np.asarray(params[path])) for path in params if path in self._counted)
            reports = [dataclasses.asdict(report) for report in kernels]
            mark = {"tensors": tensors, "zeros": zeros, "kernels": reports}
            self._result.sync(tensors)
            self.run.mark(name, mark)
            self._marks[name] = mark
        if hidden is not None and hidden.saved:
            with writing.explained(self.run.hidden):
                write_mark(self._hidden(index + 1).with_suffix(".json"), hidden.synced())
            self._saved_at, self._cost, self._saved = time.monotonic(), hidden.seconds, index + 1
            # Others may still be at the ones before, and all must have those that a run is to go on from.
            needed = min(self._saved, self._saved_by_all) if processes.are_many() else self._saved
            for file in self.run.hidden.glob("*.*"):
                if file.stem.isdecimal() and int(file.stem) < needed:
                    file.unlink()

    def _hidden(self, index: int) -> Path:
        return self.run.hidden / f"{index:05}.bin"

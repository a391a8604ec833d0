"""Writes packed folders, parameter by parameter."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jprune import trees
from jprune.checkpoints import beside, writing
from jprune.checkpoints.dtypes import cast
from jprune.checkpoints.model import Model
from jprune.checkpoints.packed.layout import DENSE, FORMAT_VERSION, INDEX, Stored, header, part, prefix
from jprune.checkpoints.source import FLOAT_DTYPES
from jprune.errors import JpruneError
from jprune.models.parameters import block_kernels, is_stack
from jprune.sparse import Packing, rounding

PART_BYTES = 2**28
"""Arrays are written in files of at least this size, which are in memory at one time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedReport:
    """What became of a kernel."""

    path: str
    format: str
    """That of `pallas_kernels`, or "dense"."""
    bytes_before: int
    """Of the array that came in."""
    bytes: int
    """Of what is stored."""
    error: float
    """What rounding cost: the norm of the difference over that of the kernel."""


class Writer:
    """Takes parameters one by one, in any order, as `huggingface.Writer` does; a file of them is in memory at a time.

    Args:
        folder: an empty folder.
        checkpoint: where config and tokenizer come from, and which parameters there must be.
        dtypes: the dtype of each parameter, by path; those not named keep what they come in.
        packing: how kernels are stored.
        where: regular expressions that find the kernels to pack; by default all kernels of the blocks.
        saturate: see `jprune.checkpoints.dtypes.cast`.
        done: of the files that an earlier writer has left in the folder, what it told `mark` of them, in their order.
        mark: called with the name of a file when it has reached the disk, and what a later writer must know of it.

    Attributes:
        reports: of the kernels that were to be packed.

    Raises:
        JpruneError: an expression that finds no kernel, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Model,
        dtypes: Mapping[str, Any] | None = None,
        *,
        packing: Packing = Packing(),  # noqa: B008 (frozen)
        where: Sequence[str] = (),
        saturate: bool = False,
        done: Iterable[Mapping[str, Any]] = (),
        mark: Callable[[str, dict[str, Any]], None] = lambda *_: None,
    ):
        kernels = block_kernels(checkpoint.config)
        self._inputs = {path: kernels[path] for path in trees.choose(kernels, list(where) or None)}
        self._folder, self._checkpoint, self._dtypes, self._saturate = folder, checkpoint, dtypes or {}, saturate
        self._packing, self._mark = packing, mark
        self._held: dict[str, np.ndarray] = {}
        self._stored: dict[str, Stored] = {}
        self._parts = 0
        self.reports: list[PackedReport] = []
        for known in done:
            self._parts += 1
            self._stored |= {path: Stored.from_json(line) for path, line in known["parameters"].items()}
            self.reports += [PackedReport(**report) for report in known["reports"]]
        self._pending = {path: shape for path, shape in checkpoint.shapes.items() if path not in self._stored}
        self._told = len(self.reports)

    @property
    def missing(self) -> tuple[str, ...]:
        """The parameters that are not written yet, in the checkpoint's order."""
        return tuple(self._pending)

    def write(self, path: str, array: np.ndarray | jax.Array) -> None:
        """Packs one parameter, in our layout, or takes it as it is; and writes a file when there is enough for one.

        Raises:
            JpruneError: no such parameter, another shape, numbers that do not fit, or a format that does not hold it.
        """
        if path not in self._pending:
            raise JpruneError(f"{path!r} is not a parameter of this model, or was written before")
        values = np.asarray(array)
        if values.shape != self._pending[path].shape:
            raise JpruneError(f"{path}: expected shape {self._pending[path].shape}, got {values.shape}")
        values = cast(values, self._dtypes.get(path, values.dtype), path, saturate=self._saturate)
        file = part(self._parts + 1)
        if path in self._inputs and (packed := self._pack(path, values)) is not None:
            self._stored[path] = Stored(file, values.shape, *packed)
        else:
            self._held[path] = values
            self._stored[path] = Stored(file, values.shape, values.dtype.name, DENSE)
        del self._pending[path]
        if sum(held.nbytes for held in self._held.values()) >= PART_BYTES:
            self._write_part()

    def _pack(self, path: str, values: np.ndarray) -> tuple[str, str] | None:
        """Packs a kernel, or a stack of them, and gives dtype and format; None if it stays dense."""
        stack = is_stack(path)
        kernels = values if stack else values[None]
        packed = self._packing.pack(kernels, self._inputs[path], path)
        if packed is None:
            self.reports.append(
                PackedReport(path=path, format=DENSE, bytes_before=values.nbytes, bytes=values.nbytes, error=0.0)
            )
            return None
        for number, kernel in enumerate(packed):
            begin = prefix(path, number if stack else None)
            self._held |= {f"{begin}{name}": array for name, array in kernel.arrays().items()}
        exact = packed[0].packed.values == values.dtype.name
        self.reports.append(
            PackedReport(
                path=path,
                format=packed[0].packed.format,
                bytes_before=values.nbytes,
                bytes=sum(kernel.nbytes for kernel in packed),
                error=0.0 if exact else rounding(kernels, packed),
            )
        )
        return packed[0].dtype.name, packed[0].packed.format

    def _write_part(self) -> None:
        self._parts += 1
        metadata = {"format": "jprune packed", "version": str(FORMAT_VERSION)}
        with writing.explained(self._folder):
            writing.require_space(self._folder, sum(held.nbytes for held in self._held.values()))
            place = self._folder / part(self._parts)
            place.unlink(missing_ok=True)  # half of it, from a process that was killed
            file = writing.SafetensorsFile(place, header(self._held), metadata=metadata)
            for name in list(self._held):
                file.write(name, self._held.pop(name))
            file.sync()
        stored = {path: dataclasses.asdict(own) for path, own in self._stored.items() if own.file == place.name}
        reports = [dataclasses.asdict(report) for report in self.reports[self._told :]]
        self._told = len(self.reports)
        self._mark(place.name, {"parameters": stored, "reports": reports})

    def close(self) -> None:
        """Completes the folder.

        Raises:
            JpruneError: some parameters were never written.
        """
        if self._pending:
            raise JpruneError(f"{len(self._pending)} parameters were not written, first {next(iter(self._pending))}")
        if self._held:
            self._write_part()
        dtypes = {path: FLOAT_DTYPES[stored.dtype] for path, stored in self._stored.items()}
        lines = {path: dataclasses.asdict(stored) for path, stored in self._stored.items()}
        with writing.explained(self._folder):
            beside.write(self._folder, self._checkpoint, dtypes)
            writing.write_json(self._folder / INDEX, {"format_version": FORMAT_VERSION, "parameters": lines})

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

"""A grid of one-shot runs on one model, each result held against the dense model on the same windows.

Every cell is a run of its own, as `prune_model` does it alone: methods go block by block and calibrate each block on
what the pruned blocks before it give, so what one cell has gathered is nothing to another. What they share is what
does not depend on them: the model is opened once, each calibration text is tokenised once, and the dense model passes
the evaluation windows once; what its last block gives stays in memory until all cells are measured.

The folder of a sweep has ``sweep.json``, written anew after each cell, and the models while they are needed. A cell
that is done is not done again, and one that was interrupted goes on where it was.
"""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike

from jprune import paths
from jprune.checkpoints import Checkpoint, load, record, writing
from jprune.checkpoints.dtypes import activation_dtype
from jprune.checkpoints.formats import Format
from jprune.data.held_out import beside
from jprune.data.windows import Windows
from jprune.errors import JpruneError
from jprune.evaluate.distance import Distance, Reference
from jprune.methods import Method
from jprune.pipeline.auto import Auto, decided
from jprune.pipeline.compare import Compared, compared, plain
from jprune.pipeline.oneshot.report import Report
from jprune.pipeline.oneshot.run import prune_model
from jprune.pipeline.recipe import Recipe, calibration_windows
from jprune.pipeline.registry import name_of
from jprune.runs import failures, memory
from jprune.runs.lock import Lock
from jprune.runs.report import Progress, environment
from jprune.runs.stopwatch import forget_peak_memory

NAME = "sweep.json"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    name: str
    """Of its method and options, as they were typed; cells of one name are a line of the plot."""
    method: Method | Auto
    recipe: Recipe
    format: Format = "hf"
    memory: int | None = None
    """Bytes that pruning may take."""

    @property
    def title(self) -> str:
        """What it is called where it stands alone."""
        return f"{self.name} {self.recipe.pattern}"

    def settings(self, calibration: Windows | None) -> dict[str, Any]:
        """What its result depends on, beside the model."""
        own = {"name": name_of(self.method), **dataclasses.asdict(self.method)}
        return plain(
            {
                "name": self.name,
                "pattern": str(self.recipe.pattern),
                "method": own,
                "recipe": self.recipe.json(),
                "calibration": calibration and calibration.described(),
                "format": self.format,
            }
        )


def sweep(
    model: Checkpoint | str | Path,
    cells: Sequence[Cell],
    out: str | Path,
    *,
    evaluation: Callable[[Checkpoint], Windows],
    dtype: str | None = None,
    keep_models: bool = False,
    mesh: Mesh | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    failed: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Prunes a model as each cell says, measures every result, and keeps what came out in ``sweep.json``.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      cells: the runs, in their order.
      out: folder of the sweep; what an earlier call with the same arguments has done in it is not done again.
      evaluation: gives the windows that the models are measured on.
      dtype: of the activations while they are measured, see `jprune.checkpoints.dtypes.activation_dtype`.
      keep_models: leave the results in the folder ``models``, and do not remove each when it is measured.
      mesh: the devices, by default all of them.
      progress: called often; phases begin with the number of the cell.
      failed: called with a line when a cell fails; the others go on.

    Returns:
      What sweep.json has: ``grid``, what was asked for; ``dense``, the model itself; ``cells``, of each what came of
      it, or ``failed``, why nothing did.

    Raises:
      JpruneError: `out` has another sweep, or something else; a text that cannot be read. Nothing is done then.
      KeyboardInterrupt: Ctrl-C; what is done is kept.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    tokens, texts = evaluation(checkpoint), _Texts(checkpoint)
    grid = {
        "model": checkpoint.described(),
        "evaluation": tokens.described(),
        "cells": [cell.settings(texts.of(cell)) for cell in cells],
    }
    with _held(paths.real(out)) as folder:
        state = _begun(folder, plain(grid))
        work = _Sweep(
            checkpoint=checkpoint,
            tokens=tokens,
            folder=folder,
            dtype=activation_dtype(checkpoint, dtype),
            mesh=mesh,
            keep=keep_models,
            found=state,
        )
        for number, cell in enumerate(cells):
            title = f"{number + 1}/{len(cells)}"

            def tell(step: Progress, title: str = title) -> None:
                progress(dataclasses.replace(step, phase=f"{title} {step.phase}"))

            try:
                work.do(number, cell, texts.of(cell), tell)
            except KeyboardInterrupt:
                done = sum("perplexity" in (own or {}) for own in state["cells"])
                raise KeyboardInterrupt(
                    f"{done} of {len(cells)} cells are done and kept in {folder}; the same command goes on"
                ) from None
            except (JpruneError, OSError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not failures.out_of_memory(error):
                    raise
                work.failed(number, "out of memory" if failures.out_of_memory(error) else str(error))
                failed(f"{cell.title} failed: {error}")
    return state


class _Texts:
    """The calibration windows of cells, of each text, number, length and seed read once."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._known: dict[Any, Windows] = {}

    def of(self, cell: Cell) -> Windows | None:
        """The windows of a cell; None if its method needs none, whatever its allocation may read."""
        method, recipe, _ = decided(cell.method, cell.recipe)
        if method.statistic is None:
            return None
        text = (str(recipe.calibration), str(recipe.calibration_proportions))
        key = (*text, recipe.samples, recipe.sequence_length, recipe.seed)
        if key not in self._known:
            self._known[key] = calibration_windows(self._checkpoint, recipe)
        return self._known[key]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sweep:
    """A sweep in a folder that is held."""

    checkpoint: Checkpoint
    tokens: Windows
    folder: Path
    dtype: DTypeLike
    mesh: Mesh | None
    keep: bool
    found: dict[str, Any]
    """What sweep.json has, or will have."""

    def do(self, number: int, cell: Cell, calibration: Windows | None, tell: Callable[[Progress], None]) -> None:
        """Does a cell that is not done."""
        name = re.sub(r"[^\w.=]+", "-", cell.title).strip("-")[:60]
        place = self.folder / "models" / f"{number + 1:02}-{name}"
        if "perplexity" not in (self.found["cells"][number] or {}):
            report = self._pruned(cell, place, calibration, tell)
            (reference, first), result = self._reference, load(place)
            distance = reference.to(result, progress=self._told(tell))
            found = compared(cell.title, result, distance, first)
            apart = beside(dataclasses.replace(self.tokens, notices=()), calibration)
            told = {**_measured(found), **_spent(report), "overlap": apart.overlap}
            self._write(number, told | {"notices": [*report.notices, *apart.notices]})
        if not self.keep:
            shutil.rmtree(place, ignore_errors=True)

    def failed(self, number: int, why: str) -> None:
        """Notes that a cell failed."""
        self._write(number, {"failed": why})

    def _pruned(self, cell: Cell, place: Path, calibration: Windows | None, tell: Callable[[Progress], None]) -> Report:
        """The report of the run of a cell, whose result may be there already."""
        if (place / record.NAME).is_file():  # it appears whole, and was not yet measured
            return Report.from_record(record.read(place), place)
        forget_peak_memory()
        spec = cell.recipe.calibration if calibration is None else calibration
        recipe = dataclasses.replace(cell.recipe, calibration=spec)
        options = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
        report = prune_model(
            self.checkpoint,
            place,
            method=cell.method,
            format=cell.format,
            memory=cell.memory,
            resume=True,
            mesh=self.mesh,
            progress=tell,
            **options,
        )
        memory.trim()
        return report

    @functools.cached_property
    def _reference(self) -> tuple[Reference, Distance]:
        """The dense model, with the windows passed through it; and its distance from itself."""
        reference = Reference(self.checkpoint, self.tokens.tokens, dtype=self.dtype, mesh=self.mesh)
        first = reference.to_itself()
        dense = _measured(compared(self.checkpoint.source, self.checkpoint, first, first))
        self.found.update(dense=dense, **environment(self.dtype))
        return reference, first

    def _told(self, tell: Callable[[Progress], None]) -> Callable[[int, int], None]:
        return lambda done, total: tell(Progress(float(done), total, self.tokens.source, "compare"))

    def _write(self, number: int, contents: dict[str, Any]) -> None:
        self.found["cells"][number] = plain(contents)
        writing.replace(self.folder / NAME, json.dumps(self.found, indent=1).encode())


def _measured(found: Compared) -> dict[str, Any]:
    """What is kept of a model that was held against the dense one."""
    own = dataclasses.asdict(found)
    return plain({name: own[name] for name in own if name not in ("model", "kernels", "layers")})


def _spent(report: Report) -> dict[str, Any]:
    """What is kept of the report of a run."""
    return {
        "chosen": report.chosen,
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
        "notices": list(report.notices),
    }


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """The folder of a sweep, made if it is not there, and nobody else's meanwhile."""
    with writing.explained(folder):
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / NAME).is_file())):
            raise JpruneError(f"`out` {folder} exists and has no {NAME}: no sweep was begun there; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
    held = Lock(folder)
    try:
        yield folder
    finally:
        held.release()
        (folder / "lock").unlink(missing_ok=True)
        for left in (folder / "models", folder):
            with contextlib.suppress(OSError):
                left.rmdir()  # if it is empty


def _begun(folder: Path, grid: dict[str, Any]) -> dict[str, Any]:
    """What sweep.json has of the same sweep, or of one of which nothing is done."""
    if not (folder / NAME).exists():
        return {"format_version": FORMAT_VERSION, "grid": grid, "dense": None, "cells": [None] * len(grid["cells"])}
    state = writing.read_json(folder / NAME)
    if (version := state.get("format_version")) != FORMAT_VERSION:
        raise JpruneError(f"{folder / NAME}: format_version {version!r}, expected {FORMAT_VERSION}; update jprune")
    known = state.get("grid") or {}
    if known != grid:
        parts = {"model": "the model", "evaluation": "the evaluation text", "cells": "methods, options or sparsities"}
        other = ", ".join(words for name, words in parts.items() if known.get(name) != grid[name])
        raise JpruneError(
            f"`out` {folder} has another sweep, with other values of {other}; give another folder, or the words that "
            "it was begun with"
        )
    return state

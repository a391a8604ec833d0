"""One structured run: a checkpoint in, a smaller checkpoint and its record out.

Structured pruning changes no weight that stays. So the smaller model is a view of the larger one from the first step
on (`Checkpoint.select`): it is measured, pruned further and written as any checkpoint is, a block at a time.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jprune.checkpoints import Checkpoint, formats, load, record
from jprune.checkpoints.dtypes import activation_dtype
from jprune.checkpoints.formats import Format
from jprune.data import windows
from jprune.data.for_model import evaluation_windows, suggested_evaluation_length
from jprune.errors import JpruneError
from jprune.evaluate.perplexity import Perplexity, perplexity
from jprune.pipeline.registry import name_of
from jprune.pipeline.shrink.scores import chosen, smaller_model, units_of
from jprune.runs import output
from jprune.runs.report import Progress, RunReport, environment
from jprune.runs.stopwatch import Stopwatch, peak_memory_bytes
from jprune.structured.base import UnitMethod
from jprune.structured.selection import Target
from jprune.structured.units import Units, positions

StructuredMethod = UnitMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkReport(RunReport):
    """The result of a structured run."""

    method: UnitMethod
    parameters: tuple[int, int]
    """Numbers of parameters before and after."""
    sizes: tuple[dict[str, int], ...]
    """The sizes of every layer of the result."""
    layers: tuple[int, ...]
    """Which layers of the original these are."""

    def own_json(self) -> dict[str, Any]:
        """The fields of ``--json`` that only structured runs have."""
        return {
            "method": name_of(self.method),
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "layers": list(self.layers),
            "sizes": list(self.sizes),
        }


def shrink_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    method: UnitMethod,
    target: Target | None = None,
    calibration: windows.Spec = "pydoc",
    evaluate: windows.Spec | None = None,
    evaluate_length: int | None = None,
    format: Format | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> ShrinkReport:
    """Removes heads, channels, hidden dimensions or layers of a model and writes the smaller one.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      out: folder of the result; it appears when everything is done.
      method: e.g. `LLMPruner()`.
      target: how small; methods that say themselves which layers stay need none.
      calibration: source of the text that importance is read from, or token windows [n, length].
      evaluate: source of a text, or token windows, whose perplexity is measured before and after.
      evaluate_length: tokens a window of it; by default 2048 or the model's context (512 for the demo model).
      format: see `jprune.checkpoints.formats`; by default "hf" if all layers end up equal, else "jprune".
      dtype: of the activations; float32 on CPU, elsewhere what the weights have. Gradients are float32.
      overwrite: replace an `out` that an earlier run wrote.
      progress: called often.

    Raises:
      JpruneError: anything that does not fit; `out` is then untouched.
    """
    stopwatch = Stopwatch()
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    out = Path(out).expanduser()
    output.check(out, overwrite=overwrite, source=checkpoint.source)
    check_target(method, target)
    _refuse_early(checkpoint, method, target, format)
    activations = activation_dtype(checkpoint, dtype)
    with stopwatch.phase("data"):
        examples = calibration_examples(checkpoint, method, calibration)
        if evaluate_length is None and evaluate is not None:
            evaluate_length = suggested_evaluation_length(checkpoint, evaluate)
        evaluation = None if evaluate is None else evaluation_windows(checkpoint, evaluate, length=evaluate_length)

    def measure(weights: Checkpoint, phase: str) -> Perplexity | None:
        if evaluation is None:
            return None
        with stopwatch.phase("evaluation"):
            return perplexity(
                weights,
                evaluation.tokens,
                dtype=activations,
                progress=lambda done, total: progress(Progress(float(done), total, evaluation.source, phase)),
            )

    with output.new_folder(out, overwrite=overwrite, source=checkpoint.source) as folder:
        before = measure(checkpoint, "evaluate before")
        with stopwatch.phase("importance"):
            smaller, layers = smaller_model(checkpoint, method, target, examples, activations, progress)
        chosen = format or ("hf" if smaller.config.uniform else "jprune")
        with stopwatch.phase("io"):
            told = formats.write(folder, smaller, format=chosen)
        try:
            after = measure(load(folder), "evaluate after")
        except JpruneError as error:  # the work is not thrown away for it
            after, told = None, (*told, f"the perplexity after pruning could not be measured: {error}")
        report = ShrinkReport(
            out=out,
            method=method,
            parameters=(checkpoint.parameters, smaller.parameters),
            sizes=smaller.sizes,
            layers=layers,
            before=before,
            after=after,
            seconds=stopwatch.seconds(),
            peak_memory_bytes=peak_memory_bytes(),
            notices=tuple(dict.fromkeys(n for w in (examples, evaluation) if w for n in w.notices)) + told,
        )
        recipe = {**method.described(), **(target.described() if target else {})}
        contents = {
            **report.json(),
            "recipe": {"method": name_of(method), **recipe, "calibration": examples.source if examples else None},
            "model": checkpoint.described(),
            "calibration": examples and examples.described(),
            "evaluation": evaluation and evaluation.described(),
            "format": chosen,
            "notices": list(report.notices),
            **environment(activations),
        }
        record.write(folder, contents)
    return report


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkPlan:
    """What a structured run would do, as far as shapes tell."""

    parameters: tuple[int, int | None]
    """Before and after; None where only importance can tell."""
    sizes: tuple[dict[str, int], ...] | None
    """Of every layer of the result; None where only importance can tell."""
    units: tuple[Units, ...]
    """What could be removed."""


def plan_shrink(
    model: Checkpoint | str | Path, *, method: UnitMethod, target: Target | None = None, **options: Any
) -> ShrinkPlan:
    """What `shrink_model` would do, without a weight or a text; a folder with a config.json is enough.

    Raises:
      JpruneError: as `shrink_model`, for what can be known from shapes.
    """
    del options
    checkpoint = model if isinstance(model, Checkpoint) else load(model, weights=False)
    check_target(method, target)
    units = units_of(checkpoint, method) if target else ()
    smaller = planned(checkpoint, method, target)
    return ShrinkPlan(
        parameters=(checkpoint.parameters, smaller.parameters if smaller else None),
        sizes=smaller.sizes if smaller else None,
        units=units,
    )


def check_target(method: UnitMethod, target: Target | None) -> None:
    """Raises `JpruneError` if a method lacks a target, or is given one that it has no use for."""
    wanted = bool(method.kinds)  # else the method says itself which layers stay
    if wanted and target is None:
        raise JpruneError(
            "say how small the model is to be: a share of units (--ratio), a share of parameters (--parameter-ratio) "
            "or a number of parameters (--parameters)"
        )
    if target is not None and not wanted:
        raise JpruneError(f"{name_of(method)}: the number of layers is its target; leave out the ratio")


def calibration_examples(checkpoint: Checkpoint, method: UnitMethod, source: windows.Spec) -> windows.Windows | None:
    """The texts that importance is read from; None for methods that read only weights."""
    if method.needs in ("nothing", "weights"):
        return None
    rows = windows.is_rows(source)
    return windows.calibration(
        source,
        checkpoint.tokenizer,
        samples=None if rows else method.examples,
        length=None if rows else min(method.sequence_length, checkpoint.config.context),
        seed=method.seed,
        vocab_size=checkpoint.config.vocab,
        context=checkpoint.config.context,
    )


def planned(checkpoint: Checkpoint, method: UnitMethod, target: Target | None) -> Checkpoint | None:
    """The sizes of the result as a view; None where only importance can tell.

    Which units stay does not matter for sizes; how many do depends on importance only where all are ranked together.
    """
    if not method.kinds:
        return checkpoint.select({}, method.layers_left(checkpoint.config.layers))
    if method.counts_follow_scores:
        return None
    assert target is not None  # check_target
    units = units_of(checkpoint, method)
    alike = {u.name: np.zeros(u.count) for u in units}
    kept = chosen(checkpoint, units, alike, method, target, checkpoint.parameters, None)
    return checkpoint.select(positions(units, kept))


def _refuse_early(checkpoint: Checkpoint, method: UnitMethod, target: Target | None, format: Format | None) -> None:
    """Raises, before the work, what is certain to be raised after it."""
    smaller = planned(checkpoint, method, target)
    if smaller is not None and format is not None:
        formats.check(smaller, format)

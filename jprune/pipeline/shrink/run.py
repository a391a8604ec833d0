"""One structured run: a checkpoint in, a smaller checkpoint and its record out.

Structured pruning changes no weight that stays. So the smaller model is a view of the larger one from the first step
on (`Checkpoint.select`): it is measured, pruned further and written as any checkpoint is, a block at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jprune.anatomy.units import units_of_blocks, units_of_hidden
from jprune.checkpoints import Checkpoint, formats, load, record
from jprune.checkpoints.dtypes import activation_dtype
from jprune.checkpoints.formats import Format
from jprune.data import windows
from jprune.data.for_model import evaluation_windows, suggested_evaluation_length
from jprune.errors import JpruneError
from jprune.evaluate import gradients
from jprune.evaluate.influence import block_influences
from jprune.evaluate.perplexity import Perplexity, perplexity
from jprune.runs import output
from jprune.runs.report import Progress, RunReport, environment
from jprune.runs.stopwatch import Stopwatch, peak_memory_bytes
from jprune.structured import DropLayers, LLMPruner, importance
from jprune.structured.selection import Kept, Target
from jprune.structured.units import Units, positions

StructuredMethod = LLMPruner | DropLayers
STRUCTURED_METHODS: dict[str, type[StructuredMethod]] = {"llm-pruner": LLMPruner, "layers": DropLayers}
"""By the name on the command line."""
Scores = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkReport(RunReport):
    """The result of a structured run."""

    method: StructuredMethod
    parameters: tuple[int, int]
    """Numbers of parameters before and after."""
    sizes: tuple[dict[str, int], ...]
    """The sizes of every layer of the result."""
    layers: tuple[int, ...]
    """Which layers of the original these are."""

    def own_json(self) -> dict[str, Any]:
        """The fields of ``--json`` that only structured runs have."""
        return {
            "method": method_name(self.method),
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "layers": list(self.layers),
            "sizes": list(self.sizes),
        }


def shrink_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    method: StructuredMethod,
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
    out = Path(out)
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
            smaller, layers = _smaller(checkpoint, method, target, examples, activations, progress)
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
        contents = {
            **report.json(),
            "recipe": {
                "method": method_name(method),
                **dataclasses.asdict(method),
                **(target.described() if target else {}),
                "calibration": examples.source if examples else None,
            },
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
    model: Checkpoint | str | Path, *, method: StructuredMethod, target: Target | None = None, **options: Any
) -> ShrinkPlan:
    """What `shrink_model` would do, without a weight or a text; a folder with a config.json is enough.

    Raises:
      JpruneError: as `shrink_model`, for what can be known from shapes.
    """
    del options
    checkpoint = model if isinstance(model, Checkpoint) else load(model, weights=False)
    check_target(method, target)
    units = _units(checkpoint, method) if isinstance(method, LLMPruner) and target else ()
    smaller = planned(checkpoint, method, target)
    return ShrinkPlan(
        parameters=(checkpoint.parameters, smaller.parameters if smaller else None),
        sizes=smaller.sizes if smaller else None,
        units=units,
    )


def check_target(method: StructuredMethod, target: Target | None) -> None:
    """Raises `JpruneError` if a method lacks a target, or is given one that it has no use for."""
    wanted = isinstance(method, LLMPruner) and method.mode != "layer"
    if wanted and target is None:
        raise JpruneError(
            "say how small the model is to be: a share of units (--ratio), a share of parameters (--parameter-ratio) "
            "or a number of parameters (--parameters)"
        )
    if target is not None and not wanted:
        raise JpruneError(f"{method_name(method)}: the number of layers is its target; leave out the ratio")


def method_name(method: StructuredMethod) -> str:
    """The name a method has on the command line."""
    return next(name for name, kind in STRUCTURED_METHODS.items() if isinstance(method, kind))


def calibration_examples(
    checkpoint: Checkpoint, method: StructuredMethod, source: windows.Spec
) -> windows.Windows | None:
    """The texts that importance is read from; None for methods that read only weights."""
    if isinstance(method, LLMPruner) and not (method.gradients or method.squares):
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


def planned(checkpoint: Checkpoint, method: StructuredMethod, target: Target | None) -> Checkpoint | None:
    """The sizes of the result as a view; None where only importance can tell.

    Which units stay does not matter for sizes; how many do depends on importance only where all are ranked together.
    """
    if isinstance(method, DropLayers):
        return checkpoint.select({}, method.kept(np.zeros(checkpoint.config.layers)))
    if method.layers is not None:
        return checkpoint.select({}, method.kept_layers(checkpoint.config.layers))
    if method.globally:
        return None
    assert target is not None  # check_target
    units = _units(checkpoint, method)
    alike = {u.name: np.zeros(u.count) for u in units}
    kept = _chosen(checkpoint, units, alike, method, target, checkpoint.parameters, None)
    return checkpoint.select(positions(units, kept))


def _refuse_early(
    checkpoint: Checkpoint, method: StructuredMethod, target: Target | None, format: Format | None
) -> None:
    """Raises, before the work, what is certain to be raised after it."""
    smaller = planned(checkpoint, method, target)
    if smaller is not None and format is not None:
        formats.check(smaller, format)


def _smaller(
    checkpoint: Checkpoint,
    method: StructuredMethod,
    target: Target | None,
    examples: windows.Windows | None,
    dtype: Any,
    progress: Callable[[Progress], None],
) -> tuple[Checkpoint, tuple[int, ...]]:
    """The smaller model, and which layers of the original it has."""
    everything = tuple(range(checkpoint.config.layers))
    if isinstance(method, DropLayers):
        assert examples is not None
        influences = block_influences(
            checkpoint,
            examples.tokens,
            dtype=dtype,
            progress=lambda done, total: progress(Progress(float(done), total, "influence of layers", "importance")),
        )
        layers = method.kept(influences)
        return checkpoint.select({}, layers), layers
    if method.layers is not None:
        layers = method.kept_layers(checkpoint.config.layers)
        return checkpoint.select({}, layers), layers
    assert target is not None
    whole, view = checkpoint.parameters, checkpoint
    # Found once: in a smaller model the same trace may give units of other kinds (one KV head is no group).
    units = _units(checkpoint, method)
    initial = {u.name: u.count for u in units}
    for step in range(1, method.steps + 1):
        scores = _scores(view, units, method, step, examples, functools.partial(_report, progress, step, method.steps))
        kept = _chosen(view, units, scores, method, target.step(step, method.steps, whole), whole, initial)
        keep = positions(units, kept)
        view, units = view.select(keep), tuple(u.after(kept[u.name], keep) for u in units)
    return view, everything


def _report(progress: Callable[[Progress], None], step: int, steps: int, done: int, total: int) -> None:
    text = f"step {step} of {steps}" if steps > 1 else "gradients and weights"
    progress(Progress(float(done + (step - 1) * total), total * steps, text, "importance"))


def _units(checkpoint: Checkpoint, method: LLMPruner) -> tuple[Units, ...]:
    if method.mode == "channel":
        return (units_of_hidden(checkpoint),)
    return method.prunable(units_of_blocks(checkpoint, method.kinds), checkpoint.config.layers)


def _chosen(
    view: Checkpoint,
    units: tuple[Units, ...],
    scores: Scores,
    method: LLMPruner,
    target: Target,
    whole: int,
    initial: Mapping[str, int] | None,
) -> Kept:
    """One step: the units that the scores and the target leave."""

    def choose(ratio: float) -> Kept:
        return method.select(units, scores, ratio, initial=initial)

    now = view.parameters

    def count(kept: Kept) -> int:
        return now - sum((u.count - len(kept[u.name])) * u.parameters for u in units)

    return target.reach(choose, count, whole)


def _scores(
    view: Checkpoint,
    units: tuple[Units, ...],
    method: LLMPruner,
    step: int,
    examples: windows.Windows | None,
    progress: Callable[[int, int], None],
) -> Scores:
    """The importance of every unit. Weights, and gradients where they are needed, come a block at a time and go."""
    if method.importance == "random":
        return {u.name: method.score(u, step=step) for u in units}
    criterion = method.importance
    collected: dict[str, importance.Vectors] = {u.name: {} for u in units}

    def visit(prefix: str, params: Any, mean: Any = None, square: Any = None) -> None:
        for u in units:
            if u.layer is None or prefix == f"blocks/{u.layer}":
                collected[u.name] |= importance.vectors(u, criterion, params, mean, square, prefix=prefix)

    ends = any(u.layer is None for u in units)
    if examples is None:
        prefixes = [f"blocks/{i}" for i in range(view.config.layers)]
        for i, prefix in enumerate(prefixes):
            visit(prefix, view.params(prefix))
            progress(i + 1, len(prefixes))
        if ends:
            names = dict.fromkeys(path.split("/")[0] for path in view.shapes if not path.startswith("blocks/"))
            visit("", {name: view.params(name) for name in names})
    else:
        gradients.stream(
            view,
            examples.tokens,
            visit=lambda g: visit(g.prefix, g.params, g.mean, g.square),
            squares=method.squares,
            ends=ends,
            progress=progress,
        )
    return {u.name: method.score(u, collected[u.name], step) for u in units}

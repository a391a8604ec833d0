"""One structured run: a checkpoint in, a smaller checkpoint and its record out.

Structured pruning changes no weight that stays. So the smaller model is a view of the larger one from the first step
on (`Checkpoint.select`): it is measured, pruned further and written as any checkpoint is, a block at a time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jprune import paths
from jprune.checkpoints import Checkpoint, formats, load, record
from jprune.checkpoints.dtypes import activation_dtype
from jprune.checkpoints.formats import Format
from jprune.data import windows
from jprune.errors import JpruneError
from jprune.evaluate.perplexity import Perplexity
from jprune.pipeline.options import Evaluation, Output, sorted_into
from jprune.pipeline.registry import name_of
from jprune.pipeline.shrink.plan import check_target, planned
from jprune.pipeline.shrink.report import ShrinkReport
from jprune.pipeline.shrink.scores import smaller_model
from jprune.runs import output
from jprune.runs.remembered import perplexity
from jprune.runs.report import Progress, environment
from jprune.runs.stopwatch import Stopwatch, peak_memory_bytes
from jprune.structured.base import UnitMethod
from jprune.structured.selection import Target


def shrink_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    method: UnitMethod,
    target: Target | None = None,
    calibration: windows.Spec = "pydoc",
    dtype: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> ShrinkReport:
    """Removes heads, channels, hidden dimensions or layers of a model and writes the smaller one.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      out: folder of the result; it appears when everything is done.
      method: e.g. `LLMPruner()`.
      target: how small; methods that say themselves which layers stay need none.
      calibration: source of the text that importance is read from, or token windows [n, length].
      dtype: of the activations; float32 on CPU and for float16 weights, elsewhere what the weights have. Gradients
        are float32.
      progress: called often.
      **options: the fields of `Evaluation` and `Output` in `jprune.pipeline.options`: evaluate, evaluate_length,
        evaluate_windows, format (by default "hf" if all layers end up equal, else "jprune"), overwrite. There is
        nothing to resume: what is interrupted leaves nothing behind.

    Raises:
      JpruneError: anything that does not fit; `out` is then untouched.
    """
    measured, result = sorted_into(options, Evaluation, Output)
    stopwatch = Stopwatch()
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    shown, out = paths.given(out), paths.real(out)
    output.check(out, overwrite=result.overwrite, source=checkpoint.source)
    check_target(method, target)
    expected = planned(checkpoint, method, target)
    if expected is not None and result.format is not None:
        formats.check(expected, result.format)  # what is certain to be refused after the work is refused before
    activations = activation_dtype(checkpoint, dtype)
    with stopwatch.phase("data"):
        examples = _examples(checkpoint, method, calibration)
        evaluation = measured.text(checkpoint)

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

    with output.new_folder(out, overwrite=result.overwrite, source=checkpoint.source) as folder:
        before = measure(checkpoint, "evaluate before")
        with stopwatch.phase("importance"):
            smaller, layers = smaller_model(checkpoint, method, target, examples, activations, progress)
        format: Format = result.format or ("hf" if smaller.config.uniform else "jprune")
        with stopwatch.phase("io"):
            told = formats.write(folder, smaller, format=format)
        try:
            after = measure(load(folder), "evaluate after")
        except JpruneError as error:  # the work is not thrown away for it
            after, told = None, (*told, f"the perplexity after pruning could not be measured: {error}")
        report = ShrinkReport(
            out=shown,
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
        about = {"model": checkpoint.described(), "format": format, **environment(activations)}
        record.write(folder, about | _contents(report, method, target, examples, evaluation))
    return report


def _examples(checkpoint: Checkpoint, method: UnitMethod, source: windows.Spec) -> windows.Windows | None:
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


def _contents(
    report: ShrinkReport,
    method: UnitMethod,
    target: Target | None,
    examples: windows.Windows | None,
    evaluation: windows.Windows | None,
) -> dict[str, Any]:
    """The part of jprune.json that says what was asked for and what came out."""
    recipe = {**method.described(), **(target.described() if target else {})}
    return {
        **report.json(),
        "recipe": {"method": name_of(method), **recipe, "calibration": examples.source if examples else None},
        "calibration": examples and examples.described(),
        "evaluation": evaluation and evaluation.described(),
        "notices": list(report.notices),
    }

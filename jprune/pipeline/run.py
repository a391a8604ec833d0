"""One run: a checkpoint in, a pruned checkpoint and its record out."""

import dataclasses
import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jprune import trees
from jprune.checkpoints import Checkpoint, huggingface, load, orbax, record
from jprune.data import windows
from jprune.errors import JpruneError
from jprune.evaluate.perplexity import Perplexity, perplexity
from jprune.methods import METHODS, Method
from jprune.patterns import NM, Pattern
from jprune.pipeline import output
from jprune.pipeline.blockwise import prune_blocks
from jprune.pipeline.plan import Kernel, Plan, choose_kernels, make_plan, prunable
from jprune.pipeline.report import Progress, Report
from jprune.pipeline.stopwatch import Stopwatch, peak_device_memory_bytes, peak_memory_bytes

logger = logging.getLogger(__name__)

Format = Literal["hf", "orbax"]
DEMO_SAMPLES, DEMO_LENGTH = 64, 512
"""Calibration windows of the demo model: minutes on two cores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do to a model; with the model and the method, all that the result depends on."""

    pattern: Pattern
    """What the zeros must look like."""
    calibration: windows.Spec = "pydoc"
    """Source of the calibration text, see `jprune.data.sources`; or token windows [n, length]."""
    samples: int | None = None
    """Calibration windows; 128 unless given (64 for the demo model)."""
    sequence_length: int | None = None
    """Tokens a window; 2048 unless given, at most the model's context (512 for the demo model)."""
    seed: int = 0
    """Of the choice of windows."""
    where: tuple[str, ...] = ()
    """Regular expressions over kernel paths; by default all kernels of the decoder blocks."""
    skip: tuple[str, ...] = ()
    """Regular expressions; what they find is left alone."""
    overrides: Mapping[str, Pattern] = dataclasses.field(default_factory=dict)
    """Other patterns for the kernels that a regular expression finds."""
    dtype: str | None = None
    """Of the activations: float32 on CPU, elsewhere what the weights have."""


def prune_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    method: Method,
    pattern: Pattern,
    format: Format = "hf",
    evaluate: windows.Spec | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> Report:
    """Prunes a model and writes the result, block by block.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      out: folder of the result; it appears when everything is done.
      method: e.g. `SparseGPT()`.
      pattern: e.g. `Unstructured(0.5)`.
      format: "hf", a Hugging Face folder that every loader reads, or "orbax".
      evaluate: source of a text, or token windows [n, length], whose perplexity is measured before and after.
      overwrite: replace an `out` that an earlier run wrote.
      progress: called often.
      **options: calibration, filters and the like: the other fields of `Recipe`.

    Raises:
      JpruneError: anything that does not fit; `out` is then untouched.
    """
    stopwatch = Stopwatch()
    recipe = Recipe(pattern=pattern, **options)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    out = Path(out)
    output.check(out, overwrite=overwrite, source=checkpoint.source)
    dtype = activation_dtype(checkpoint, recipe.dtype)
    kernels = chosen_kernels(checkpoint, recipe)
    with stopwatch.phase("data"):
        calibration = calibration_windows(checkpoint, recipe) if method.statistic else None
        length: int | None = calibration.tokens.shape[1] if calibration else window_shape(checkpoint, recipe)[1]
        if windows.is_rows(evaluate):
            length = None  # its rows say
        evaluation = None if evaluate is None else evaluation_windows(checkpoint, evaluate, length=length)
    notices = tuple(dict.fromkeys(n for w in (calibration, evaluation) if w for n in w.notices))

    def measure(weights: Checkpoint, phase: str) -> Perplexity | None:
        if evaluation is None:
            return None
        with stopwatch.phase("evaluation"):
            return perplexity(
                weights,
                evaluation.tokens,
                dtype=dtype,
                progress=lambda done, total: progress(Progress(float(done), total, evaluation.source, phase)),
            )

    with output.new_folder(out, overwrite=overwrite, source=checkpoint.source) as folder:
        before = measure(checkpoint, "evaluate before")
        zeros = 0
        counted = set(prunable(checkpoint, kernels))
        collected: dict[str, np.ndarray] = {}
        writer = huggingface.Writer(folder, checkpoint) if format == "hf" else None

        def write(path: str, value: np.ndarray) -> None:
            nonlocal zeros
            if path in counted:
                zeros += count_zeros(value)
            if writer:
                writer.write(path, value)
            else:
                collected[path] = value

        reports = prune_blocks(
            checkpoint,
            kernels,
            method,
            calibration.tokens if calibration else None,
            write,
            dtype=dtype,
            progress=progress,
            stopwatch=stopwatch,
        )
        with stopwatch.phase("io"):
            if writer:
                writer.close()
            else:
                orbax.save(folder, checkpoint, trees.unflatten(collected), {})
        try:
            after = measure(load(folder), "evaluate after")
        except JpruneError as error:  # hours of work are not thrown away for it
            after, notices = None, (*notices, f"the perplexity after pruning could not be measured: {error}")
        sizes = {path: int(np.prod(shape.shape)) for path, shape in checkpoint.shapes.items()}
        report = Report(
            out=out,
            method=method_name(method),
            pattern=str(recipe.pattern),
            sparsity=trees.Sparsity(zeros, sum(sizes[path] for path in counted), sum(sizes.values())),
            before=before,
            after=after,
            seconds=stopwatch.seconds(),
            peak_memory_bytes=peak_memory_bytes(),
            kernels=tuple(reports),
            notices=notices,
        )
        contents = _record(checkpoint, method, recipe, calibration, evaluation, dtype, report)
        record.write(folder, contents)
    return report


def plan_run(model: Checkpoint | str | Path, *, method: Method, pattern: Pattern, **options: Any) -> Plan:
    """What `prune_model` would do, without reading a weight or a text; arguments are the same.

    Raises:
      JpruneError: as `prune_model`, for what can be known from shapes.
    """
    recipe = Recipe(pattern=pattern, **options)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    samples, length = window_shape(checkpoint, recipe)
    dtype = activation_dtype(checkpoint, recipe.dtype)
    return make_plan(checkpoint, chosen_kernels(checkpoint, recipe), method, tokens=samples * length, dtype=dtype)


def chosen_kernels(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Kernel, ...]:
    """The kernels that a recipe prunes."""
    return choose_kernels(checkpoint, recipe.pattern, where=recipe.where, skip=recipe.skip, overrides=recipe.overrides)


def window_shape(checkpoint: Checkpoint, recipe: Recipe) -> tuple[int, int]:
    """Calibration windows and tokens in each, with the defaults filled in."""
    if windows.is_rows(recipe.calibration):
        tokens = calibration_windows(checkpoint, recipe).tokens
        return len(tokens), tokens.shape[1]
    samples, length = recipe.samples, recipe.sequence_length
    if checkpoint.source == "demo":
        samples, length = samples or DEMO_SAMPLES, length or DEMO_LENGTH
    return (
        windows.DEFAULT_SAMPLES if samples is None else samples,
        min(windows.DEFAULT_LENGTH, checkpoint.config.context) if length is None else length,
    )


def calibration_windows(checkpoint: Checkpoint, recipe: Recipe) -> windows.Windows:
    """The calibration tokens of a recipe."""
    demo = checkpoint.source == "demo" and not windows.is_rows(recipe.calibration)
    return windows.calibration(
        recipe.calibration,
        checkpoint.tokenizer,
        samples=recipe.samples if recipe.samples is not None or not demo else DEMO_SAMPLES,
        length=recipe.sequence_length if recipe.sequence_length is not None or not demo else DEMO_LENGTH,
        seed=recipe.seed,
        vocab_size=checkpoint.config.vocab,
        context=checkpoint.config.context,
    )


def evaluation_windows(
    checkpoint: Checkpoint, source: windows.Spec, *, length: int | None = None, count: int | None = None
) -> windows.Windows:
    """The evaluation tokens of a source."""
    return windows.evaluation(
        source,
        checkpoint.tokenizer,
        length=length,
        windows=count,
        vocab_size=checkpoint.config.vocab,
        context=checkpoint.config.context,
    )


def activation_dtype(checkpoint: Checkpoint, name: str | None) -> DTypeLike:
    """The dtype activations have: as named, or float32 on CPU and the weights' own elsewhere.

    CPUs multiply in float32 many times faster than in bfloat16.
    """
    if name is not None:
        return parse_dtype(name)
    if jax.default_backend() == "cpu":
        return jnp.dtype(jnp.float32)
    return checkpoint.shapes["embed/embedding"].dtype


def parse_dtype(name: str) -> Any:
    """A float dtype by its name."""
    if name not in ("float32", "bfloat16", "float16"):
        raise JpruneError(f"dtype must be float32, bfloat16 or float16; got {name!r}")
    return jnp.dtype(name)


def method_name(method: Method) -> str:
    """The name a method has on the command line, or its class's."""
    return next((name for name, kind in METHODS.items() if kind is type(method)), type(method).__name__)


def count_zeros(values: np.ndarray) -> int:
    """Elements that are exactly zero (or minus zero), fast for every float dtype."""
    bits = values.view(f"u{values.dtype.itemsize}")
    return int(values.size - np.count_nonzero(bits << 1))


def _record(
    checkpoint: Checkpoint,
    method: Method,
    recipe: Recipe,
    calibration: windows.Windows | None,
    evaluation: windows.Windows | None,
    dtype: DTypeLike,
    report: Report,
) -> dict[str, Any]:
    """The contents of jprune.json."""

    def source(w: windows.Windows | None) -> dict[str, Any] | None:
        if w is None:
            return None
        n, length = w.tokens.shape
        return {"source": w.source, "windows": n, "sequence_length": length, "seed": w.seed, "sha256": w.sha256}

    given = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    given |= {"pattern": pattern_text(recipe.pattern), "calibration": calibration.source if calibration else None}
    given |= {"overrides": {regex: pattern_text(p) for regex, p in recipe.overrides.items()}}
    return {
        **report.json(),
        "recipe": {"method": report.method, **dataclasses.asdict(method), **given},
        "model": {
            "source": checkpoint.source,
            "architecture": checkpoint.config.architecture,
            "fingerprint": checkpoint.fingerprint(),
        },
        "calibration": source(calibration),
        "evaluation": source(evaluation),
        "dtype": jnp.dtype(dtype).name,
        "notices": list(report.notices),
        "versions": {name: importlib.metadata.version(name) for name in ("jprune", "jax", "jaxlib", "flax", "numpy")},
        "device": jax.devices()[0].device_kind,
        "peak_device_memory_bytes": peak_device_memory_bytes(),
        "kernels": [dataclasses.asdict(kernel) for kernel in report.kernels],
    }


def pattern_text(pattern: Pattern) -> str | dict[str, Any]:
    """A pattern as a recipe file has it."""
    return str(pattern) if isinstance(pattern, NM) else dataclasses.asdict(pattern)

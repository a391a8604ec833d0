"""One tuning run: a pruned checkpoint in, a recovered one and its record out.

OUT          the result: a folder like any other, with jprune.json and metrics.jsonl; it appears when all is done
OUT.run      the state of the run while it lasts: checkpoints of everything, for --resume
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jprune.checkpoints import Checkpoint, formats, load, peft, record
from jprune.checkpoints.formats import Format
from jprune.data import windows
from jprune.data.batches import Batches, Rows
from jprune.data.held_out import overlap
from jprune.data.training import evaluation_batches, training_batches
from jprune.errors import JpruneError
from jprune.evaluate.perplexity import Perplexity, perplexity
from jprune.models.batching import windows_at_once
from jprune.pipeline import output
from jprune.pipeline.lock import Lock
from jprune.pipeline.recovery import TUNINGS, Full, Lora, Task
from jprune.pipeline.report import Progress, environment
from jprune.pipeline.resume import default_folder
from jprune.pipeline.stopwatch import Stopwatch, peak_memory_bytes
from jprune.train import loop, lora, metrics, sharding
from jprune.train.loop import Schedule, Trained, train

PyTree = Any
DEMO_LENGTH = 256
"""Tokens a window of text for the demo model: steps of a minute on two cores."""
DEMO_EVALUATION_LENGTH = 512
EPOCHS = {"lora": 2, "full": 1}
"""Unless said otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneReport:
    """The result of a tuning run."""

    out: Path
    method: str
    steps: int
    best_step: int
    """After which step the parameters are those of the result."""
    trainable_parameters: int
    parameters: int
    """Of the whole model."""
    losses: tuple[float, ...]
    """Of every step, in nats a token."""
    evaluation_losses: dict[int, float]
    """By step, where they were measured."""
    tokens_per_second: float | None
    before: Perplexity | None
    after: Perplexity | None
    seconds: dict[str, float]
    peak_memory_bytes: int
    resumed_from: int
    notices: tuple[str, ...]
    """What the user should know, one sentence each."""

    def json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        result: dict[str, Any] = {
            "method": self.method,
            "steps": self.steps,
            "best_step": self.best_step,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "loss": {"first": self.losses[0], "last": self.losses[-1]},
            "tokens_per_second": self.tokens_per_second,
            "resumed_from": self.resumed_from,
        }
        if self.evaluation_losses:
            result["evaluation_loss"] = min(self.evaluation_losses.values())
        if self.before:
            result["perplexity"] = {
                "before": self.before.value,
                "after": self.after.value if self.after else None,
                "sequence_length": self.before.sequence_length,
                "windows": self.before.windows,
            }
        return {**result, "seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes, "out": str(self.out)}


def tune_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    method: Lora | Full,
    data: windows.Spec,
    sequence_length: int | None = None,
    windows_at_most: int | None = None,
    train_on_prompt: bool = False,
    evaluate: windows.Spec | None = None,
    evaluate_length: int | None = None,
    evaluate_windows: int | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    format: Format | None = None,
    fsdp: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> TuneReport:
    """Tunes a model and writes the result.

    Args:
      model: a checkpoint, or what `jprune.load` takes: mostly a folder that jprune has pruned.
      out: folder of the result; it appears when everything is done.
      method: `Lora(...)` or `Full(...)`.
      data: source of the training data (`jprune.data.sources`): text, or records of instructions; or token windows.
      sequence_length: tokens a window; by default 2048 for text and 256 for instructions, at most the model's context
        (256 for the demo model).
      windows_at_most: take only the first so many windows or records.
      train_on_prompt: take the loss on the prompts of instructions too.
      evaluate: source of a text whose perplexity is measured before and after, or of instructions.
      evaluate_length: tokens a window of it; by default as for `jprune eval perplexity` (512 for the demo model).
      evaluate_windows: take only the first so many of them.
      evaluate_every: steps between two evaluations on it; the best state is the result. By default the last counts.
      checkpoint_every: steps between two checkpoints in ``OUT.run``; by default a tenth of all.
      format: see `jprune.checkpoints.formats`; by default "hf" if all layers are equal, else "jprune".
      fsdp: over how many devices parameters and optimizer state are cut up; the others share out the data.
      resume: go on with the run in ``OUT.run``, if there is one.
      overwrite: replace an `out`, and forget an ``OUT.run``, that an earlier run left.
      progress: called often.

    Raises:
      JpruneError: anything that does not fit; `out` is then untouched.
      jprune.train.loop.Interrupted: Ctrl-C; the state is kept in ``OUT.run``.
    """
    stopwatch = Stopwatch()
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    out = Path(out).expanduser()
    output.check(out, overwrite=overwrite, source=checkpoint.source)
    chosen: Format = format or ("hf" if checkpoint.config.uniform else "jprune")
    formats.check(checkpoint, chosen)
    mesh = sharding.make_mesh(fsdp=fsdp)
    name = method_name(method)
    with stopwatch.phase("data"):
        demo = checkpoint.source == "demo"
        epochs = None if method.steps is not None else method.epochs or EPOCHS[name]
        batches = training_batches(
            data,
            checkpoint,
            batch_size=method.batch_size,
            length=DEMO_LENGTH if demo and sequence_length is None and not windows.is_rows(data) else sequence_length,
            windows_at_most=windows_at_most,
            epochs=epochs,
            seed=method.seed,
            train_on_prompt=train_on_prompt,
        )
        steps = method.steps or batches.per_epoch * (epochs or 1)
        rows = method.micro_batch or windows_at_once(batches.length)
        held_out = None
        if evaluate is not None:
            length = DEMO_EVALUATION_LENGTH if demo and evaluate_length is None else evaluate_length
            held_out = _evaluation(evaluate, checkpoint, rows, length, evaluate_windows, train_on_prompt)
    notices = _notices(batches, held_out)
    with stopwatch.phase("load"):
        task = method.task(checkpoint, steps)
    if isinstance(method, Lora) and method.keep_adapters:
        for path in method.adapters(task.trainable):
            peft.name(checkpoint, path)
    settings = {
        **_recipe(method, name),
        "model": checkpoint.fingerprint(),
        "data": batches.fingerprint,
        "evaluation": held_out and held_out.sha256,
        "evaluate_every": evaluate_every,
    }
    schedule = Schedule(
        steps=steps,
        micro_batch=rows,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every or max(1, steps // 10),
        seed=method.seed,
    )
    measure = _Measure(held_out, task, stopwatch, progress)
    before = measure.perplexity(checkpoint, "evaluate before")
    progress(Progress(0.0, steps, "compiling", "train"))
    with _run_folder(default_folder(out), forget=overwrite and not resume) as folder, stopwatch.phase("train"):
        trained = train(
            task.loss,
            task.trainable,
            task.frozen,
            iter(batches),
            task.optimizer,
            schedule,
            evaluate=measure.loss(mesh) if held_out is not None and evaluate_every is not None else None,
            rate=method.adamw().rate(steps),
            folder=folder,
            settings=settings,
            resume=resume,
            mesh=mesh,
            progress=lambda p: progress(_shown(p)),
        )
    report: TuneReport | None = None
    with output.new_folder(out, overwrite=overwrite, source=checkpoint.source) as part:
        with stopwatch.phase("io"):
            told = _write(part, checkpoint, method, task, trained.trainable, chosen)
            shutil.copy2(folder / metrics.NAME, part / metrics.NAME)
        after: Perplexity | None = None
        failed: tuple[str, ...] = ()
        try:
            kept = isinstance(method, Lora) and method.keep_adapters
            tuned = _Tuned(checkpoint, task, trained.trainable) if kept else load(part)
            after = measure.perplexity(tuned, "evaluate after")
        except JpruneError as error:  # hours of work are not thrown away for it
            failed = (f"the perplexity after tuning could not be measured: {error}",)
        report = TuneReport(
            out=out,
            method=name,
            steps=steps,
            best_step=trained.step,
            trainable_parameters=lora.trainable_parameters(trained.trainable),
            parameters=sum(math.prod(shape.shape) for shape in checkpoint.shapes.values()),
            losses=tuple(line["loss"] for line in trained.history),
            evaluation_losses=_evaluation_losses(trained),
            tokens_per_second=trained.tokens_per_second,
            before=before,
            after=after,
            seconds=stopwatch.seconds(),
            peak_memory_bytes=peak_memory_bytes(),
            resumed_from=trained.resumed_from,
            notices=(*notices, *told, *failed),
        )
        record.write(part, _record(report, checkpoint, method, task, batches, held_out))
    shutil.rmtree(folder, ignore_errors=True)
    return report


def method_name(method: Lora | Full) -> str:
    """The name a way of tuning has on the command line."""
    return next(name for name, kind in TUNINGS.items() if kind is type(method))


def _recipe(method: Lora | Full, name: str) -> dict[str, Any]:
    """What the result depends on, without what only says how to compute it."""
    given = dataclasses.asdict(method)
    return {"method": name, **{k: v for k, v in given.items() if k not in ("micro_batch", "keep_adapters")}}


def _evaluation(
    spec: windows.Spec,
    checkpoint: Checkpoint,
    rows: int,
    length: int | None,
    at_most: int | None,
    train_on_prompt: bool,
) -> Batches:
    return evaluation_batches(
        spec,
        checkpoint,
        batch_size=rows,
        length=None if windows.is_rows(spec) else length,
        windows_at_most=at_most,
        train_on_prompt=train_on_prompt,
    )


def _notices(batches: Batches, held_out: Batches | None) -> tuple[str, ...]:
    notices = [*batches.notices, *(held_out.notices if held_out else ())]
    if held_out is not None:
        if shared := overlap(batches, held_out):
            notices.append(
                f"{100 * shared:.0f} % of the evaluation windows share text with the training data: what is measured "
                "on them is no evidence"
            )
        if not isinstance(held_out.examples, Rows):
            notices.append(f"{held_out.source} is instruction data: its loss is measured, and no perplexity of text")
    return tuple(dict.fromkeys(notices))


class _Measure:
    """Perplexity by the standard protocol, and the loss while training."""

    def __init__(
        self, batches: Batches | None, task: Task, stopwatch: Stopwatch, progress: Callable[[Progress], None]
    ) -> None:
        self.batches, self.task, self.stopwatch, self.progress = batches, task, stopwatch, progress

    def perplexity(self, weights: Any, phase: str) -> Perplexity | None:
        """Of a text; None for instructions, or where there is nothing to measure on."""
        batches = self.batches
        if batches is None or not isinstance(batches.examples, Rows):
            return None
        tokens = batches.examples.take(np.arange(batches.windows))["tokens"]
        with self.stopwatch.phase("evaluation"):
            return perplexity(
                weights,
                tokens,
                dtype=self.task.dtype,
                progress=lambda done, total: self.progress(Progress(float(done), total, batches.source, phase)),
            )

    def loss(self, mesh: Mesh | None) -> Callable[[PyTree, PyTree], float]:
        """(trainable, frozen) -> mean loss in nats over all windows."""
        assert self.batches is not None
        batches = self.batches
        f = jax.jit(self.task.evaluation)

        def mean(trainable: PyTree, frozen: PyTree) -> float:
            total = weight = 0.0
            for batch in batches:
                for part in loop.micro_batches(batch, None, mesh):
                    sums = f(trainable, frozen, part)
                    total, weight = total + float(sums[0]), weight + float(sums[1])
            return total / max(weight, 1.0)

        return mean


class _Tuned:
    """A model and its trained adapters as weights to be read, without a file."""

    def __init__(self, checkpoint: Checkpoint, task: Task, trainable: PyTree) -> None:
        self.config = checkpoint.config
        self._checkpoint, self._task, self._trainable = checkpoint, task, trainable

    def params(self, prefix: str) -> dict[str, Any]:
        """The subtree of parameters below a path."""
        from jprune import trees

        start = f"{prefix}/" if prefix else ""
        below = [path for path in self._checkpoint.shapes if path.startswith(start)]
        return trees.unflatten({p.removeprefix(start): self._task.read(self._trainable, p) for p in below})


@contextlib.contextmanager
def _run_folder(folder: Path, *, forget: bool):
    """The folder of the run's state, for this process alone; what an earlier run left in it goes if it is to."""
    if forget and (folder / "settings.json").exists():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JpruneError(f"{folder}: no folder for the state of the run can be made: {error}") from error
    lock = Lock(folder)
    try:
        yield folder
    finally:
        lock.release()


def _write(
    folder: Path, checkpoint: Checkpoint, method: Lora | Full, task: Task, trainable: PyTree, chosen: Format
) -> tuple[str, ...]:
    trainable = jax.tree.map(np.asarray, trainable)
    if isinstance(method, Lora) and method.keep_adapters:
        peft.save(folder, checkpoint, method.adapters(trainable), alpha=method.alpha, dropout=method.dropout)
        return (f"only the adapters were written; they go with {checkpoint.source}",)
    with formats.writer(folder, checkpoint, format=chosen) as writer:
        for path in checkpoint.shapes:
            writer.write(path, task.read(trainable, path))
    return formats.notices(checkpoint, chosen)


def _shown(p: loop.Progress) -> Progress:
    parts = []
    if p.tokens_per_second:
        parts.append(f"{p.tokens_per_second:,.0f} tokens/s")
    if p.seconds_left is not None:
        minutes, seconds = divmod(round(p.seconds_left), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    return Progress(p.step, p.steps, ", ".join(parts), "train", p.loss)


def _evaluation_losses(trained: Trained) -> dict[int, float]:
    return {line["step"]: line["evaluation_loss"] for line in trained.history if "evaluation_loss" in line}


def _record(
    report: TuneReport,
    checkpoint: Checkpoint,
    method: Lora | Full,
    task: Task,
    batches: Batches,
    held_out: Batches | None,
) -> dict[str, Any]:
    """The contents of jprune.json."""

    def described(b: Batches) -> dict[str, Any]:
        return {"source": b.source, "windows": b.windows, "sequence_length": b.length, "sha256": b.sha256}

    earlier = Path(checkpoint.source) / record.NAME
    return {
        **report.json(),
        "recipe": {"method": report.method, **dataclasses.asdict(method)},
        "model": {
            "source": checkpoint.source,
            "architecture": checkpoint.config.architecture,
            "fingerprint": checkpoint.fingerprint(),
            "record": record.read(earlier.parent) if earlier.exists() else None,
        },
        "data": described(batches),
        "evaluation": held_out and described(held_out),
        "losses": [round(x, 6) for x in report.losses],
        "evaluation_losses": report.evaluation_losses,
        "notices": list(report.notices),
        **environment(task.dtype),
    }

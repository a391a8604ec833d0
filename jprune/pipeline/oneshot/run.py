"""One run: a checkpoint in, a pruned checkpoint and its record out."""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jprune import devices, trees
from jprune.anatomy.kernels import Kernel, prunable
from jprune.checkpoints import Checkpoint, formats, huggingface, load, orbax, record, writing
from jprune.checkpoints.dtypes import activation_dtype
from jprune.checkpoints.formats import Format
from jprune.data import windows
from jprune.data.for_model import evaluation_windows
from jprune.errors import JpruneError
from jprune.evaluate.perplexity import Perplexity, perplexity
from jprune.methods import Method
from jprune.patterns import Pattern
from jprune.pipeline.forecast.forecast import Forecast, Plan
from jprune.pipeline.forecast.layout import Layout
from jprune.pipeline.oneshot.blocks import prune_blocks
from jprune.pipeline.oneshot.journal import Journal
from jprune.pipeline.oneshot.recipe import (
    Recipe,
    calibration_windows,
    chosen_kernels,
    method_name,
    pattern_text,
    window_shape,
)
from jprune.pipeline.oneshot.report import KernelReport, Report
from jprune.pipeline.options import Evaluation, Machine, Result, sorted_into
from jprune.runs import interrupt, output, processes
from jprune.runs.folder import FINISHED, RunFolder, default_folder, finished
from jprune.runs.report import Progress, environment
from jprune.runs.stopwatch import Stopwatch, peak_memory_bytes

logger = logging.getLogger(__name__)


def prune_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    method: Method,
    pattern: Pattern,
    mesh: Mesh | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> Report:
    """Prunes a model and writes the result, block by block.

    Where `jax.distributed.initialize` has joined several processes, all call this with the same arguments; process 0
    writes.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      out: folder of the result; it appears when everything is done.
      method: e.g. `SparseGPT()`.
      pattern: e.g. `Unstructured(0.5)`.
      mesh: the devices, see `jprune.devices`; by default all of them, with windows of calibration shared out.
      progress: called often.
      **options: the other fields of `Recipe` (calibration, filters and the like), and those of `Evaluation`, `Result`
        and `Machine` in `jprune.pipeline.options`: format ("hf"), evaluate, overwrite, resume, run, memory, ...

    Raises:
      JpruneError: anything that does not fit; `out` is then untouched.
      KeyboardInterrupt: Ctrl-C, at the next safe point. What is done is kept, as after any failure.
    """
    stopwatch = Stopwatch()
    recipe, measured, result, machine = sorted_into(
        {"pattern": pattern, **options}, Recipe, Evaluation, Result, Machine
    )
    format: Format = result.format or "hf"
    overwrite, resume = result.overwrite, result.resume
    out = Path(out).expanduser()
    mesh = mesh or devices.make_mesh()
    folder = Path(machine.run).expanduser() if machine.run else default_folder(out)
    if resume and processes.decided_by_first(lambda: finished(folder, out)):
        return Report.from_record(record.read(out), out)
    with processes.run_together(), stopwatch.phase("data"):
        checkpoint = model if isinstance(model, Checkpoint) else load(model)
        output.check(out, overwrite=overwrite, source=checkpoint.source)
        formats.check(checkpoint, format)
        dtype = activation_dtype(checkpoint, recipe.dtype)
        kernels = chosen_kernels(checkpoint, recipe)
        calibration = calibration_windows(checkpoint, recipe) if method.statistic else None
        evaluation = None
        if isinstance(measured.evaluate, Mapping):
            raise JpruneError("a model that is pruned in one shot is measured on one text; domains are for training")
        if measured.evaluate is not None:
            length: int | None = measured.evaluate_length
            if length is None and not windows.is_rows(measured.evaluate):  # rows have a length of their own
                length = calibration.tokens.shape[1] if calibration else window_shape(checkpoint, recipe)[1]
            evaluation = evaluation_windows(
                checkpoint, measured.evaluate, length=length, count=measured.evaluate_windows
            )
    fingerprint = _fingerprint(checkpoint, method, recipe, calibration, dtype, format)
    text = {"the evaluation text or its windows": evaluation.sha256 if evaluation else None}
    processes.check_alike({"--out": str(out.resolve()), "--run": str(folder.resolve()), **fingerprint, **text})
    job = RunFolder(folder, out=out, fingerprint=fingerprint, resume=resume, overwrite=overwrite)
    task = _Task(checkpoint, method, recipe, kernels, calibration, evaluation, dtype, format, mesh, job, stopwatch)
    forecast = Forecast(
        checkpoint,
        kernels,
        method,
        shape=(calibration.tokens.shape[0], calibration.tokens.shape[1]) if calibration else None,
        dtype=dtype,
        mesh=mesh,
        limit=machine.memory,
        micro_batch=machine.micro_batch,
    )
    try:
        with interrupt.deferred() as check:

            def tell(step: Progress) -> None:
                progress(step)
                check()

            report = task.run(forecast, tell)
            with processes.run_together():
                if processes.is_first():
                    job.mark(FINISHED, {})
                    output.publish(job.partial, out, job.old, overwrite=overwrite, source=checkpoint.source)
    except BaseException as error:
        advice = job.close()
        if (gone := processes.lost(error)) is not None:
            raise JpruneError(f"{gone}. {advice}") from error
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(advice) from None
        if _out_of_memory(error):
            raise JpruneError(f"out of memory; what helps is {'; '.join(forecast.advice())}. {advice}") from error
        if writing.disk_full(error) and not isinstance(error, JpruneError):
            raise JpruneError(f"the disk of {job.partial} is full; free some space there. {advice}") from error
        if isinstance(error, JpruneError) and advice:
            raise type(error)(f"{error}. {advice}") from error
        raise
    job.remove()
    return dataclasses.replace(report, out=out)


class _Task:
    """What there is to do in a run folder that is ours."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        method: Method,
        recipe: Recipe,
        kernels: tuple[Kernel, ...],
        calibration: windows.Windows | None,
        evaluation: windows.Windows | None,
        dtype: DTypeLike,
        format: Format,
        mesh: Mesh,
        job: RunFolder,
        stopwatch: Stopwatch,
    ):
        self.checkpoint, self.method, self.recipe, self.kernels = checkpoint, method, recipe, kernels
        self.calibration, self.evaluation, self.dtype, self.format = calibration, evaluation, dtype, format
        self.mesh, self.job, self.stopwatch = mesh, job, stopwatch

    def run(self, forecast: Forecast, tell: Callable[[Progress], None]) -> Report:
        """Prunes into the partial result, writes its record, and marks it as finished."""
        layout, memory = forecast.choose(self.job.folder)
        machine = {
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "mesh": dict(self.mesh.shape),
            "processes": jax.process_count(),
        }
        decided = self.job.decide({**dataclasses.asdict(layout), "machine": machine})
        agreed = Layout(windows=decided["windows"], carry_limit=decided["carry_limit"])
        if agreed != layout:
            layout, memory = agreed, forecast.memory(agreed)
        notices = list(dict.fromkeys(n for w in (self.calibration, self.evaluation) if w for n in w.notices))
        if not memory.fits:
            notices.append(f"this may need more than {memory.limit / 1e9:.2g} GB of memory; see --plan")
        if decided["machine"] != machine:
            notices.append(
                f"begun on {decided['machine']}, resumed on {machine}: the last bits may not be those of one run"
            )
        before = self._before(tell)
        counted = prunable(self.checkpoint, self.kernels)
        done = processes.decided_by_first(lambda: self.job.marked("converted"))
        if done is None:
            with processes.run_together():
                writer = self._writer()
            journal = Journal(self.job, writer, counted, memory.room)
            kernels = prune_blocks(
                self.checkpoint,
                self.kernels,
                self.method,
                self.calibration.tokens if self.calibration else None,
                journal,
                mesh=self.mesh,
                layout=layout,
                dtype=self.dtype,
                progress=tell,
                stopwatch=self.stopwatch,
                expert_tokens=self.recipe.expert_tokens,
                keep_zeros=self.recipe.keep_zeros,
            )
            contents = {"zeros": journal.zeros, "kernels": [dataclasses.asdict(kernel) for kernel in kernels]}
            with self.stopwatch.phase("io"):
                done = processes.decided_by_first(lambda: self._complete(writer, contents))
        try:
            with processes.run_together():
                if self.format == "orbax" and processes.is_first():
                    for left in huggingface.weight_files(self.job.partial):
                        left.unlink()
                result = load(self.job.partial)
            after = self._perplexity(result, "evaluate after", tell)
        except JpruneError as error:  # hours of work are not thrown away for it
            after = None
            notices.append(f"the perplexity after pruning could not be measured: {error}")
        if few := {k["path"]: len(k["few_tokens"]) for k in done["kernels"] if k.get("few_tokens")}:
            notices.append(
                f"{max(few.values())} experts of {max(few, key=lambda path: few[path])} saw fewer than "
                f"{self.recipe.expert_tokens} calibration tokens and were pruned by magnitude (so were some in "
                f"{len(few)} kernels in all, see few_tokens in jprune.json); more calibration text helps"
            )
        sizes = {path: int(np.prod(shape.shape)) for path, shape in self.checkpoint.shapes.items()}
        report = Report(
            out=self.job.partial,
            method=method_name(self.method),
            pattern=str(self.recipe.pattern),
            sparsity=trees.Sparsity(done["zeros"], sum(sizes[path] for path in counted), sum(sizes.values())),
            before=before,
            after=after,
            seconds=self.stopwatch.seconds(),
            peak_memory_bytes=peak_memory_bytes(),
            kernels=tuple(map(KernelReport.from_json, done["kernels"])),
            notices=tuple(notices),
        )
        contents = _record(
            self.checkpoint, self.method, self.recipe, self.calibration, self.evaluation, self.dtype, report
        )
        with processes.run_together(), writing.explained(self.job.partial):
            if processes.is_first():
                more = {"layout": dataclasses.asdict(layout), "machine": machine, "resumed": self.job.resumed}
                record.write(self.job.partial, contents | more)
        return report

    def _writer(self) -> huggingface.Writer:
        """Of the partial result, whatever is in it already; in processes but the first only to read it."""
        if processes.is_first():
            with writing.explained(self.job.partial):
                self.job.partial.mkdir(exist_ok=True)
        on_the_way = "jprune" if self.format == "orbax" else self.format
        writer = formats.writer(
            self.job.partial, self.checkpoint, format=on_the_way, reopen=True, follow=not processes.is_first()
        )
        assert isinstance(writer, huggingface.Writer)
        return writer

    def _complete(self, writer: huggingface.Writer, contents: dict[str, Any]) -> dict[str, Any]:
        """Finishes the partial result, all of whose parameters are there; returns what the mark says of it."""
        writer.close()
        if self.format == "orbax":
            _to_orbax(self.job.partial)
        writing.sync_folder(self.job.partial)
        self.job.mark("converted", contents)
        return contents

    def _before(self, tell: Callable[[Progress], None]) -> Perplexity | None:
        """The perplexity before, measured once in a run."""
        if self.evaluation is None:
            return None
        name = f"before-{self.evaluation.sha256}"
        if (known := processes.decided_by_first(lambda: self.job.marked(name))) is None:
            measured = self._perplexity(self.checkpoint, "evaluate before", tell)
            assert measured is not None
            known = dataclasses.asdict(measured)
            self.job.mark(name, known)
        return Perplexity(**known)

    def _perplexity(self, weights: Checkpoint, phase: str, tell: Callable[[Progress], None]) -> Perplexity | None:
        evaluation = self.evaluation
        if evaluation is None:
            return None
        with self.stopwatch.phase("evaluation"):
            return perplexity(
                weights,
                evaluation.tokens,
                dtype=self.dtype,
                mesh=self.mesh,
                progress=lambda done, total: tell(Progress(float(done), total, evaluation.source, phase)),
            )


def _to_orbax(folder: Path) -> None:
    """Adds to a Hugging Face folder the same parameters as an Orbax tree."""
    orbax.discard(folder)  # half of one, from a process that was killed, would be taken for the model
    source = load(folder)
    with orbax.Writer(folder, source) as writer:
        for path in source.shapes:
            writer.write(path, source.read(path))


def _fingerprint(
    checkpoint: Checkpoint,
    method: Method,
    recipe: Recipe,
    calibration: windows.Windows | None,
    dtype: DTypeLike,
    format: Format,
) -> dict[str, Any]:
    """Everything that the result depends on, by the name that a message gives it."""
    return {
        "the model": checkpoint.fingerprint(),
        "the calibration text or its windows": calibration.sha256 if calibration else None,
        "the method": {"name": method_name(method), **dataclasses.asdict(method)},
        "the pattern": pattern_text(recipe.pattern),
        "--where": recipe.where,
        "--skip": recipe.skip,
        "--override": {regex: pattern_text(pattern) for regex, pattern in recipe.overrides.items()},
        "--dtype": jnp.dtype(dtype).name,
        "--expert-tokens": recipe.expert_tokens,
        "--keep-zeros": recipe.keep_zeros,
        "--format": format,
        **{f"the version of {name}": version for name, version in environment(dtype)["versions"].items()},
    }


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def plan_run(
    model: Checkpoint | str | Path,
    *,
    method: Method,
    pattern: Pattern,
    out: str | Path = ".",
    mesh: Mesh | None = None,
    **options: Any,
) -> Plan:
    """What `prune_model` would do, without reading a weight or a text; arguments are the same.

    Of the options it takes those of `Recipe` and `Machine`.

    Compiles the programs of each kind of block, to ask what they take, and measures this machine for two seconds.

    Raises:
      JpruneError: as `prune_model`, for what can be known from shapes.
    """
    recipe, machine = sorted_into({"pattern": pattern, **options}, Recipe, Machine)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    shape = window_shape(checkpoint, recipe) if method.statistic else None
    dtype = activation_dtype(checkpoint, recipe.dtype)
    kernels = chosen_kernels(checkpoint, recipe)
    forecast = Forecast(
        checkpoint,
        kernels,
        method,
        shape=shape,
        dtype=dtype,
        mesh=mesh or devices.make_mesh(),
        limit=machine.memory,
        micro_batch=machine.micro_batch,
    )
    return forecast.plan(Path(out).expanduser())


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

    given = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    given |= {"pattern": pattern_text(recipe.pattern), "calibration": calibration.source if calibration else None}
    given |= {"overrides": {regex: pattern_text(p) for regex, p in recipe.overrides.items()}}
    return {
        **report.json(),
        "recipe": {"method": report.method, **dataclasses.asdict(method), **given},
        "model": checkpoint.described(),
        "calibration": calibration.described() if calibration else None,
        "evaluation": evaluation.described() if evaluation else None,
        "notices": list(report.notices),
        **environment(dtype),
        "kernels": [dataclasses.asdict(kernel) for kernel in report.kernels],
    }

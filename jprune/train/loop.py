"""The training loop: whatever is trained here is trained by this.

A step takes one batch from the iterator, in micro-batches of rows as large as memory (or a CPU's cache) allows.
Losses come as (sum, weight) and their gradients are added up in float32, so the mean gradient is that of the whole
batch exactly as its tokens weigh, whatever the micro-batches. Then Optax makes the update.

The loop knows functions, pytrees and iterators: no model, no file format. Trainable and frozen parameters and the
optimizer's state may lie sharded on a mesh (`jprune.train.sharding`). All randomness follows from the seed, the number
of the step and that of the micro-batch, and the place in the data is part of the state, so a resumed run continues
bit for bit as if nothing had happened. What a loss draws, as dropout, is drawn for each micro-batch: another number of
rows at once draws other numbers.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jprune.annotations import Array
from jprune.errors import JpruneError
from jprune.train import metrics, sharding
from jprune.train.clock import Clock, Progress
from jprune.train.state import StateFolder
from jprune.train.step import Batch as Batch
from jprune.train.step import Functions, Loss, micro_batches

PyTree = Any


@runtime_checkable
class Batches(Protocol):
    """An endless (or long enough) stream of batches that knows its place."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any:
        """The place in the stream, as something that JSON can hold."""
        ...

    def set_state(self, state: Any) -> None:
        """Go to a place that `get_state` gave."""
        ...


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to train, and what to do on the way."""

    steps: int
    """Updates of the parameters."""
    micro_batch: int | None = None
    """Rows of a batch computed at once; all of them by default. The result does not depend on it but for rounding, if
    the loss draws nothing at random: dropout is drawn for each micro-batch."""
    evaluate_every: int | None = None
    """Steps between two evaluations; the last step is evaluated too."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints; there is one at the end in any case."""
    seed: int = 0
    """Seed of dropout and the like."""

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise JpruneError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came out."""

    trainable: PyTree
    """The best by evaluation, or the last where nothing was evaluated or the best is not kept."""
    step: int
    """After how many steps that was."""
    evaluation_loss: float | None
    """Evaluation loss of the returned state, in nats."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """The metrics of every step, those before a resume included."""
    tokens_per_second: float | None = None
    resumed_from: int = 0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed, and the state was saved; the message says after which step, and where."""


def train(
    loss: Loss,
    trainable: PyTree,
    frozen: PyTree,
    batches: Batches,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    evaluate: Callable[[PyTree, PyTree], float] | None = None,
    keep_best: bool = True,
    rate: optax.Schedule | None = None,
    watch: Callable[[PyTree, PyTree], Mapping[str, Any]] | None = None,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    mesh: Mesh | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Trains.

    Args:
      loss: see `Loss`; differentiated by its first argument only.
      trainable: float arrays; what is returned has their dtypes. Of leaves of other types (such as masks) there is no
        gradient: `optimizer` finds None in their place, and is the one to move them.
      frozen: whatever else the loss reads.
      batches: gives dicts of arrays ``[B, ...]``, "tokens" ``[B, L]`` among them.
      optimizer: made for `schedule.steps` steps. One that takes extra arguments is given ``frozen``.
      schedule: how long, how often.
      evaluate: (trainable, frozen) -> a mean loss in nats.
      keep_best: the state with the lowest of these comes back, and else the last: where what is learnt costs quality,
        as masks do, the best state is the first.
      rate: the learning rate of a step, for the metrics.
      watch: (trainable, the optimizer's state) after a step, and its evaluation -> what else the metrics say of it, as
        JSON. What it raises ends the training; the state that was saved last is kept.
      folder: where metrics and checkpoints go; without it nothing is written and nothing can be resumed.
      settings: what else the result depends on, as JSON: a run with other settings is not resumed.
      resume: go on with the run in the folder, if there is one.
      mesh: over which devices, None for one; see `jprune.train.sharding`.
      progress: called after every micro-batch.
      stop: asked after every micro-batch whether to save the state and stop, as Ctrl-C wants it.

    Raises:
      JpruneError: the loss or its gradient is not finite (what was good is kept, and the step named), the data ends, or
        the folder holds another run.
      Interrupted: `stop` said so; the state was saved.
    """
    run = None
    if folder is not None:
        run = StateFolder(folder, {**(settings or {}), "steps": schedule.steps, "seed": schedule.seed}, resume=resume)
    trainable, frozen = sharding.put(trainable, mesh, copy=True), sharding.put(frozen, mesh)  # updates overwrite
    loop = _Loop(Functions(loss, optimizer, trainable, mesh), trainable, frozen, batches, schedule, run, mesh)
    log = None if run is None else metrics.Metrics(run.path, after=loop.first)
    history = [] if run is None else metrics.read(run.path / metrics.NAME)
    with contextlib.closing(log) if log else contextlib.nullcontext():
        for step in range(loop.first, schedule.steps):
            line = loop.step(step, progress, stop)
            if rate is not None:
                line["learning_rate"] = float(rate(step))
            done = step + 1
            if evaluate is not None and (_due(schedule.evaluate_every, done) or done == schedule.steps):
                line["evaluation_loss"] = loop.evaluate(done, evaluate, keep_best=keep_best)
            if watch is not None:
                line.update(watch(*loop.state))
            history.append({"step": done, **line})
            if log is not None:
                log.write(done, **line)
            if _due(schedule.checkpoint_every, done) or done == schedule.steps:
                with loop.clock.stopped():
                    loop.save(done, batches.get_state())
            progress(loop.clock.tick(float(done), 0))
    best = loop.best or {"step": schedule.steps, "loss": None}
    return Trained(
        trainable=loop.result(),
        step=best["step"],
        evaluation_loss=best["loss"],
        history=history,
        tokens_per_second=loop.clock.speed,
        resumed_from=loop.first,
    )


class _Loop:
    """What a training run has in its hands: the state, the place in the data, the best so far."""

    def __init__(
        self,
        functions: Functions,
        trainable: PyTree,
        frozen: PyTree,
        batches: Batches,
        schedule: Schedule,
        run: StateFolder | None,
        mesh: Mesh | None,
    ):
        self.functions, self.frozen, self.batches, self.schedule = functions, frozen, batches, schedule
        self.run, self.mesh = run, mesh
        self.state = (trainable, functions.init(trainable))
        self.first = 0
        self.best: dict[str, Any] | None = None
        self.best_kept: PyTree = None  # where there is no folder
        if run is not None and run.steps():
            self.first = run.steps()[-1]
            self.state, about = run.restore(self.first, self.state)
            batches.set_state(about["data"])
            self.best = about["best"]
        self.clock = Clock(schedule.steps, self.first)
        self.base = jax.random.key(schedule.seed)

    def step(self, step: int, progress: Callable[[Progress], None], stop: Callable[[], bool]) -> dict[str, Any]:
        """One update of the state; what the metrics say of it."""
        place = self.batches.get_state()
        total = self._gradients(step, place, progress, stop)
        value, norm, weight = (float(x) for x in self.functions.measure(total))
        if not (math.isfinite(value) and math.isfinite(norm)):
            self.save(step, place)
            kept = f" The parameters before it, after {step} steps, are kept in {self.run.path}." if self.run else ""
            raise JpruneError(
                f"at step {step + 1} the loss is {value:.4g} and the norm of its gradient {norm:.4g}: training has "
                f"diverged. Lower `learning_rate`, or look at the data.{kept}"
            )
        if weight:  # else the batch has nothing to learn
            with self.clock.stopped() if step == self.first else contextlib.nullcontext():  # it compiles
                self.state = jax.block_until_ready(self.functions.update(*self.state, total, self.frozen))
        self.clock.loss = value
        return {"loss": value, "gradient_norm": norm, "tokens_per_second": round(self.clock.speed or 0.0, 1)}

    def _gradients(
        self, step: int, place: Any, progress: Callable[[Progress], None], stop: Callable[[], bool]
    ) -> tuple[PyTree, Array, Array]:
        """Gradients, losses and weights of the next batch, summed up."""
        steps = self.schedule.steps
        try:
            batch = next(self.batches)
        except StopIteration:
            raise JpruneError(
                f"the data ended after {step} of {steps} steps; give more data, more epochs or fewer steps"
            ) from None
        total = self.functions.zeros()
        parts = list(micro_batches(batch, self.schedule.micro_batch, self.mesh))
        for i, part in enumerate(parts):
            key = jax.random.fold_in(jax.random.fold_in(self.base, step), i)
            total = jax.block_until_ready(self.functions.add(total, self.state[0], self.frozen, part, key))
            progress(self.clock.tick(step + (i + 1) / len(parts), part["tokens"].size))
            if stop():
                self.save(step, place)
                where = f"its state is in {self.run.path}; go on with `resume`" if self.run else "nothing was saved"
                raise Interrupted(f"after {step} of {steps} steps; {where}")
        return total

    def evaluate(self, done: int, evaluate: Callable[[PyTree, PyTree], float], *, keep_best: bool) -> float:
        """The loss of the state, which is kept if it is the best so far."""
        with self.clock.stopped():
            now = float(evaluate(self.state[0], self.frozen))
        if not keep_best:
            self.best = {"step": done, "loss": now}  # in the end the last: its step is evaluated
        elif self.best is None or now < self.best["loss"]:
            self.best = {"step": done, "loss": now}
            if self.run is None:
                self.best_kept = jax.tree.map(np.asarray, self.state[0])
            else:
                self.run.save_best(done, self.state[0], self.best)
        return now

    def save(self, step: int, place: Any) -> None:
        """Keeps the state after a number of steps, if there is a folder for it."""
        if self.run is not None:
            self.run.save(step, self.state, {"data": place, "best": self.best})

    def result(self) -> PyTree:
        """The trainable parameters that come back: those of the best step, or of the last."""
        if self.best is None or self.best["step"] == self.schedule.steps:
            return self.state[0]
        return self.best_kept if self.run is None else self.run.restore_best(self.state[0])[0]


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0

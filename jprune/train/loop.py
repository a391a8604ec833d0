"""The training loop: whatever is trained here is trained by this.

A step takes one batch from the iterator, in micro-batches of rows as large as memory (or a CPU's cache) allows. Losses
come as (sum, weight) and their gradients are added up in float32, so the mean gradient is that of the whole batch
exactly as its tokens weigh, whatever the micro-batches. Then Optax makes the update.

The loop knows functions, pytrees and iterators: no model, no file format. Trainable and frozen parameters and the
optimizer's state may lie sharded on a mesh (`jprune.train.sharding`). All randomness follows from the seed, the number
of the step and that of the micro-batch, and the place in the data is part of the state, so a resumed run continues
bit for bit as if nothing had happened.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from jprune.errors import JpruneError
from jprune.train import metrics, sharding
from jprune.train.state import StateFolder

PyTree = Any
Batch = Mapping[str, Any]
"""Arrays [B, ...]; rows whose "weights" are all zero count for nothing."""
Loss = Callable[[PyTree, PyTree, Batch, Key[Array, ""]], tuple[Float[Array, ""], Float[Array, ""]]]
"""(trainable, frozen, batch, key) -> (sum of weighted losses, sum of weights)."""


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
    """Rows of a batch computed at once; all of them by default. The result does not depend on it but for rounding."""
    evaluate_every: int | None = None
    """Steps between two evaluations; the last step is evaluated too."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints; there is one at the end in any case."""
    seed: int = 0
    """Of dropout and the like."""

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise JpruneError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the training is."""

    step: float
    """Steps done; the fraction counts micro-batches."""
    steps: int
    loss: float | None
    """Of the last step, in nats."""
    tokens_per_second: float | None
    """Since the first micro-batch, which compiles."""
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came out."""

    trainable: PyTree
    """The best by evaluation, or the last where nothing was evaluated or the best is not kept."""
    step: int
    """After how many steps that was."""
    evaluation_loss: float | None
    """Of it, in nats."""
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
    settings = {**(settings or {}), "steps": schedule.steps, "seed": schedule.seed}
    run = None if folder is None else StateFolder(folder, settings, resume=resume)
    trainable, frozen = sharding.put(trainable, mesh, copy=True), sharding.put(frozen, mesh)  # updates overwrite
    functions = _Functions(loss, optimizer, trainable, mesh)
    state = (trainable, functions.init(trainable))
    first, best = 0, None
    if run is not None and run.steps():
        first = run.steps()[-1]
        state, about = run.restore(first, state)
        batches.set_state(about["data"])
        best = about["best"]
    log = None if run is None else metrics.Metrics(run.path, after=first)
    history = [] if run is None else metrics.read(run.path / metrics.NAME)
    best_kept: PyTree = None  # where there is no folder
    clock = _Clock(schedule.steps, first)
    base = jax.random.key(schedule.seed)

    def save(step: int, place: Any) -> None:
        if run is not None:
            run.save(step, state, {"data": place, "best": best})

    with contextlib.closing(log) if log else contextlib.nullcontext():
        for step in range(first, schedule.steps):
            place = batches.get_state()
            try:
                batch = next(batches)
            except StopIteration:
                raise JpruneError(
                    f"the data ended after {step} of {schedule.steps} steps; give more data, more epochs or fewer steps"
                ) from None
            total = functions.zeros()
            parts = list(micro_batches(batch, schedule.micro_batch, mesh))
            for i, part in enumerate(parts):
                key = jax.random.fold_in(jax.random.fold_in(base, step), i)
                total = jax.block_until_ready(functions.add(total, state[0], frozen, part, key))
                progress(clock.tick(step + (i + 1) / len(parts), part["tokens"].size))
                if stop():
                    save(step, place)
                    where = "nothing was saved" if run is None else f"its state is in {run.path}; go on with --resume"
                    raise Interrupted(f"after {step} of {schedule.steps} steps; {where}")
            value, norm, weight = (float(x) for x in functions.measure(total))
            if not (math.isfinite(value) and math.isfinite(norm)):
                save(step, place)
                kept = "" if run is None else f" The parameters before it, after {step} steps, are kept in {run.path}."
                raise JpruneError(
                    f"at step {step + 1} the loss is {value:.4g} and the norm of its gradient {norm:.4g}: training has "
                    f"diverged. Lower --learning-rate, or look at the data.{kept}"
                )
            if weight:  # else the batch has nothing to learn
                with clock.stopped() if step == first else contextlib.nullcontext():  # it compiles
                    state = jax.block_until_ready(functions.update(*state, total, frozen))
            clock.loss = value
            line = {"loss": value, "gradient_norm": norm, "tokens_per_second": round(clock.speed or 0.0, 1)}
            if rate is not None:
                line["learning_rate"] = float(rate(step))
            done = step + 1
            if evaluate is not None and (_due(schedule.evaluate_every, done) or done == schedule.steps):
                with clock.stopped():
                    line["evaluation_loss"] = now = float(evaluate(state[0], frozen))
                if not keep_best:
                    best = {"step": done, "loss": now}  # in the end the last: its step is evaluated
                elif best is None or now < best["loss"]:
                    best = {"step": done, "loss": now}
                    if run is None:
                        best_kept = jax.tree.map(np.asarray, state[0])
                    else:
                        run.save_best(done, state[0], best)
            if watch is not None:
                line.update(watch(*state))
            history.append({"step": done, **line})
            if log is not None:
                log.write(done, **line)
            if _due(schedule.checkpoint_every, done) or done == schedule.steps:
                with clock.stopped():
                    save(done, batches.get_state())
            progress(clock.tick(float(done), 0))
    result, at = state[0], schedule.steps
    if best is not None and best["step"] != schedule.steps:
        result = best_kept if run is None else run.restore_best(state[0])[0]
        at = best["step"]
    return Trained(
        trainable=result,
        step=at,
        evaluation_loss=None if best is None else best["loss"],
        history=history,
        tokens_per_second=clock.speed,
        resumed_from=first,
    )


class _Functions:
    """The jitted parts of a step."""

    def __init__(self, loss: Loss, optimizer: optax.GradientTransformation, trainable: PyTree, mesh: Mesh | None):
        optimizer = optax.with_extra_args_support(optimizer)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), _floats(trainable))
        whole = None if mesh is None else sharding.state(mesh, jnp.zeros(()))
        place = sharding.state_tree(mesh, like)
        totals = None if mesh is None else (place, whole, whole)

        def zeros() -> tuple[PyTree, Array, Array]:
            gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            return gradients, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)

        def add(total: tuple, trainable: PyTree, frozen: PyTree, batch: Batch, key: Array) -> tuple:
            def weighted(floats: PyTree) -> tuple[Array, Array]:
                whole = jax.tree.map(
                    lambda x, own: x if own is None else own, trainable, floats, is_leaf=lambda x: x is None
                )
                return loss(whole, frozen, batch, key)

            (value, weight), gradients = jax.value_and_grad(weighted, has_aux=True)(_floats(trainable))
            sums = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total[0], gradients)
            return sums, total[1] + value.astype(jnp.float32), total[2] + weight.astype(jnp.float32)

        def measure(total: tuple) -> tuple[Array, Array, Array]:
            gradients, value, weight = total
            count = jnp.maximum(weight, 1e-20)
            return value / count, optax.tree.norm(gradients) / count, weight

        def update(trainable: PyTree, optimizer_state: PyTree, total: tuple, frozen: PyTree) -> tuple[PyTree, PyTree]:
            gradients = jax.tree.map(lambda g, p: (g / total[2]).astype(p.dtype), total[0], _floats(trainable))
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole numbers
                updates, optimizer_state = optimizer.update(gradients, optimizer_state, trainable, frozen=frozen)
                return optax.apply_updates(trainable, updates), optimizer_state

        states = None
        if mesh is not None:
            states = (
                sharding.state_tree(mesh, trainable),
                sharding.state_tree(mesh, jax.eval_shape(optimizer.init, trainable)),
            )
        self.zeros = jax.jit(zeros, out_shardings=totals)
        self.add = jax.jit(add, out_shardings=totals, donate_argnums=0)
        self.measure = jax.jit(measure)
        self.update = jax.jit(update, out_shardings=states, donate_argnums=(0, 1))
        self.init = jax.jit(optimizer.init, out_shardings=None if states is None else states[1])


def _floats(tree: PyTree) -> PyTree:
    """The tree with None instead of leaves that no gradient can be taken by."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, tree)


def micro_batches(batch: Batch, rows: int | None, mesh: Mesh | None) -> Iterator[dict[str, Array]]:
    """The batch in parts of equal shape; what the last one lacks is filled with rows of weight zero."""
    size = len(next(iter(batch.values())))
    shares = sharding.batch_shares(mesh)
    rows = -(-min(rows or size, size) // shares) * shares
    for start in range(0, size, rows):
        part = {name: np.asarray(x[start : start + rows]) for name, x in batch.items()}
        lacking = rows - len(next(iter(part.values())))
        if lacking:
            part = {n: np.concatenate([x, np.zeros((lacking, *x.shape[1:]), x.dtype)]) for n, x in part.items()}
        where = None if mesh is None else sharding.batch(mesh)
        yield {name: jax.device_put(x, where) for name, x in part.items()}


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0


class _Clock:
    """Tokens a second and time left; compiling, evaluating and saving do not count."""

    def __init__(self, steps: int, first: int):
        self.steps = steps
        self.loss: float | None = None
        self._begin: float | None = None
        self._begin_step, self._tokens = float(first), 0
        self.speed: float | None = None

    def tick(self, step: float, tokens: int) -> Progress:
        now = time.perf_counter()
        left = None
        if self._begin is None:
            self._begin, self._begin_step = now, step
        else:
            self._tokens += tokens
            if tokens and now > self._begin:
                self.speed = self._tokens / (now - self._begin)
            if step > self._begin_step:
                left = (now - self._begin) / (step - self._begin_step) * (self.steps - step)
        return Progress(step=step, steps=self.steps, loss=self.loss, tokens_per_second=self.speed, seconds_left=left)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Time inside does not count."""
        start = time.perf_counter()
        yield
        if self._begin is not None:
            self._begin += time.perf_counter() - start

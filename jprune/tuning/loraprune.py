"""One LoRAPrune run: a checkpoint in; a smaller or sparser one, with what was learnt on the way, and its record out.

The method is `jprune.train.loraprune`; what is masked, and what comes out, `jprune.tuning.masked_adapters`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jprune import trees
from jprune.checkpoints import Checkpoint, formats, load
from jprune.checkpoints.formats import Format
from jprune.data import windows
from jprune.errors import JpruneError
from jprune.models import stacked
from jprune.pipeline.shrink.run import ShrinkPlan
from jprune.pipeline.training.run import Result, TuneReport, model_writer, train_and_write
from jprune.pipeline.training.session import Training
from jprune.runs import output
from jprune.runs.report import Progress
from jprune.runs.stopwatch import Stopwatch
from jprune.train import lora
from jprune.train.loop import Trained
from jprune.train.loraprune import kept, loraprune
from jprune.train.schedules import SparsitySchedule, cubic
from jprune.tuning.masked_adapters import Adapted, Masks, UnitMasks, WeightMasks
from jprune.tuning.recovery import KERNELS, Adapters, Task
from jprune.tuning.weights import block_kernels, blockwise_loss, compute_dtype

PyTree = Any
NAME = "loraprune"
EPOCHS = 2
"""Unless said otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAPrune(Adapters):
    """Remove heads and channels, or single weights, while adapters are trained and merged (Zhang et al. 2023).

    Defaults are those of its authors' script: 2 epochs, batch 128, learning rate 1e-4, masks chosen every 10 steps.
    """

    ratio: float | None = None
    """Share of the heads and feed-forward channels to remove, of each layer that is pruned."""
    sparsity: float | None = None
    """Instead of --ratio: share of the single weights of each output to set to zero."""
    every: int = 10
    """Steps between two choices of what goes."""
    begin: float = 0.1
    """Share of the steps before anything goes; then ever more does, along a cubic curve."""
    end: float = 0.9
    """Share of the steps after which everything has gone that is to go."""
    protect_first: int | None = None
    """First layers that are left alone. By default a tenth of all, or none with --uniform or --sparsity."""
    protect_last: int | None = None
    """Last layers that are left alone. By default 1, or none with --uniform or --sparsity."""
    uniform: bool = False
    """The same sizes in every layer: protects none unless asked to, so that a plain Hugging Face folder comes out."""
    batch_size: int = 128
    """Windows an update."""
    dropout: float = 0.05
    """Of what the adapters read; not with --sparsity, where kernel and adapter are one."""

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.sparsity is None):
            raise JpruneError(
                "say how much is to go: either a share of heads and channels (--ratio) or of weights (--sparsity)"
            )
        if not 0 < self.share < 1:
            name = "--ratio" if self.sparsity is None else "--sparsity"
            raise JpruneError(f"{name} lies between 0 and 1, got {self.share}")
        if self.sparsity is not None and self.uniform:
            raise JpruneError("--uniform is about the sizes of layers; with --sparsity none changes")
        super().__post_init__()
        if self.every < 1:
            raise JpruneError(f"--every must be at least 1, got {self.every}")
        if not 0 <= self.begin < self.end <= 1:
            raise JpruneError(f"expected 0 <= --begin < --end <= 1, shares of the steps; got {self.begin}, {self.end}")
        for name in ("protect_first", "protect_last"):
            if (getattr(self, name) or 0) < 0:
                raise JpruneError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")

    @property
    def share(self) -> float:
        """Of units or of weights that go in the end."""
        return self.ratio if self.ratio is not None else self.sparsity  # type: ignore[return-value]

    def protected(self, layers: int) -> tuple[int, int]:
        """How many of the first and of the last layers are left alone."""
        usual = (0, 0) if self.uniform or self.sparsity is not None else (layers // 10, 1)
        first, last = (u if p is None else p for u, p in zip(usual, (self.protect_first, self.protect_last)))
        return first, last

    def growth(self, steps: int) -> SparsitySchedule:
        """The share that is gone after each of `steps` steps, counted from 1.

        Raises:
          JpruneError: too few steps to choose twice.
        """
        begin, end = int(self.begin * steps), int(self.end * steps)
        if end - begin < self.every or end < 1:
            raise JpruneError(
                f"of {steps} steps {end - begin} are there to prune in (--begin {self.begin}, --end {self.end}), fewer "
                f"than --every {self.every}: all would go at once; give more steps, or a lower --every"
            )
        return cubic(self.share, begin=begin, end=end)

    def masks(self, checkpoint: Checkpoint) -> Masks:
        """What is masked.

        Raises:
          JpruneError: a model with experts, or whose units cannot be masked; or too little to prune.
        """
        config = checkpoint.config
        if config.experts:
            raise JpruneError(
                f"{config.architecture}: kernels of experts get no adapters, so loraprune learns nothing of them; use "
                "jprune prune llm-pruner, or a method for weights"
            )
        adapted = Adapted(
            checkpoint=checkpoint,
            in_axes=block_kernels(checkpoint),
            alpha=self.alpha,
            dtype=compute_dtype(checkpoint, self.base_dtype),
        )
        first, last = self.protected(config.layers)
        kind = UnitMasks if self.sparsity is None else WeightMasks
        masks = kind(adapted, first=first, last=last)
        if not any(times and int(count * self.share) for count, times in masks.sizes().values()):
            raise JpruneError(f"a share of {self.share} is less than one of any layer's: nothing to prune; give more")
        return masks

    def task(self, checkpoint: Checkpoint, steps: int, masks: Masks) -> Task:
        """Adapters on all kernels of the blocks, masks beside them; base weights in `base_dtype`."""
        in_axes = block_kernels(checkpoint)
        key = jax.random.key(self.seed)
        adapters = lora.init(checkpoint.shapes, in_axes, rank=self.rank, key=key, targets=KERNELS)
        keep = masks.start()
        runs = stacked.runs(checkpoint.config, checkpoint.shapes, adapters, keep)
        adamw = self.adamw()

        def own(trainable: PyTree, run: str) -> PyTree:
            return {kind: tree["blocks"][run] for kind, tree in trainable.items()}

        def sums(dropout: float) -> Callable:
            return blockwise_loss(checkpoint, lambda block: masks.around(block, dropout), own)

        with_dropout, without = sums(self.dropout), sums(0.0)
        return Task(
            trainable={"adapters": stacked.stack(adapters, runs), "keep": stacked.stack(keep, runs)},
            frozen=self.frozen(checkpoint, runs, in_axes),
            loss=with_dropout,
            evaluation=lambda trainable, frozen, batch: without(trainable, frozen, batch, None),
            optimizer=optax.chain(
                adamw.clipping(),
                loraprune(masks.criterion(runs), self.growth(steps), every=self.every),
                optax.masked(adamw.rule(steps), {"adapters": True, "keep": False}),
            ),
            read=lambda trainable, path: masks.result(trainable)[1](path),
            dtype=compute_dtype(checkpoint, self.base_dtype),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAPruneReport(TuneReport):
    """The result of a LoRAPrune run; `parameters` are those before."""

    parameters_after: int
    pruned: tuple[int, int]
    """Units or weights that went, and how many there were in the layers that are pruned."""
    sizes: tuple[dict[str, int], ...]
    """Of every layer of the result."""

    def json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {
            **super().json(),
            "parameters": {"before": self.parameters, "after": self.parameters_after},
            "pruned": {"count": self.pruned[0], "of": self.pruned[1]},
            "sizes": list(self.sizes),
        }


def loraprune_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    method: LoRAPrune,
    data: windows.Spec | Mapping[str, windows.Spec],
    evaluate: windows.Spec | Mapping[str, windows.Spec] | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    format: Format | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> LoRAPruneReport:
    """Prunes a model while it is tuned, and writes the result.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      out: folder of the result; it appears when everything is done.
      method: `LoRAPrune(ratio=0.5)` or `LoRAPrune(sparsity=0.5)`.
      data: source of the training data, as for `tune_model`.
      evaluate: source of a text whose perplexity is measured before and after.
      evaluate_every: steps between two evaluations on it, for the metrics: the result is the last state.
      checkpoint_every: steps between two checkpoints in ``OUT.run``; by default a tenth of all.
      format: see `jprune.checkpoints.formats`; by default "hf" if all layers end up equal, else "jprune".
      resume: go on with the run in ``OUT.run``, if there is one.
      overwrite: replace an `out`, and forget an ``OUT.run``, that an earlier run left.
      progress: called often.
      options: of the data and the devices, as for `tune_model`: sequence_length, windows_at_most, train_on_prompt,
        evaluate_length, evaluate_windows, fsdp, proportions, dynamic_loading.

    Raises:
      JpruneError: anything that does not fit; `out` is then untouched.
      jprune.train.loop.Interrupted: Ctrl-C; the state is kept in ``OUT.run``.
    """
    stopwatch = Stopwatch()
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    out = Path(out).expanduser()
    output.check(out, overwrite=overwrite, source=checkpoint.source)
    masks = method.masks(checkpoint)
    planned = _planned(checkpoint, method, masks)  # what cannot be written is refused before the work
    chosen: Format = format or ("hf" if planned.config.uniform else "jprune")
    formats.check(planned, chosen)
    training = Training(checkpoint, method, stopwatch, progress, epochs=EPOCHS, data=data, evaluate=evaluate, **options)
    growth = method.growth(training.steps)
    with stopwatch.phase("load"):
        task = method.task(checkpoint, training.steps, masks)

    def result(trained: Trained) -> Result:
        trainable = jax.tree.map(np.asarray, trained.trainable)
        pruned = _checked(masks, trainable["keep"], method.share)
        smaller, read = masks.result(trainable)
        kept = {"kept": _listed(masks.kept(trainable["keep"]))} if isinstance(masks, UnitMasks) else {}
        return Result(
            write=model_writer(smaller, ((path, read(path)) for path in smaller.shapes), chosen),
            trainable_parameters=lora.trainable_parameters(trainable["adapters"]),
            own={"parameters_after": smaller.parameters, "pruned": pruned, "sizes": smaller.sizes},
            details={"schedule": dataclasses.asdict(growth), **kept, "format": chosen},
        )

    return train_and_write(
        training,
        task,
        out,
        recipe={"method": NAME, **dataclasses.asdict(method)},
        result=result,
        report=LoRAPruneReport,
        keep_best=False,  # before the schedule's end too little has gone
        watch=_watch(masks, task.trainable["keep"], growth),
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        resume=resume,
        overwrite=overwrite,
    )


def plan_loraprune(model: Checkpoint | str | Path, *, method: LoRAPrune) -> ShrinkPlan:
    """The sizes of the result, without a weight or a text; a folder with a config.json is enough.

    Raises:
      JpruneError: as `loraprune_model`, for what can be known from shapes.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load(model, weights=False)
    smaller = _planned(checkpoint, method, method.masks(checkpoint))
    return ShrinkPlan(parameters=(checkpoint.parameters, smaller.parameters), sizes=smaller.sizes, units=())


def _planned(checkpoint: Checkpoint, method: LoRAPrune, masks: Masks) -> Checkpoint:
    """The sizes of the result as a view: how many units go does not depend on which."""
    if isinstance(masks, WeightMasks):
        return checkpoint
    counts = masks.sizes()
    keep = {path: np.arange(count) >= times * int(count * method.share) for path, (count, times) in counts.items()}
    return masks.result({"adapters": {}, "keep": trees.unflatten(keep)})[0]


def _watch(masks: Masks, start: PyTree, growth: SparsitySchedule) -> Callable[[PyTree, PyTree], dict[str, Any]]:
    """(trainable, the optimizer's state) -> the share that is to be gone, and the share that is."""
    count = jax.jit(kept)
    whole, prunable = float(count(start)), sum(math.prod(size) for size in masks.sizes().values())

    def watch(trainable: PyTree, state: PyTree) -> dict[str, Any]:
        gone = whole - float(count(trainable["keep"]))
        return {"ratio": round(float(growth(state[1].step)), 6), "pruned": round(gone / prunable, 6)}

    return watch


def _checked(masks: Masks, keep: PyTree, share: float) -> tuple[int, int]:
    """How many have gone, of how many."""
    gone = of = 0
    for path, (count, times) in masks.sizes().items():
        expected = int(count * share)
        if times and not np.all(masks.gone(keep, path) == expected):
            raise JpruneError(
                f"{path}: {expected} of {count} should have gone by the end of the training, and have not: there were "
                "too many batches without a token to learn"
            )
        gone, of = gone + times * expected, of + times * count
    return gone, of


def _listed(units: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: stay.tolist() for name, stay in units.items()}


__all__ = ["LoRAPrune", "LoRAPruneReport", "loraprune_model", "plan_loraprune"]

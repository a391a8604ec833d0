"""LoRAPrune (Zhang et al., arXiv:2305.18403): heads and channels, or single weights, go while adapters are trained.

The method is `jprune.train.loraprune`; what is masked, and what comes out, `jprune.tuning.masked_adapters`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
import optax

from jprune import counts
from jprune.checkpoints import Checkpoint
from jprune.errors import JpruneError
from jprune.models import stacked
from jprune.train import lora
from jprune.train.loraprune import kept, loraprune
from jprune.train.schedules import SparsitySchedule, cubic
from jprune.tuning.base import KERNELS, Adapters, Outcome, Prepared, Task
from jprune.tuning.masked_adapters import Adapted, Masks, UnitMasks, WeightMasks
from jprune.tuning.report import PrunedReport
from jprune.tuning.weights import block_kernels, blockwise_loss, compute_dtype

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAPrune(Adapters):
    """Remove heads and channels, or single weights, while adapters are trained and merged (Zhang et al. 2023).

    Defaults are those of its authors' script: 2 epochs, batch 128, learning rate 1e-4, masks chosen every 10 steps.
    """

    keep_best: ClassVar[bool] = False  # before the schedule's end too little has gone

    ratio: float | None = None
    """Share of the heads and feed-forward channels to remove, of each layer that is pruned."""
    sparsity: float | None = None
    """Instead of `ratio`: share of the single weights of each output to set to zero."""
    every: int = 10
    """Steps between two choices of what goes."""
    begin: float = 0.1
    """Share of the steps before anything goes; then ever more does, along a cubic curve."""
    end: float = 0.9
    """Share of the steps after which everything has gone that is to go."""
    protect_first: int | None = None
    """First layers that are left alone. By default a tenth of all, or none with `uniform` or `sparsity`."""
    protect_last: int | None = None
    """Last layers that are left alone. By default 1, or none with `uniform` or `sparsity`."""
    uniform: bool = False
    """The same sizes in every layer: protects none unless asked to, so that a plain Hugging Face folder comes out."""
    batch_size: int = 128
    """Windows an update."""
    dropout: float = 0.05
    """Dropout of what the adapters read; not with `sparsity`, where kernel and adapter are one."""

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.sparsity is None):
            raise JpruneError(
                "say how much is to go: either a share of heads and channels (`ratio`) or of weights (`sparsity`)"
            )
        if not 0 < self.share < 1:
            name = "`ratio`" if self.sparsity is None else "`sparsity`"
            raise JpruneError(f"{name} lies between 0 and 1, got {self.share}")
        if self.sparsity is not None and self.uniform:
            raise JpruneError("`uniform` is about the sizes of layers; with `sparsity` none changes")
        super().__post_init__()
        if self.every < 1:
            raise JpruneError(f"`every` must be at least 1, got {self.every}")
        if not 0 <= self.begin < self.end <= 1:
            raise JpruneError(f"expected 0 <= `begin` < `end` <= 1, shares of the steps; got {self.begin}, {self.end}")
        for name in ("protect_first", "protect_last"):
            if (getattr(self, name) or 0) < 0:
                raise JpruneError(f"`{name}` must not be negative, got {getattr(self, name)}")

    @property
    def share(self) -> float:
        """Share of the units or of the weights that go in the end."""
        return self.ratio if self.ratio is not None else self.sparsity  # type: ignore[return-value]

    def protected(self, layers: int) -> tuple[int, int]:
        """Numbers of the first and of the last layers that are left alone."""
        usual = (0, 0) if self.uniform or self.sparsity is not None else (layers // 10, 1)
        first, last = (u if p is None else p for u, p in zip(usual, (self.protect_first, self.protect_last)))
        return first, last

    def growth(self, steps: int) -> SparsitySchedule:
        """The share that is gone after each of the steps, counted from 1.

        Raises:
          JpruneError: too few steps to choose twice.
        """
        begin, end = int(self.begin * steps), int(self.end * steps)
        if end - begin < self.every or end < 1:
            raise JpruneError(
                f"of {steps} steps {end - begin} are there to prune in (`begin` {self.begin}, `end` {self.end}), fewer "
                f"than `every` {self.every}: all would go at once; give more steps, or a lower `every`"
            )
        return cubic(self.share, begin=begin, end=end)

    def prepare(self, checkpoint: Checkpoint) -> Prepared:
        """The sizes of the result follow from the share alone: which units go does not matter to them."""
        masks = self.masks(checkpoint)
        return Prepared(planned=masks.planned(self.share), task=lambda steps: self.task(checkpoint, steps, masks))

    def masks(self, checkpoint: Checkpoint) -> Masks:
        """The masks of units or of weights, for this model.

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
        if not any(times and counts.floor(count, self.share) for count, times in masks.sizes().values()):
            raise JpruneError(f"a share of {self.share} is less than one of any layer's: nothing to prune; give more")
        return masks

    def task(self, checkpoint: Checkpoint, steps: int, masks: Masks) -> Task:
        """Adapters on all kernels of the blocks, masks beside them; base weights in `base_dtype`."""
        growth = self.growth(steps)
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
        trainable = {"adapters": stacked.stack(adapters, runs), "keep": stacked.stack(keep, runs)}
        return Task(
            trainable=trainable,
            frozen=self.frozen(checkpoint, runs, in_axes),
            loss=with_dropout,
            evaluation=lambda trainable, frozen, batch: without(trainable, frozen, batch, None),
            optimizer=optax.chain(
                adamw.clipping(),
                loraprune(masks.criterion(runs), growth, every=self.every),
                optax.masked(adamw.rule(steps), {"adapters": True, "keep": False}),
            ),
            result=functools.partial(self._result, masks, growth),
            dtype=compute_dtype(checkpoint, self.base_dtype),
            watch=_watch(masks, trainable["keep"], growth),
        )

    def _result(self, masks: Masks, growth: SparsitySchedule, trainable: PyTree) -> Outcome:
        """The adapters merged, without what the masks leave out."""
        trainable = jax.tree.map(np.asarray, trainable)
        pruned = masks.pruned(trainable["keep"], self.share)
        smaller, read = masks.result(trainable)
        return Outcome(
            model=smaller,
            leaves=((path, read(path)) for path in smaller.shapes),
            trainable_parameters=lora.trainable_parameters(trainable["adapters"]),
            report=functools.partial(
                LoRAPruneReport, parameters_after=smaller.parameters, pruned=pruned, sizes=smaller.sizes
            ),
            details={"schedule": dataclasses.asdict(growth), **masks.described(trainable["keep"])},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAPruneReport(PrunedReport):
    """The result of a LoRAPrune run."""

    pruned: tuple[int, int]
    """Units or weights that went, and how many there were in the layers that are pruned."""

    def own_json(self) -> dict[str, Any]:
        """The fields of ``--json`` that only this kind of run has."""
        return {**super().own_json(), "pruned": {"count": self.pruned[0], "of": self.pruned[1]}}

    def lines(self, change: str) -> tuple[str, ...]:
        """What the command says of the result, a line each; `change` is that of the parameters, in words."""
        gone, of = self.pruned
        what = "weights" if self.parameters == self.parameters_after else "heads and channels"
        return (f"{gone:,} of {of:,} {what} went; parameters: {change}",)


def _watch(masks: Masks, start: PyTree, growth: SparsitySchedule) -> Callable[[PyTree, PyTree], dict[str, Any]]:
    """(trainable, the optimizer's state) -> the share that is to be gone, and the share that is."""
    count = jax.jit(kept)
    whole, prunable = float(count(start)), masks.prunable()

    def watch(trainable: PyTree, state: PyTree) -> dict[str, Any]:
        gone = whole - float(count(trainable["keep"]))
        return {"ratio": round(float(growth(state[1].step)), 6), "pruned": round(gone / prunable, 6)}

    return watch


__all__ = ["LoRAPrune", "LoRAPruneReport"]

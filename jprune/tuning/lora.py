"""LoRA: low-rank adapters beside the frozen weights, merged in the end (LLM-Pruner's recovery, arXiv:2305.11627).

Zeros of the kernels stay zero in the merged model. With `keep_adapters` they are written apart instead, for PEFT.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from jprune import trees
from jprune.checkpoints import Checkpoint
from jprune.checkpoints.huggingface import peft
from jprune.errors import JpruneError
from jprune.models import stacked
from jprune.train import lora
from jprune.train.quantise import dequantise_tree
from jprune.tuning.base import KERNELS, Adapters, Outcome, Prepared, Task, Taught
from jprune.tuning.weights import TEACHER, block_kernels, blockwise_loss, compute_dtype, merge_adapter

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Taught, Adapters):
    """Train low-rank adapters beside the frozen weights, and merge them (LLM-Pruner's recovery).

    Defaults are those that its authors recommend: 2 epochs, batch 64, learning rate 1e-4, 100 steps of warm-up.
    """

    only_how: ClassVar[tuple[str, ...]] = ("micro_batch", "keep_adapters")

    targets: str | None = None
    """Kernels that get adapters: names such as q,v, or regular expressions over paths, separated by commas. By default
    all kernels of the blocks (but of experts)."""
    keep_adapters: bool = False
    """Write only the adapters, in PEFT's form, instead of the model with the adapters merged."""

    @property
    def makes_a_model(self) -> bool:
        """Whether the adapters are merged."""
        return not self.keep_adapters

    def prepare(self, checkpoint: Checkpoint) -> Prepared:
        """The model keeps its shapes."""
        return Prepared(planned=checkpoint, task=functools.partial(self.task, checkpoint))

    def task(self, checkpoint: Checkpoint, steps: int) -> Task:
        """Adapters on the kernels of the blocks; base weights in `base_dtype`."""
        in_axes = block_kernels(checkpoint)
        key = jax.random.key(self.seed)
        adapters = lora.init(checkpoint.shapes, in_axes, rank=self.rank, key=key, targets=self._patterns(in_axes))
        if self.keep_adapters:
            for path in lora.by_path(adapters):  # what PEFT has no name for is refused before the work
                peft.name(checkpoint, path)
        runs = stacked.runs(checkpoint.config, checkpoint.shapes, adapters)
        dtype = compute_dtype(checkpoint, self.base_dtype)

        def around(dropout: float) -> stacked.Around:
            def with_adapters(block: Callable) -> Callable:
                adapted = lora.adapt(block, alpha=self.alpha, dropout=dropout)
                return lambda params, aside, x: adapted(dequantise_tree(params, dtype), *aside, x)

            return with_adapters

        def own(trainable: PyTree, run: str) -> PyTree:
            return trainable.get("blocks", {}).get(run, {})

        distance, teacher = self.distillation(checkpoint, dtype, around=around(self.dropout))
        without = blockwise_loss(checkpoint, around(0.0), own)
        return Task(
            trainable=stacked.stack(adapters, runs),
            frozen=self.frozen(checkpoint, runs, in_axes) | ({TEACHER: teacher} if teacher else {}),
            loss=blockwise_loss(checkpoint, around(self.dropout), own, distance=distance),
            evaluation=lambda trainable, frozen, batch: without(trainable, frozen, batch, None),
            optimizer=self.adamw().transformation(steps),
            result=functools.partial(self._result, checkpoint, in_axes),
            dtype=dtype,
        )

    def _patterns(self, paths: Mapping[str, Any]) -> list[str]:
        if self.targets is None:
            return [KERNELS]
        names = {path.split("/")[-2] for path in paths}
        wanted = [target.strip() for target in self.targets.split(",") if target.strip()]
        if not wanted:
            raise JpruneError(f"`targets` names no kernel; there are {', '.join(sorted(names))}")
        for target in wanted:
            if target.isidentifier() and target not in names:
                known = ", ".join(sorted(names))
                raise JpruneError(f"`targets`: {target!r} matches no kernel of this model; there are {known}")
        return [f"/{target}/kernel$" if target in names else target for target in wanted]

    def _result(self, checkpoint: Checkpoint, in_axes: Mapping[str, tuple[int, ...]], trainable: PyTree) -> Outcome:
        """The tuned model; or its adapters, if they are to stay adapters."""
        trainable = jax.tree.map(np.asarray, trainable)

        def read(path: str) -> np.ndarray:
            kernel = checkpoint.read(path)
            merged = merge_adapter(kernel, trainable, path, self.alpha, in_axes)
            return np.where(kernel == 0, np.zeros_like(kernel), merged)  # what is pruned stays pruned

        def write(folder: Path) -> tuple[str, ...]:
            adapters = lora.by_path(stacked.unstack(trainable))
            peft.save(folder, checkpoint, adapters, alpha=self.alpha, dropout=self.dropout)
            return (f"only the adapters were written; they go with {checkpoint.source}",)

        return Outcome(
            model=checkpoint,
            leaves=((path, read(path)) for path in checkpoint.shapes),
            trainable_parameters=lora.trainable_parameters(trainable),
            write=write if self.keep_adapters else None,
            weights=_Merged(checkpoint, read) if self.keep_adapters else None,
        )


class _Merged:
    """A model and its trained adapters as weights to be read, without a file."""

    def __init__(self, checkpoint: Checkpoint, read: Callable[[str], np.ndarray]):
        self.config, self.model = checkpoint.config, checkpoint.model
        self._paths, self._read = tuple(checkpoint.shapes), read

    def params(self, prefix: str) -> dict[str, Any]:
        """The subtree of parameters below a path."""
        start = f"{prefix}/" if prefix else ""
        below = [path for path in self._paths if path.startswith(start)]
        return trees.unflatten({path.removeprefix(start): self._read(path) for path in below})


__all__ = ["Lora"]

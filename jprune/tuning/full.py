"""Training of all weights that are left: what is zero in a kernel stays zero (`jprune.train.keep_masked`)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune import trees
from jprune.checkpoints import Checkpoint
from jprune.checkpoints.dtypes import cast
from jprune.errors import JpruneError
from jprune.models import loss, stacked
from jprune.train.keep_masked import keep_masked
from jprune.train.loop import Batch
from jprune.tuning.base import Outcome, Prepared, Task, Taught
from jprune.tuning.weights import Sums, compute_dtype, leaf, read_stacked

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Taught):
    """Train all weights that are left; what is zero stays zero. With a teacher, learn from its predictions."""

    learning_rate: float = 2e-5
    """Highest learning rate."""
    batch_size: int = 16
    """Windows an update."""

    def prepare(self, checkpoint: Checkpoint) -> Prepared:
        """The model keeps its shapes."""
        return Prepared(planned=checkpoint, task=functools.partial(self.task, checkpoint))

    def task(self, checkpoint: Checkpoint, steps: int) -> Task:
        """All parameters, float32, computed in the usual dtype; zeros of the kernels held by `keep_masked`."""
        runs = stacked.runs(checkpoint.config, checkpoint.shapes)
        dtype = compute_dtype(checkpoint, None)
        trainable = read_stacked(checkpoint, runs, dtype=jnp.float32)
        masks = {p: x != 0 for p, x in trees.flatten(trainable).items() if p.endswith("kernel") and not x.all()}
        language_model = loss.causal_lm(checkpoint.config)
        distance, teacher = self.distillation(checkpoint, dtype)

        def compute(trainable: PyTree) -> PyTree:
            return jax.tree.map(lambda x: x.astype(dtype), trainable)

        def sums(trainable: PyTree, frozen: PyTree, batch: Batch, key: Any) -> Sums:
            del key  # nothing is random
            if distance is not None:
                return distance(compute(trainable), frozen, batch)
            return language_model(compute(trainable), batch)

        return Task(
            trainable=trainable,
            frozen=teacher,
            loss=sums,
            evaluation=lambda trainable, frozen, batch: language_model(compute(trainable), batch),
            optimizer=self.adamw().transformation(steps, *([keep_masked(masks)] if masks else [])),
            result=functools.partial(_result, checkpoint),
            dtype=dtype,
        )


def _result(checkpoint: Checkpoint, trainable: PyTree) -> Outcome:
    """The trained weights in the dtypes of the model, whose zeros are still there."""
    trainable = jax.tree.map(np.asarray, trainable)

    def read(path: str) -> np.ndarray:
        before = checkpoint.read(path)
        after = cast(np.asarray(leaf(trainable, path)), before.dtype, path)
        if path.endswith("kernel") and (wrong := np.count_nonzero(after[before == 0])):
            raise JpruneError(f"{path}: {wrong} pruned weights are not zero after training; please report this")
        return after

    return Outcome(
        model=checkpoint,
        leaves=((path, read(path)) for path in checkpoint.shapes),
        trainable_parameters=sum(x.size for x in jax.tree.leaves(trainable)),
    )


__all__ = ["Full"]

"""Ways to tune a pruned model: low-rank adapters (`Lora`), or all weights that are left (`Full`).

Each turns a checkpoint into what the training loop needs, with equal blocks stacked so that they compile once, and
turns what was trained back into the model's parameters.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jprune import trees
from jprune.checkpoints import Checkpoint
from jprune.errors import JpruneError
from jprune.models import loss, stacked
from jprune.train import lora
from jprune.train.keep_masked import keep_masked
from jprune.train.loop import Batch, Loss
from jprune.train.optimizer import AdamW, Schedule
from jprune.train.quantise import dequantise_tree
from jprune.tuning.weights import (
    TEACHER,
    BaseDtype,
    Sums,
    block_kernels,
    blockwise_loss,
    compute_dtype,
    leaf,
    merge_adapter,
    read_stacked,
)

PyTree = Any
KERNELS = "kernel$"
"""What gets adapters by default; kernels of experts have other names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What the training loop needs, and the way back."""

    trainable: PyTree
    frozen: PyTree
    loss: Loss
    """With dropout, distillation and so on."""
    evaluation: Callable[[PyTree, PyTree, Batch], Sums]
    """(trainable, frozen, batch) -> sum of the weighted cross-entropies, and of the weights."""
    optimizer: optax.GradientTransformation
    read: Callable[[PyTree, str], np.ndarray]
    """(trainable, path) -> the model's parameter at that path after tuning."""
    dtype: Any
    """Of the activations."""
    notices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """What all ways of tuning have in common."""

    steps: int | None = None
    """Updates; instead of --epochs."""
    epochs: int | None = None
    """How often the data is gone through, if no --steps are given."""
    learning_rate: float = 1e-4
    """At its highest."""
    schedule: Schedule = "linear"
    """After the warm-up: constant, linear or cosine, down to zero at the end."""
    warmup: int | None = None
    """Steps of warm-up. By default 100, but at most a tenth of all."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip: float = 1.0
    """The gradient's global norm is cut to this; 0 leaves it."""
    batch_size: int = 64
    """Windows an update."""
    micro_batch: int | None = None
    """Windows computed at once. By default as many as have 1024 tokens on CPU, elsewhere 8192."""
    seed: int = 0
    """Of the order of the data, the adapters' start and dropout."""

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "batch_size", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise JpruneError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.steps is not None and self.epochs is not None:
            raise JpruneError("give either --steps or --epochs, not both")
        self.adamw()

    def adamw(self) -> AdamW:
        """The optimizer that the options describe."""
        return AdamW(
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taught(Tuning):
    """What all that can learn from a teacher have in common."""

    teacher: str | None = None
    """A model with the same vocabulary, such as the one before pruning: learn its predictions instead of the text."""
    temperature: float = 1.0
    """At which predictions are compared."""
    teacher_weight: float = 1.0
    """Share of the teacher in the loss; the rest is the cross-entropy of the text."""
    hidden_loss: float = 0.0
    """Weight of the distance of hidden states to the teacher's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise JpruneError(f"--temperature must be above 0, got {self.temperature}")
        if not 0 <= self.teacher_weight <= 1 or self.hidden_loss < 0:
            raise JpruneError(
                f"--teacher-weight must be in [0, 1] and --hidden-loss not negative, got {self.teacher_weight} and "
                f"{self.hidden_loss}"
            )
        if self.teacher is None and (self.hidden_loss or self.temperature != 1.0 or self.teacher_weight != 1.0):
            raise JpruneError(
                "--temperature, --teacher-weight and --hidden-loss are about a teacher; give --teacher MODEL"
            )

    def distillation(
        self, checkpoint: Checkpoint, dtype: Any, *, around: stacked.Around | None = None
    ) -> tuple[Callable[..., Sums] | None, PyTree]:
        """The loss of (params, the teacher's params, batch, aside), and the teacher's params; None and nothing without.

        Raises:
          JpruneError: its vocabulary, or a hidden size that matters, is not that of the model.
        """
        from jprune.checkpoints import load

        if self.teacher is None:
            return None, {}
        teacher = load(self.teacher)
        distance = loss.distillation(
            checkpoint.config,
            teacher.config,
            temperature=self.temperature,
            teacher_weight=self.teacher_weight,
            hidden_weight=self.hidden_loss,
            around=around,
        )
        return distance, read_stacked(teacher, stacked.runs(teacher.config, teacher.shapes), dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters(Tuning):
    """What all that train low-rank adapters have in common."""

    rank: int = 8
    """Of the adapters."""
    alpha: float = 16.0
    """The adapters' products count alpha / rank."""
    dropout: float = 0.05
    """Of what the adapters read."""
    base_dtype: BaseDtype | None = None
    """Of the frozen weights while training: float32, bfloat16, or int8 with a scale for each output. By default float32
    on CPU, else bfloat16. The result's weights are not affected."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise JpruneError(f"--rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise JpruneError(f"--dropout must be in [0, 1), got {self.dropout}")

    def frozen(self, checkpoint: Checkpoint, runs: stacked.Runs, in_axes: Mapping[str, tuple[int, ...]]) -> PyTree:
        """The weights in `base_dtype`, equal blocks stacked."""
        axes = in_axes if self.base_dtype == "int8" else {}
        return read_stacked(checkpoint, runs, dtype=compute_dtype(checkpoint, self.base_dtype), quantised=axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Taught, Adapters):
    """Train low-rank adapters beside the frozen weights, and merge them (LLM-Pruner's recovery).

    Defaults are those that its authors recommend: 2 epochs, batch 64, learning rate 1e-4, 100 steps of warm-up.
    """

    targets: str | None = None
    """Kernels that get adapters: names such as q,v, or regular expressions over paths, separated by commas. By default
    all kernels of the blocks (but of experts)."""
    keep_adapters: bool = False
    """Write only the adapters, in PEFT's form, instead of the model with the adapters merged."""

    def task(self, checkpoint: Checkpoint, steps: int) -> Task:
        """Adapters on the kernels of the blocks; base weights in `base_dtype`."""
        in_axes = block_kernels(checkpoint)
        key = jax.random.key(self.seed)
        adapters = lora.init(checkpoint.shapes, in_axes, rank=self.rank, key=key, targets=self._patterns(in_axes))
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
            read=lambda trainable, path: self._merged(checkpoint, trainable, path, in_axes),
            dtype=dtype,
        )

    def adapters(self, trainable: PyTree) -> dict[str, tuple[Any, Any]]:
        """(a, b) by the path of each adapted kernel of the model."""
        return lora.by_path(stacked.unstack(trainable))

    def _patterns(self, paths: Mapping[str, Any]) -> list[str]:
        if self.targets is None:
            return [KERNELS]
        names = {path.split("/")[-2] for path in paths}
        wanted = [target.strip() for target in self.targets.split(",") if target.strip()]
        if not wanted:
            raise JpruneError(f"--targets names no kernel; there are {', '.join(sorted(names))}")
        for target in wanted:
            if target.isidentifier() and target not in names:
                known = ", ".join(sorted(names))
                raise JpruneError(f"--targets: {target!r} matches no kernel of this model; there are {known}")
        return [f"/{target}/kernel$" if target in names else target for target in wanted]

    def _merged(
        self, checkpoint: Checkpoint, trainable: PyTree, path: str, in_axes: Mapping[str, tuple[int, ...]]
    ) -> np.ndarray:
        kernel = checkpoint.read(path)
        merged = merge_adapter(kernel, trainable, path, self.alpha, in_axes)
        return np.where(kernel == 0, np.zeros_like(kernel), merged)  # what is pruned stays pruned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Taught):
    """Train all weights that are left; what is zero stays zero. With --teacher, learn from a model's predictions."""

    learning_rate: float = 2e-5
    """At its highest."""
    batch_size: int = 16
    """Windows an update."""

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

        def read(trainable: PyTree, path: str) -> np.ndarray:
            before = checkpoint.read(path)
            after = np.asarray(leaf(trainable, path)).astype(before.dtype)
            if path.endswith("kernel") and (wrong := np.count_nonzero(after[before == 0])):
                raise JpruneError(f"{path}: {wrong} pruned weights are not zero after training; please report this")
            return after

        return Task(
            trainable=trainable,
            frozen=teacher,
            loss=sums,
            evaluation=lambda trainable, frozen, batch: language_model(compute(trainable), batch),
            optimizer=self.adamw().transformation(steps, *([keep_masked(masks)] if masks else [])),
            read=read,
            dtype=dtype,
        )


TUNINGS: dict[str, type[Lora] | type[Full]] = {"lora": Lora, "full": Full}
"""By the name on the command line."""

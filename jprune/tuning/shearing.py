"""Shearing: a smaller model of chosen sizes, found by masks that are learnt while it is trained.

LLM-Shearing's first phase (Xia et al., arXiv:2310.06694). Each micro-batch is computed by the model under masks that
are drawn for it (`jprune.train.shearing.hard_concrete`); weights and masks follow its loss, and the masks besides the
Lagrangian of the target (`jprune.train.shearing.lagrangian`). At the end the units that are likeliest to stay do, in
exactly the target's numbers, with what is left of their masks multiplied into the weights: a plain smaller model, to
be trained on with `jprune tune full`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jprune import paths, texts
from jprune.checkpoints import Checkpoint
from jprune.errors import JpruneError
from jprune.models import families, stacked
from jprune.models.config import DecoderConfig
from jprune.models.parameters import shapes
from jprune.structured import shape as target_shape
from jprune.structured.shape import Shape
from jprune.train.loop import Batch
from jprune.train.optimizer import AdamW, Schedule
from jprune.train.shearing import lagrangian
from jprune.tuning import masked_training
from jprune.tuning.base import Outcome, Prepared, Task, TrainedMethod
from jprune.tuning.masked_model import MaskedModel, shape_in, shape_of
from jprune.tuning.report import PrunedReport
from jprune.tuning.weights import Sums, compute_dtype, read_stacked

PyTree = Any
FLOOR = 0.1
"""Share of all learning rates that is left at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shearing(TrainedMethod):
    """Learn which layers, heads, channels and hidden dimensions a smaller model keeps (Xia et al. 2023).

    Defaults are those of its authors' script, but for its 3200 steps of 32 windows of 4096 tokens.
    """

    keep_best: ClassVar[bool] = False  # before the target is reached too little has gone

    target: str | None = None
    """Sizes of the result, as layers=24,hidden=2048,heads=16,kv_heads=16,intermediate=5504 (what is not named stays),
    or a config.json that has them."""
    parameters: str | None = None
    """Instead of `target`: at most so many parameters, as 1.3B; all sizes shrink alike, nearly."""
    schedule: Schedule = "cosine"
    """Of all three learning rates after the warm-up: constant, linear or cosine, down to a tenth at the end."""
    warmup: int | None = None
    """Steps of warm-up, of all three learning rates. By default a tenth of all, as 320 of 3200."""
    batch_size: int = 32
    """Windows an update."""
    mask_learning_rate: float = 1.0
    """Learning rate of the masks' log alpha."""
    multiplier_learning_rate: float = 1.0
    """Learning rate of the Lagrangian's multipliers, which ascend."""
    mask_momentum: float = 0.9
    """Adam's momentum, of masks and multipliers. With a few hundred steps 0 keeps them from overshooting."""
    target_warmup: int | None = None
    """Steps over which the target rises from nothing pruned. By default a fifth of all, as 640 of 3200."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.target is None) == (self.parameters is None):
            raise JpruneError(
                "say how small the model is to be: either its sizes (`target` layers=24,hidden=2048, or a config.json) "
                "or a number of parameters (`parameters` 1.3B)"
            )
        if self.target_warmup is not None and self.target_warmup < 1:
            raise JpruneError(f"`target_warmup` must be at least 1, got {self.target_warmup}")
        self._mask_adamw(self.mask_learning_rate)
        self._mask_adamw(self.multiplier_learning_rate)

    def adamw(self) -> AdamW:
        """The optimizer of the weights."""
        return dataclasses.replace(super().adamw(), floor=FLOOR, b2=0.95, most_warmup=None)

    def prepare(self, checkpoint: Checkpoint) -> Prepared:
        """The target is resolved: what a run depends on are sizes, however they were said."""
        masked = MaskedModel(checkpoint, self.shape(checkpoint))
        return Prepared(
            planned=masked.smaller,
            task=lambda steps: self.task(checkpoint, steps, masked),
            recipe={"target": str(masked.target), "parameters": None},
        )

    def shape(self, checkpoint: Checkpoint) -> Shape:
        """The sizes of the result.

        Raises:
          JpruneError: a target that cannot be read, or that no shape satisfies.
        """
        source = shape_of(checkpoint)
        if self.parameters is not None:
            return target_shape.solve(source, target_shape.number(self.parameters), count(checkpoint.config))
        assert self.target is not None
        path = paths.given(self.target)
        path = path / "config.json" if path.is_dir() else path
        if "=" not in self.target or path.is_file():
            return _shape_at(path)
        return target_shape.parse(self.target, source)

    def optimizer(self, targets: Mapping[str, int], steps: int) -> Any:
        """The optimizer of weights, masks and multipliers."""
        return lagrangian.optimizer(
            self.adamw(),
            self._mask_adamw(self.mask_learning_rate),
            self._mask_adamw(self.multiplier_learning_rate),
            targets=targets,
            steps=steps,
            warmup=self.target_rise(steps),
        )

    def _mask_adamw(self, rate: float) -> AdamW:
        return dataclasses.replace(self.adamw(), learning_rate=rate, b1=self.mask_momentum, weight_decay=0.0)

    def target_rise(self, steps: int) -> int:
        """Steps until the target is the whole one."""
        return self.target_warmup or max(1, steps // 5)

    def task(self, checkpoint: Checkpoint, steps: int, masked: MaskedModel) -> Task:
        """Weights, float32 and computed in the usual dtype, with log alpha and multipliers beside them."""
        runs = stacked.runs(checkpoint.config, checkpoint.shapes)
        sums = masked_training.masked_loss(masked, dtype := compute_dtype(checkpoint, None))

        def drawn(trainable: PyTree, frozen: PyTree, batch: Batch, key: Any) -> Sums:
            del frozen  # everything is trained
            return sums(trainable["model"], masked_training.sample(trainable["log_alpha"], key), batch)

        def expected(trainable: PyTree, frozen: PyTree, batch: Batch) -> Sums:
            """Of the model that is expected: in each row as many as the masks want now."""
            del frozen
            return sums(trainable["model"], masked_training.rounded(trainable["log_alpha"]), batch)

        return Task(
            trainable={
                "model": read_stacked(checkpoint, runs, dtype=jnp.float32),
                **masked_training.start(masked),
            },
            frozen={},
            loss=drawn,
            evaluation=expected,
            optimizer=self.optimizer(masked.targets, steps),
            result=functools.partial(_result, masked),
            dtype=dtype,
            watch=masked_training.watch(masked, self.target_rise(steps)),
        )


def count(config: DecoderConfig) -> target_shape.Count:
    """How many parameters a model like `config` would have in another shape."""

    def parameters(shape: Shape) -> int:
        smaller = dataclasses.replace(
            config,
            layers=min(shape.layers, 2),
            d_model=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            d_ff=shape.intermediate,
            windows=(),
            ropes=(),
            dense_layers=(),
        )
        of = {path: math.prod(size) for path, size in shapes(smaller).items()}
        last = sum(n for path, n in of.items() if path.startswith("blocks/0/"))
        return sum(of.values()) + last * (shape.layers - smaller.layers)

    return parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShearingReport(PrunedReport):
    """The result of a shearing run."""

    target: Shape
    expected: dict[str, float]
    """The shape that the masks expected after the last step."""

    def own_json(self) -> dict[str, Any]:
        """The fields of ``--json`` that only this kind of run has."""
        return {**super().own_json(), "target": dataclasses.asdict(self.target), "expected": self.expected}

    def lines(self, change: str) -> tuple[str, ...]:
        """What the command says of the result, a line each; `change` is that of the parameters, in words."""
        return (f"expected sizes {self.expected}; of the result {self.target}", f"parameters: {change}")


def _result(masked: MaskedModel, trainable: PyTree) -> Outcome:
    """The model that the masks leave, in exactly the target's sizes."""
    log_alpha = trainable["log_alpha"]
    masks = masked_training.final_masks(masked, log_alpha)
    expected = masked_training.expected_shape(masked, log_alpha)
    smaller, leaves = masked_training.result(masked, trainable)
    return Outcome(
        model=smaller,
        leaves=leaves,
        trainable_parameters=sum(x.size for x in jax.tree.leaves(trainable["model"])),
        report=functools.partial(
            ShearingReport,
            parameters_after=smaller.parameters,
            target=masked.target,
            expected=expected,
            sizes=smaller.sizes,
        ),
        details={"kept": {kind: np.flatnonzero(mask).tolist() for kind, mask in masks.items() if mask.ndim < 2}},
        notices=_missed(expected, masked.target),
    )


def _missed(expected: Mapping[str, float], target: Shape) -> tuple[str, ...]:
    """A notice if the masks were not done: what they still expected is cut off all at once."""
    missed = [
        f"{name} {expected[name]:g} instead of {size}"
        for name, size in dataclasses.asdict(target).items()
        if abs(expected[name] - size) > 0.01 * size
    ]
    if not missed:
        return ()
    return (
        f"after the last step the masks expected {', '.join(missed)}, and the rest went at once: more `steps`, or for "
        "short runs `mask_momentum` 0 `mask_learning_rate` 0.3, serve the model better",
    )


def _shape_at(path: Path) -> Shape:
    """The shape that a config.json describes."""
    try:
        config = families.config(texts.json_of(path.read_bytes(), path.name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JpruneError(
            f"`target` is a config.json or sizes such as layers=24,hidden=2048; {path} cannot be read as the first: "
            f"{error}"
        ) from error
    return shape_in(config)


__all__ = ["Shearing", "ShearingReport", "count"]

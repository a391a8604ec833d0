"""One shearing run: a checkpoint in, the smaller model that masks have found while it was trained, and its record out.

LLM-Shearing's first phase (Xia et al., arXiv:2310.06694). Each micro-batch is computed by the model under masks that
are drawn for it (`jprune.train.shearing.hard_concrete`); weights and masks follow its loss, and the masks besides the
Lagrangian of the target (`jprune.train.shearing.lagrangian`). At the end the units that are likeliest to stay do, in
exactly the target's numbers, with what is left of their masks multiplied into the weights: a plain smaller model, to
be trained on with `jprune tune full`.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.checkpoints import Checkpoint, formats, load
from jprune.checkpoints.formats import Format
from jprune.data import windows
from jprune.errors import JpruneError
from jprune.models import families, stacked
from jprune.models.config import DecoderConfig, shapes
from jprune.pipeline.shrink.run import ShrinkPlan
from jprune.pipeline.training.run import Result, TuneReport, model_writer, train_and_write
from jprune.pipeline.training.session import Training
from jprune.runs import output
from jprune.runs.report import Progress
from jprune.runs.stopwatch import Stopwatch
from jprune.structured import shape as target_shape
from jprune.structured.shape import Shape
from jprune.train.loop import Batch, Trained
from jprune.train.optimizer import AdamW, Schedule
from jprune.train.shearing import lagrangian
from jprune.tuning import masked_training
from jprune.tuning.masked_model import MaskedModel, shape_of
from jprune.tuning.recovery import Task, Tuning
from jprune.tuning.weights import Sums, compute_dtype, read_stacked

PyTree = Any
NAME = "shearing"
FLOOR = 0.1
"""Of all learning rates, at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shearing(Tuning):
    """Learn which layers, heads, channels and hidden dimensions a smaller model keeps (Xia et al. 2023).

    Defaults are those of its authors' script, but for its 3200 steps of 32 windows of 4096 tokens.
    """

    target: str | None = None
    """Sizes of the result, as layers=24,hidden=2048,heads=16,kv_heads=16,intermediate=5504 (what is not named stays),
    or a config.json that has them."""
    parameters: str | None = None
    """Instead of --target: at most so many parameters, as 1.3B; all sizes shrink alike, nearly."""
    schedule: Schedule = "cosine"
    """After the warm-up: constant, linear or cosine, down to a tenth at the end; of all three learning rates."""
    batch_size: int = 32
    """Windows an update."""
    mask_learning_rate: float = 1.0
    """Of the masks' log alpha."""
    multiplier_learning_rate: float = 1.0
    """Of the Lagrangian's multipliers, which ascend."""
    mask_momentum: float = 0.9
    """Adam's, of masks and multipliers. With a few hundred steps 0 keeps them from overshooting."""
    target_warmup: int | None = None
    """Steps over which the target rises from nothing pruned. By default a fifth of all, as 640 of 3200."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.target is None) == (self.parameters is None):
            raise JpruneError(
                "say how small the model is to be: either its sizes (--target layers=24,hidden=2048, or a config.json) "
                "or a number of parameters (--parameters 1.3B)"
            )
        if self.target_warmup is not None and self.target_warmup < 1:
            raise JpruneError(f"--target-warmup must be at least 1, got {self.target_warmup}")
        self._mask_adamw(self.mask_learning_rate)
        self._mask_adamw(self.multiplier_learning_rate)

    def adamw(self) -> AdamW:
        """Of the weights."""
        return dataclasses.replace(super().adamw(), floor=FLOOR, b2=0.95)

    def shape(self, checkpoint: Checkpoint) -> Shape:
        """The sizes of the result.

        Raises:
          JpruneError: a target that cannot be read, or that no shape satisfies.
        """
        source = shape_of(checkpoint)
        if self.parameters is not None:
            return target_shape.solve(source, target_shape.number(self.parameters), count(checkpoint.config))
        assert self.target is not None
        path = Path(self.target).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if "=" not in self.target or path.is_file():
            return _shape_in(path)
        return target_shape.parse(self.target, source)

    def optimizer(self, targets: Mapping[str, int], steps: int) -> Any:
        """Of weights, masks and multipliers."""
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

        def read(trainable: PyTree, path: str) -> np.ndarray:
            return next(values for name, values in masked_training.result(masked, trainable)[1] if name == path)

        return Task(
            trainable={
                "model": read_stacked(checkpoint, runs, dtype=jnp.float32),
                **masked_training.start(masked),
            },
            frozen={},
            loss=drawn,
            evaluation=expected,
            optimizer=self.optimizer(masked.targets, steps),
            read=read,
            dtype=dtype,
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
class ShearingReport(TuneReport):
    """The result of a shearing run; `parameters` are those before."""

    parameters_after: int
    target: Shape
    expected: dict[str, float]
    """The shape that the masks expected after the last step."""
    sizes: tuple[dict[str, int], ...]
    """Of every layer of the result."""

    def json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {
            **super().json(),
            "parameters": {"before": self.parameters, "after": self.parameters_after},
            "target": dataclasses.asdict(self.target),
            "expected": self.expected,
            "sizes": list(self.sizes),
        }


def shear_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    method: Shearing,
    data: windows.Spec | Mapping[str, windows.Spec],
    evaluate: windows.Spec | Mapping[str, windows.Spec] | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    format: Format | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> ShearingReport:
    """Prunes a model to a target shape while it is trained, and writes the result.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      out: folder of the result; it appears when everything is done.
      method: `Shearing(target="layers=24,hidden=2048", steps=3200)`.
      data: source of the training data, or of domains by name, as for `tune_model`.
      evaluate: source of a text whose perplexity is measured before and after, or sources by domain.
      evaluate_every: steps between two evaluations, for the metrics and for dynamic loading: the result is the last
        state.
      checkpoint_every: steps between two checkpoints in ``OUT.run``; by default a tenth of all.
      format: see `jprune.checkpoints.formats`; by default "hf".
      resume: go on with the run in ``OUT.run``, if there is one.
      overwrite: replace an `out`, and forget an ``OUT.run``, that an earlier run left.
      progress: called often.
      options: of the data and the devices, as for `tune_model`: sequence_length, windows_at_most, train_on_prompt,
        evaluate_length, evaluate_windows, fsdp, proportions, dynamic_loading.

    Raises:
      JpruneError: anything that does not fit, or multipliers that run away; `out` is then untouched.
      jprune.train.loop.Interrupted: Ctrl-C; the state is kept in ``OUT.run``.
    """
    stopwatch = Stopwatch()
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    out = Path(out).expanduser()
    output.check(out, overwrite=overwrite, source=checkpoint.source)
    masked = MaskedModel(checkpoint, method.shape(checkpoint))
    chosen: Format = format or "hf"
    formats.check(masked.smaller, chosen)
    training = Training(checkpoint, method, stopwatch, progress, epochs=1, data=data, evaluate=evaluate, **options)
    with stopwatch.phase("load"):
        task = method.task(checkpoint, training.steps, masked)

    def sheared(trained: Trained) -> Result:
        log_alpha = trained.trainable["log_alpha"]
        masks, expected = (
            masked_training.final_masks(masked, log_alpha),
            masked_training.expected_shape(masked, log_alpha),
        )
        smaller, leaves = masked_training.result(masked, trained.trainable)
        return Result(
            write=model_writer(smaller, leaves, chosen),
            trainable_parameters=sum(x.size for x in jax.tree.leaves(trained.trainable["model"])),
            own={
                "parameters_after": smaller.parameters,
                "target": masked.target,
                "expected": expected,
                "sizes": smaller.sizes,
            },
            details={
                "kept": {kind: np.flatnonzero(mask).tolist() for kind, mask in masks.items() if mask.ndim < 2},
                "format": chosen,
            },
            notices=_missed(expected, masked.target),
        )

    return train_and_write(
        training,
        task,
        out,
        recipe={"method": NAME, **dataclasses.asdict(method), "target": str(masked.target), "parameters": None},
        result=sheared,
        report=ShearingReport,
        keep_best=False,  # before the target is reached too little has gone
        watch=masked_training.watch(masked, method.target_rise(training.steps)),
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        resume=resume,
        overwrite=overwrite,
    )


def plan_shearing(model: Checkpoint | str | Path, *, method: Shearing) -> ShrinkPlan:
    """The sizes of the result, without a weight or a text; a folder with a config.json is enough.

    Raises:
      JpruneError: as `shear_model`, for what can be known from shapes.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load(model, weights=False)
    smaller = MaskedModel(checkpoint, method.shape(checkpoint)).smaller
    return ShrinkPlan(parameters=(checkpoint.parameters, smaller.parameters), sizes=smaller.sizes, units=())


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
        f"after the last step the masks expected {', '.join(missed)}, and the rest went at once: more --steps, or for "
        "short runs --mask-momentum 0 --mask-learning-rate 0.3, serve the model better",
    )


def _shape_in(path: Path) -> Shape:
    """The shape that a config.json describes."""
    try:
        config = families.config(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JpruneError(
            f"--target is a config.json or sizes such as layers=24,hidden=2048; {path} cannot be read as the first: "
            f"{error}"
        ) from error
    return Shape(
        layers=config.layers,
        hidden=config.d_model,
        heads=config.heads,
        kv_heads=config.kv_heads,
        intermediate=config.d_ff,
    )

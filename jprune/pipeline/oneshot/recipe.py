"""What to do to a model: the options of a run that its result depends on, and what follows from them for a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jprune.anatomy.kernels import Kernel, choose_kernels
from jprune.checkpoints import Checkpoint
from jprune.data import windows
from jprune.errors import JpruneError
from jprune.methods import METHODS, Method
from jprune.patterns import NM, Pattern

DEMO_SAMPLES, DEMO_LENGTH = 64, 512
"""Calibration windows of the demo model: minutes on two cores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do to a model; with the model and the method, all that the result depends on."""

    pattern: Pattern
    """What the zeros must look like."""
    calibration: windows.Spec = "pydoc"
    """Source of the calibration text, see `jprune.data.sources`; or token windows [n, length]."""
    samples: int | None = None
    """Calibration windows; 128 unless given (64 for the demo model)."""
    sequence_length: int | None = None
    """Tokens a window; 2048 unless given, at most the model's context (512 for the demo model)."""
    seed: int = 0
    """Of the choice of windows."""
    where: tuple[str, ...] = ()
    """Regular expressions over kernel paths; by default all kernels of the decoder blocks."""
    skip: tuple[str, ...] = ()
    """Regular expressions; what they find is left alone."""
    overrides: Mapping[str, Pattern] = dataclasses.field(default_factory=dict)
    """Other patterns for the kernels that a regular expression finds."""
    dtype: str | None = None
    """Of the activations: float32 on CPU, elsewhere what the weights have."""
    expert_tokens: int = 128
    """An expert that sees fewer calibration tokens than this is pruned by magnitude, whatever the method."""
    keep_zeros: bool = False
    """Weights that are zero already stay zero, and count among those that the pattern asks for."""

    def __post_init__(self):
        if self.expert_tokens < 0:
            raise JpruneError(f"expert_tokens must not be negative, got {self.expert_tokens}")


def chosen_kernels(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Kernel, ...]:
    """The kernels that a recipe prunes."""
    return choose_kernels(checkpoint, recipe.pattern, where=recipe.where, skip=recipe.skip, overrides=recipe.overrides)


def window_shape(checkpoint: Checkpoint, recipe: Recipe) -> tuple[int, int]:
    """Calibration windows and tokens in each, with the defaults filled in."""
    if windows.is_rows(recipe.calibration):
        tokens = calibration_windows(checkpoint, recipe).tokens
        return len(tokens), tokens.shape[1]
    samples, length = recipe.samples, recipe.sequence_length
    if checkpoint.source == "demo":
        samples, length = samples or DEMO_SAMPLES, length or DEMO_LENGTH
    return (
        windows.DEFAULT_SAMPLES if samples is None else samples,
        min(windows.DEFAULT_LENGTH, checkpoint.config.context) if length is None else length,
    )


def calibration_windows(checkpoint: Checkpoint, recipe: Recipe) -> windows.Windows:
    """The calibration tokens of a recipe."""
    demo = checkpoint.source == "demo" and not windows.is_rows(recipe.calibration)
    return windows.calibration(
        recipe.calibration,
        checkpoint.tokenizer,
        samples=recipe.samples if recipe.samples is not None or not demo else DEMO_SAMPLES,
        length=recipe.sequence_length if recipe.sequence_length is not None or not demo else DEMO_LENGTH,
        seed=recipe.seed,
        vocab_size=checkpoint.config.vocab,
        context=checkpoint.config.context,
    )


def evaluation_windows(
    checkpoint: Checkpoint, source: windows.Spec, *, length: int | None = None, count: int | None = None
) -> windows.Windows:
    """The evaluation tokens of a source."""
    return windows.evaluation(
        source,
        checkpoint.tokenizer,
        length=length,
        windows=count,
        vocab_size=checkpoint.config.vocab,
        context=checkpoint.config.context,
    )


def activation_dtype(checkpoint: Checkpoint, name: str | None) -> DTypeLike:
    """The dtype activations have: as named, or float32 on CPU and the weights' own elsewhere.

    CPUs multiply in float32 many times faster than in bfloat16.
    """
    if name is not None:
        return parse_dtype(name)
    if jax.default_backend() == "cpu":
        return jnp.dtype(jnp.float32)
    return checkpoint.shapes["embed/embedding"].dtype


def parse_dtype(name: str) -> Any:
    """A float dtype by its name."""
    if name not in ("float32", "bfloat16", "float16"):
        raise JpruneError(f"dtype must be float32, bfloat16 or float16; got {name!r}")
    return jnp.dtype(name)


def method_name(method: Method) -> str:
    """The name a method has on the command line, or its class's."""
    return next((name for name, kind in METHODS.items() if kind is type(method)), type(method).__name__)


def pattern_text(pattern: Pattern) -> str | dict[str, Any]:
    """A pattern as a recipe file has it."""
    return str(pattern) if isinstance(pattern, NM) else dataclasses.asdict(pattern)

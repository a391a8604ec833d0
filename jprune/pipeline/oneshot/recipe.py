"""What to do to a model: the options of a run that its result depends on, and what follows from them for a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jprune.anatomy.kernels import Kernel, choose_kernels
from jprune.checkpoints import Checkpoint
from jprune.data import for_model, windows
from jprune.errors import JpruneError
from jprune.methods import METHODS, Method
from jprune.patterns import NM, Pattern


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
    return for_model.calibration_shape(
        checkpoint, recipe.calibration, samples=recipe.samples, length=recipe.sequence_length
    )


def calibration_windows(checkpoint: Checkpoint, recipe: Recipe) -> windows.Windows:
    """The calibration tokens of a recipe."""
    return for_model.calibration_windows(
        checkpoint, recipe.calibration, samples=recipe.samples, length=recipe.sequence_length, seed=recipe.seed
    )


def method_name(method: Method) -> str:
    """The name a method has on the command line, or its class's."""
    return next((name for name, kind in METHODS.items() if kind is type(method)), type(method).__name__)


def pattern_text(pattern: Pattern) -> str | dict[str, Any]:
    """A pattern as a recipe file has it."""
    return str(pattern) if isinstance(pattern, NM) else dataclasses.asdict(pattern)

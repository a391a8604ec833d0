"""What to do to a model: the options of a run that its result depends on, and what follows from them for a model."""

import dataclasses
import functools
from typing import Any

from jprune.allocations import Allocation
from jprune.anatomy.kernels import Kernel, choose_kernels
from jprune.checkpoints import Checkpoint
from jprune.data import for_model, windows
from jprune.errors import JpruneError
from jprune.patterns import Pattern
from jprune.pipeline.options import Calibration, Choice
from jprune.pipeline.registry import ALLOCATIONS, name_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Choice, Calibration):
    """What to do to a model; with the model and the method, all that the result depends on."""

    pattern: Pattern
    """What the zeros must look like."""
    dtype: str | None = None
    """Dtype of the activations while pruning: float32, bfloat16 or float16. By default float32 on CPU and
    for float16 weights, else what the weights have."""
    expert_tokens: int = 128
    """An expert that sees fewer calibration tokens than this, or none, is pruned by magnitude, whatever the method."""
    keep_zeros: bool = False
    """Prune a model further that is pruned already: what is zero stays zero, and counts among the zeros asked for."""
    allocate: str | Allocation = "uniform"
    """How zeros are shared out over the blocks, their number staying the same: uniform, linear (more with every
    block), owl or dlp (fewer where outliers are many, or the median score low; a pass over the dense model finds out),
    or loss (more where pruning the block alone costs the model less, which the pass tries out). NAME=BAND says how far
    a block's sparsity may be from the model's, as owl=0.1."""
    reconstruct: int = 0
    """Passes over the calibration windows in which the kept weights of every block are trained towards what the block
    gave before, once it is pruned. Takes several times as long as pruning; with `dense_targets` it gave nothing
    more."""

    def __post_init__(self):
        if not self.allocation.uniform and self.keep_zeros:
            raise JpruneError(
                "`keep_zeros` goes with the uniform allocation only: zeros that are there may be more than what "
                f"{self.allocation} leaves to a block, and then the model would have too many"
            )
        if self.expert_tokens < 0:
            raise JpruneError(f"expert_tokens must not be negative, got {self.expert_tokens}")
        if self.reconstruct < 0:
            raise JpruneError(f"reconstruct must be a number of passes, 0 or more; got {self.reconstruct}")

    @functools.cached_property
    def allocation(self) -> Allocation:
        """What `allocate` stands for."""
        return allocation(self.allocate)

    @property
    def least_tokens(self) -> int:
        """Tokens that an expert must see not to be pruned by magnitude: of one that sees none nothing is known."""
        return max(1, self.expert_tokens)

    def json(self) -> dict[str, Any]:
        """The recipe as the record of a result has it, without where the calibration text comes from."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["calibration"]
        if fields["calibration_proportions"] is None:
            del fields["calibration_proportions"]
        overrides = {regex: pattern.json() for regex, pattern in self.overrides.items()}
        own = self.allocate if isinstance(self.allocate, str) else allocation_json(self.allocation)
        return fields | {"pattern": self.pattern.json(), "overrides": overrides, "allocate": own}


def allocation(given: Any) -> Allocation:
    """An allocation, of its name with or without a band, or of what a record has.

    Raises:
      JpruneError: there is no such allocation, or it refuses what it is given.
    """
    if isinstance(given, Allocation):
        return given
    fields = {"allocation": given} if isinstance(given, str) else dict(given)
    name, equals, band = str(fields.pop("allocation", "")).partition("=")
    if name not in ALLOCATIONS:
        raise JpruneError(f"allocate is one of {', '.join(ALLOCATIONS)}, or NAME=BAND, as owl=0.1; got {given!r}")
    if equals:
        try:
            fields["band"] = float(band)
        except ValueError:
            raise JpruneError(f"the band of an allocation is a number, as {name}=0.1; got {given!r}") from None
    try:
        return ALLOCATIONS[name](**fields)
    except TypeError:
        raise JpruneError(f"the allocation {name} has no such options: {given!r}") from None


def allocation_json(allocation: Allocation) -> dict[str, Any]:
    """An allocation as records have it."""
    return {"allocation": name_of(allocation), **dataclasses.asdict(allocation)}


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
        checkpoint,
        recipe.calibration,
        samples=recipe.samples,
        length=recipe.sequence_length,
        seed=recipe.seed,
        proportions=recipe.calibration_proportions,
    )

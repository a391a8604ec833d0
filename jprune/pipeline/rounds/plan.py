"""What Prune-and-Tune will do and take, known before the first round."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jprune.checkpoints import Checkpoint, load
from jprune.checkpoints.dtypes import activation_dtype
from jprune.data import windows
from jprune.errors import JpruneError
from jprune.methods import Method, SparseGPT
from jprune.patterns import Scope, Unstructured
from jprune.pipeline.forecast import speed
from jprune.pipeline.forecast.forecast import Plan
from jprune.pipeline.oneshot.run import plan_run
from jprune.pipeline.options import Machine, fields_of, sorted_into
from jprune.pipeline.recipe import Recipe, chosen_kernels
from jprune.pipeline.rounds.schedule import schedule, tuning_of_a_round, zeros_present
from jprune.tuning.base import Taught


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneAndTunePlan:
    """What a run will do."""

    sparsities: tuple[float, ...]
    """The sparsity of every round."""
    zeros: tuple[int, ...]
    """Zeros in the pruned kernels after each round."""
    pruning: Plan
    """The plan of pruning in one round: each takes as much."""
    tuning_steps: int
    """Steps of training in one round."""
    tuning_tokens: int
    """Tokens of training in one round."""
    tuning_flops: float
    """Operations of matmuls of training in one round."""
    tuning_seconds: float
    """Seconds of training in one round."""
    disk_bytes: int
    """Bytes that the run folder takes at most."""

    @property
    def seconds(self) -> float:
        """Seconds of all rounds, without compiling and evaluating."""
        pruned = sum(sparsity > 0 for sparsity in self.sparsities)
        return pruned * self.pruning.seconds + len(self.sparsities) * self.tuning_seconds


def plan_prune_and_tune(
    model: Checkpoint | str | Path,
    *,
    sparsity: float,
    rounds: Sequence[float] | None = None,
    method: Method | None = None,
    per: Scope | None = None,
    tuning: Taught | None = None,
    tune_length: int | None = None,
    out: str | Path = ".",
    **options: Any,
) -> PruneAndTunePlan:
    """What `prune_and_tune` would do; arguments are the same.

    Of the options it takes those of `Recipe` and `Machine`. Reads the weights once, to count zeros,
    and measures this machine for a few seconds; writes nothing. The time of training follows from its matmuls: forwards
    twice, because activations are computed again, and backwards.

    Raises:
      JpruneError: as `prune_and_tune`, for what can be known without the data.
    """
    recipe, machine = sorted_into(
        dict(pattern=Unstructured(sparsity, per), keep_zeros=True, **options), Recipe, Machine
    )
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    method = SparseGPT() if method is None else method
    tuning = tuning_of_a_round(checkpoint, tuning)
    if tuning.steps is None:
        raise JpruneError("a plan needs the steps of a round, which `epochs` does not say before the data is read")
    present = zeros_present(checkpoint, recipe)
    sparsities = schedule(sparsity, rounds, present=present)
    usual = checkpoint.suggested.training_length or min(windows.DEFAULT_LENGTH, checkpoint.config.context)
    tokens = tuning.steps * tuning.batch_size * (tune_length or usual)
    flops = 2.0 * (4 if tuning.trains_weights else 3) * tokens * checkpoint.parameters  # frozen: no gradients
    config, dtype = checkpoint.config, activation_dtype(checkpoint, recipe.dtype)
    rate = speed.measure(method, d_model=config.d_model, d_ff=config.d_ff, dtype=dtype).forward
    pruning = plan_run(checkpoint, method=method, out=out, **fields_of(recipe, machine))
    # Two checkpoints of float32 weights and both moments; adapters are next to nothing.
    state = 2 * 12 * checkpoint.parameters if tuning.trains_weights else 0
    return PruneAndTunePlan(
        sparsities=sparsities,
        zeros=_zeros(checkpoint, recipe, sparsities, present),
        pruning=pruning,
        tuning_steps=tuning.steps,
        tuning_tokens=tokens,
        tuning_flops=flops,
        tuning_seconds=flops / rate,
        disk_bytes=(len(sparsities) + 1) * checkpoint.nbytes + state + pruning.disk_bytes,
    )


def _zeros(checkpoint: Checkpoint, recipe: Recipe, sparsities: Sequence[float], present: float) -> tuple[int, ...]:
    """Zeros in the pruned kernels after each round: those asked for, and at least those that are there."""
    assert isinstance(recipe.pattern, Unstructured)
    patterns = (dataclasses.replace(recipe.pattern, sparsity=s) for s in sparsities)
    by_round = [chosen_kernels(checkpoint, dataclasses.replace(recipe, pattern=pattern)) for pattern in patterns]
    there = round(present * sum(kernel.size for kernel in by_round[0]))
    return tuple(max(sum(kernel.zeros for kernel in kernels), there) for kernels in by_round)

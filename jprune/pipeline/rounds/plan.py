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
from jprune.pipeline.recipe import Recipe, chosen_kernels
from jprune.pipeline.rounds.schedule import schedule, tuning_of_a_round, zeros_present
from jprune.tuning import Full, Lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneAndTunePlan:
    """What a run will do."""

    sparsities: tuple[float, ...]
    """Of the rounds."""
    zeros: tuple[int, ...]
    """In the pruned kernels after each round."""
    pruning: Plan
    """Of one round: each takes as much."""
    tuning_steps: int
    """Of one round, as what follows."""
    tuning_tokens: int
    tuning_flops: float
    """Of matmuls."""
    tuning_seconds: float
    disk_bytes: int
    """That the run folder takes at most."""

    @property
    def seconds(self) -> float:
        """Of all rounds, without compiling and evaluating."""
        pruned = sum(sparsity > 0 for sparsity in self.sparsities)
        return pruned * self.pruning.seconds + len(self.sparsities) * self.tuning_seconds


def plan_prune_and_tune(
    model: Checkpoint | str | Path,
    *,
    sparsity: float,
    rounds: Sequence[float] | None = None,
    method: Method | None = None,
    per: Scope | None = None,
    tuning: Full | Lora | None = None,
    tune_length: int | None = None,
    out: str | Path = ".",
    memory: int | None = None,
    **options: Any,
) -> PruneAndTunePlan:
    """What `prune_and_tune` would do; arguments are the same.

    Reads the weights once, to count zeros, and measures this machine for a few seconds; writes nothing. The time of
    training follows from its matmuls: forwards twice, because activations are computed again, and backwards.

    Raises:
      JpruneError: as `prune_and_tune`, for what can be known without the data.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    method = SparseGPT() if method is None else method
    tuning = tuning_of_a_round(checkpoint, tuning)
    if tuning.steps is None:
        raise JpruneError("a plan needs the steps of a round, which `epochs` does not say before the data is read")
    options |= {"pattern": Unstructured(sparsity, per), "keep_zeros": True}
    recipe = Recipe(**options)
    present = zeros_present(checkpoint, recipe)
    sparsities = schedule(sparsity, rounds, present=present)
    length = tune_length or (
        checkpoint.suggested.training_length or min(windows.DEFAULT_LENGTH, checkpoint.config.context)
    )
    tokens = tuning.steps * tuning.batch_size * length
    passes = 3 if isinstance(tuning, Lora) else 4  # frozen weights have no gradients
    flops = 2.0 * passes * tokens * checkpoint.parameters
    config, dtype = checkpoint.config, activation_dtype(checkpoint, recipe.dtype)
    rate = speed.measure(method, d_model=config.d_model, d_ff=config.d_ff, dtype=dtype).forward
    pruning = plan_run(checkpoint, method=method, out=out, memory=memory, **options)
    recipes = (dataclasses.replace(recipe, pattern=Unstructured(s, per)) for s in sparsities)
    by_round = [chosen_kernels(checkpoint, each) for each in recipes]
    there = round(present * sum(k.size for k in by_round[0]))
    # Two checkpoints of float32 weights and both moments; adapters are next to nothing.
    state = 0 if isinstance(tuning, Lora) else 2 * 12 * checkpoint.parameters
    return PruneAndTunePlan(
        sparsities=sparsities,
        zeros=tuple(max(sum(k.zeros for k in kernels), there) for kernels in by_round),
        pruning=pruning,
        tuning_steps=tuning.steps,
        tuning_tokens=tokens,
        tuning_flops=flops,
        tuning_seconds=flops / rate,
        disk_bytes=(len(sparsities) + 1) * checkpoint.nbytes + state + pruning.disk_bytes,
    )

"""What a one-shot run is to do, as one object: everything is known and checked, and nothing is done yet."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jprune import devices, trees
from jprune.anatomy.kernels import Kernel, prunable
from jprune.anatomy.parts import Part, parts
from jprune.anatomy.sharing import achieved, share_out, sharing
from jprune.checkpoints import Checkpoint
from jprune.checkpoints.dtypes import activation_dtype
from jprune.checkpoints.formats import Format
from jprune.cross_gram import streams
from jprune.data.held_out import beside
from jprune.data.windows import Windows
from jprune.errors import JpruneError
from jprune.methods import Method
from jprune.pipeline.auto import Auto, Chosen, decided
from jprune.pipeline.options import Evaluation
from jprune.pipeline.recipe import Recipe, allocation_json, calibration_windows, chosen_kernels, window_shape
from jprune.pipeline.registry import name_of
from jprune.runs.report import environment

SCORED = 32
"""Calibration windows on which blocks are scored for an allocation: the first of them."""
TRIED = (2, 512)
"""Of these, and of the tokens of each: the first, on which pruning each block alone is tried out."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A model, what is to be done to it, and the devices that do it."""

    checkpoint: Checkpoint
    method: Method
    recipe: Recipe
    kernels: tuple[Kernel, ...]
    """The kernels to prune, each with its pattern."""
    dtype: DTypeLike = jnp.float32
    """Dtype of the activations; statistics and solvers are float32 in any case."""
    mesh: Mesh = dataclasses.field(default_factory=devices.one_device)
    format: Format = "hf"
    """Format of the result."""
    cut: Mapping[str, Mapping[int, np.ndarray]] = dataclasses.field(default_factory=dict)
    """The positions that stay in the result, by path and axis, of parameters that become smaller."""
    calibration: Windows | None = None
    """Calibration windows; None if the method needs none, or before the text is read."""
    scored: Windows | None = None
    """Windows on which blocks are scored; None if the allocation needs none, or before the text is read."""
    evaluation: Windows | None = None
    """Windows that the model is measured on before and after, if it is."""
    chosen: Chosen | None = None
    """What `Auto` chose, if it was asked."""

    @classmethod
    def planned(
        cls, checkpoint: Checkpoint, method: Method | Auto, recipe: Recipe, mesh: Mesh | None, format: Format = "hf"
    ) -> "Job":
        """The job as far as it is known from shapes, before a text is read.

        Raises:
          JpruneError: filters that find nothing, a pattern that does not fit a kernel, an unknown dtype; an allocation
            of a pattern that all blocks must have.
        """
        method, recipe, chosen = decided(method, recipe)
        if recipe.reconstruct and method.statistic is None:
            raise JpruneError(
                f"reconstruct={recipe.reconstruct} trains on calibration windows, and {type(method).__name__} takes "
                "none; give refit=10 too, or a method that calibrates, or reconstruct=0"
            )
        job = cls(
            checkpoint=checkpoint,
            method=method,
            recipe=recipe,
            dtype=activation_dtype(checkpoint, recipe.dtype),
            kernels=chosen_kernels(checkpoint, recipe),
            mesh=mesh or devices.make_mesh(),
            format=format,
            chosen=chosen,
        )
        assert job.shared is not None  # what does not fit is said now
        return job

    def with_text(self, measured: Evaluation) -> "Job":
        """The same job with its calibration and evaluation windows.

        Raises:
          JpruneError: a text that cannot be read, or too little of it.
        """
        job = self.with_calibration()
        calibration = job.calibration
        if measured.evaluate is None:
            return job
        length = calibration.tokens.shape[1] if calibration else window_shape(self.checkpoint, self.recipe)[1]
        evaluation = measured.text(self.checkpoint, length=length)
        return dataclasses.replace(job, evaluation=evaluation and beside(evaluation, calibration, job.scored))

    def with_calibration(self) -> "Job":
        """The same job with the windows that its method and its allocation need; errors are those of `with_text`."""
        windows = calibration_windows(self.checkpoint, self.recipe) if self.method.statistic else None
        scored = None
        if (scoring := self.scoring) is not None:
            scored = (windows or calibration_windows(self.checkpoint, scoring.recipe)).first(SCORED)
        return dataclasses.replace(self, calibration=windows, scored=scored)

    @functools.cached_property
    def scoring(self) -> "Job | None":
        """The pass over the dense model that scores its blocks, as a job that prunes nothing; None if there is none."""
        by = self.recipe.allocation.by
        if by is None or not self.shared:
            return None
        n, length = window_shape(self.checkpoint, self.recipe)
        return dataclasses.replace(
            self,
            method=by,
            recipe=dataclasses.replace(self.recipe, samples=min(n, SCORED), sequence_length=length, reconstruct=0),
            kernels=tuple(kernel for block in self.shared.values() for kernel in block),
            calibration=self.scored,
            evaluation=None,
        )

    @functools.cached_property
    def shared(self) -> dict[str, list[Kernel]]:
        """The kernels whose sparsities are shared out, by block; none if the allocation is uniform."""
        if self.recipe.allocation.uniform:
            return {}
        paths = [kernel.path for kernel in self.kernels]
        fixed = {path for regex in self.recipe.overrides for path in trees.found(regex, paths)}
        return sharing(self.kernels, fixed, self.method.per)

    def allocated(self, scores: Sequence[float] | None) -> "Job":
        """The same job with the patterns that its allocation gives, with as many zeros.

        Args:
          scores: of the blocks of `shared`, if the allocation asks for any.
        """
        if not (shared := self.shared):
            return self
        sizes = np.array([sum(kernel.size for kernel in block) for block in shared.values()], np.float64)
        zeros = sum(kernel.zeros for block in shared.values() for kernel in block)
        known = np.zeros(len(sizes)) if scores is None else np.array(scores, np.float64)
        sparsities = self.recipe.allocation.sparsities(known, sizes, zeros / sizes.sum())
        by_block = dict(zip(shared, sparsities.tolist(), strict=True))
        return dataclasses.replace(self, kernels=share_out(self.kernels, shared, by_block, self.method.per))

    def blocks_json(self, allocated: "Job") -> dict[str, Any] | None:
        """What the record says of the allocation: the sparsity of every block; None if it is uniform."""
        if not self.shared:
            return None
        own = allocation_json(self.recipe.allocation)
        return {**own, "sparsities": achieved(self.shared, allocated.kernels, self.method.per)}

    @functools.cached_property
    def shape(self) -> tuple[int, int] | None:
        """Calibration windows and tokens in each; None if the method needs none."""
        if self.calibration is not None:
            n, length = self.calibration.tokens.shape
            return n, length
        return window_shape(self.checkpoint, self.recipe) if self.method.statistic else None

    @property
    def streams(self) -> int:
        """Models that calibration goes through: the pruned one, and the dense one too if the method needs both."""
        return streams(self.method.statistic)

    @functools.cached_property
    def parts(self) -> list[Part]:
        """The parts of the model up to the last in which a kernel is pruned."""
        found = parts(self.checkpoint)
        return found[: max(i for i, part in enumerate(found) if self.kernels_of(part)) + 1]

    def kernels_of(self, part: Part) -> list[Kernel]:
        """The kernels to prune in a part."""
        return self._by_part.get(part.name, [])

    @functools.cached_property
    def _by_part(self) -> dict[str, list[Kernel]]:
        found: dict[str, list[Kernel]] = {}
        for kernel in self.kernels:
            found.setdefault(kernel.unit, []).append(kernel)
        return found

    @functools.cached_property
    def counted(self) -> list[str]:
        """Paths of the prunable parameters, whose zeros are counted."""
        return prunable(self.checkpoint, self.kernels)

    def sparsity(self, zeros: int) -> trees.Sparsity:
        """The sparsity of the model with `zeros` zeros in its prunable parameters."""
        return trees.Sparsity(zeros, self.checkpoint.count(self.counted), self.checkpoint.parameters)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the result depends on, by the name that a message gives it."""
        recipe = self.recipe
        return {
            "the model": self.checkpoint.fingerprint(),
            "the calibration text or its windows": self.calibration.sha256 if self.calibration else None,
            "the method": {"name": name_of(self.method), **dataclasses.asdict(self.method)},
            "the pattern": recipe.pattern.json(),
            "--where": recipe.where,
            "--skip": recipe.skip,
            "--override": {regex: pattern.json() for regex, pattern in recipe.overrides.items()},
            "--dtype": jnp.dtype(self.dtype).name,
            "--expert-tokens": recipe.expert_tokens,
            "--keep-zeros": recipe.keep_zeros,
            "--allocate": allocation_json(recipe.allocation) | {"windows": self.scored and self.scored.sha256},
            "--reconstruct": recipe.reconstruct,
            "--format": self.format,
            **{f"the version of {name}": version for name, version in environment(self.dtype)["versions"].items()},
        }

    def described(self) -> dict[str, Any]:
        """What the record of the result says of the job, beside what came of it."""
        calibration = self.calibration
        own = {"method": name_of(self.method), **dataclasses.asdict(self.method)}
        return {
            "recipe": {**own, **self.recipe.json(), "calibration": calibration.source if calibration else None},
            **({"chosen": self.chosen.json()} if self.chosen else {}),
            "model": self.checkpoint.described(),
            "calibration": calibration.described() if calibration else None,
            "evaluation": self.evaluation.described() if self.evaluation else None,
            **environment(self.dtype),
        }

"""Which kernels make up for what a structured run removes, as a one-shot job that prunes whole inputs of them.

The kernels that read heads and channels lose inputs. Refitting one is pruning it as `jprune.methods` prune: stage by
stage, by the Gram matrix of its inputs in the model that is smaller so far. So the run is one of `pipeline.oneshot`,
over the whole model, of which the result is what stays.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from jprune.anatomy.kernels import Kernel, matmul_kernels
from jprune.checkpoints import Checkpoint
from jprune.errors import JpruneError
from jprune.pipeline.forecast.forecast import Forecast
from jprune.pipeline.job import Job
from jprune.pipeline.oneshot.report import KernelReport
from jprune.pipeline.options import CalibrationText, Machine
from jprune.pipeline.recipe import Recipe
from jprune.pipeline.shrink.scores import Positions, units_of
from jprune.places import Place
from jprune.structured.base import UnitMethod
from jprune.structured.compensation import Compensate, Rows, inputs
from jprune.structured.units import Units


def job_of(
    checkpoint: Checkpoint,
    method: UnitMethod,
    *,
    text: CalibrationText,
    dtype: DTypeLike,
    keep: Positions | None,
) -> Job | None:
    """What is to be refitted, without its text; None if nothing is.

    Args:
      checkpoint: the whole model.
      method: what goes, and how the rest makes up for it.
      text: where the text comes from; the method says how many windows, and which.
      dtype: of the activations.
      keep: the positions that stay, by path and axis; None if that is not known yet, so that all may.
    """
    if (wanted := method.compensation) is None:
        return None
    recipe = Recipe(
        pattern=Rows(kept=1),  # each kernel has its own
        calibration=text.calibration,
        calibration_proportions=text.calibration_proportions,
        samples=wanted.samples,
        sequence_length=wanted.sequence_length,
        seed=method.seed,
    )
    return Job(
        checkpoint=checkpoint,
        method=Compensate(damping=wanted.damping),
        recipe=recipe,
        kernels=readers(checkpoint, units_of(checkpoint, method), keep),
        dtype=dtype,
        cut=keep or {},
    )


def readers(checkpoint: Checkpoint, units: Sequence[Units], keep: Positions | None) -> tuple[Kernel, ...]:
    """The kernels that sum over units, each with the inputs that stay; those that lose none are left out.

    At least one is there, so that there is a run: a kernel that loses nothing does not change.
    """
    read = {(member.path, member.axis) for u in units for member in u.members}
    kernels = []
    for path, (part, matmul) in matmul_kernels(checkpoint).items():
        if not any((path, axis) in read for axis in matmul.in_axes):
            continue
        shape, kept = checkpoint.shapes[path].shape, (keep or {}).get(path, {})
        place = Place(path=path, in_axes=matmul.in_axes, batch_axes=matmul.batch_axes)
        stay = inputs(place, shape, kept)
        left = np.nonzero(stay)[1].reshape(len(stay), -1)
        kernels.append(
            Kernel(
                path=path,
                unit=part.name,
                shape=shape,
                in_axes=matmul.in_axes,
                stage=matmul.stage,
                pattern=Rows(kept=left.shape[1], positions=left if matmul.batch_axes else left[0]),
                batch_axes=matmul.batch_axes,
            )
        )
    losing = [kernel for kernel in kernels if keep is None or kernel.zeros]
    return tuple(losing or kernels[:1])


def too_large(job: Job, machine: Machine, disk: Path) -> str | None:
    """Why a job is not done: the memory that it needs is not there. None if it is."""
    _, memory = Forecast(job, machine).choose(disk)
    if memory.fits:
        return None
    needed, limit = memory.host_fixed, memory.limit
    if needed <= limit:  # so it is the device that is too small
        needed, limit = memory.device_fixed or 0, memory.device_limit or 0
    return left_out(f"it needs {needed / 1e9:.2g} GB of memory, of which {limit / 1e9:.2g} GB may be taken (`memory`)")


def left_out(why: object) -> str:
    """What a user is told of a run that is not compensated though it was to be."""
    return f"what is left was not refitted: {why}"


def few_tokens(job: Job, kernels: Iterable[KernelReport]) -> tuple[str, ...]:
    """Notices, if there is less text than least squares need, or experts that were sent little of it."""
    few = [kernel for kernel in kernels if kernel.few_tokens]
    unseen = (
        f"{sum(len(kernel.few_tokens) for kernel in few)} experts were sent fewer than {job.recipe.least_tokens} "
        f"calibration tokens, and what is left of them was not refitted (the first in {few[0].path}; see few_tokens in "
        "jprune.json); more text helps (`compensation_samples`, `compensation_length`)"
        for _ in few[:1]
    )
    return (*_less_than_inputs(job), *unseen)


def _less_than_inputs(job: Job) -> tuple[str, ...]:
    widest = max(job.kernels, key=lambda kernel: kernel.d_in)
    tokens = math.prod(job.shape or ())
    if tokens >= widest.d_in:
        return ()
    return (
        f"refitted by {tokens} calibration tokens, fewer than {widest.path} has inputs ({widest.d_in}); more text "
        "helps (`compensation_samples`, `compensation_length`)",
    )


def with_text(job: Job) -> tuple[Job | None, str | None]:
    """The job with its calibration windows; or None, and why there are none."""
    try:
        return job.with_calibration(), None
    except JpruneError as error:
        return None, left_out(error)

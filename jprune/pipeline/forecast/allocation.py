"""What a plan says of a run that shares out its zeros: the patterns that are known, or the pass that will tell."""

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp

from jprune.anatomy.parts import parts
from jprune.pipeline.forecast.forecast import Forecast, PartPlan, Plan
from jprune.pipeline.job import TRIED, Job
from jprune.pipeline.options import Machine
from jprune.pipeline.recipe import allocation_json

PASS = "allocation"
"""Name of the pass, among the units of a plan."""


def with_allocation(plan: Plan, job: Job, machine: Machine, disk: Path) -> Plan:
    """The plan of a run, with what its allocation adds.

    A pass takes what a run would that prunes the same kernels by the scores that it reads.

    Args:
      plan: without it.
      job: what is to be done.
      machine: what it may take.
      disk: the run folder, or where it will be.
    """
    if not job.shared:
        return plan
    if job.scoring is None:
        allocated = job.allocated(None)
        return dataclasses.replace(plan, kernels=allocated.kernels, allocation=job.blocks_json(allocated))
    own = Forecast(job.scoring, machine).plan(disk)
    tried = _flops_of_tries(job.scoring) if job.recipe.allocation.tries else 0.0
    held = bytes_of_tries(job.scoring)
    on_cpu = own.peak_device_memory_bytes is None
    own = dataclasses.replace(
        own,
        peak_memory_bytes=own.peak_memory_bytes + (held if on_cpu else 0),
        peak_device_memory_bytes=None if own.peak_device_memory_bytes is None else own.peak_device_memory_bytes + held,
    )
    scoring = PartPlan(
        name=PASS,
        bytes_read=sum(unit.bytes_read for unit in own.units),
        flops=own.flops + tried,
        seconds=own.seconds * (1 + tried / own.flops),
        peak_memory_bytes=own.peak_memory_bytes,
        peak_device_memory_bytes=own.peak_device_memory_bytes,
    )
    on_device = [x for x in (plan.peak_device_memory_bytes, own.peak_device_memory_bytes) if x is not None]
    return dataclasses.replace(
        plan,
        allocation=allocation_json(job.recipe.allocation),
        units=(scoring, *plan.units),
        disk_bytes=max(plan.disk_bytes, own.disk_bytes if "disk" in (own.activations, own.intermediates) else 0),
        peak_memory_bytes=max(plan.peak_memory_bytes, own.peak_memory_bytes),
        peak_device_memory_bytes=max(on_device, default=None),
        advice=plan.advice or own.advice,
    )


def _flops_of_tries(scoring: Job) -> float:
    """Operations of passing on the dense model's hidden states, and those of a model for every block pruned."""
    assert scoring.shape is not None
    tokens = math.prod(map(min, scoring.shape, TRIED))
    passed, flops = 0, 0.0
    for part in parts(scoring.checkpoint)[: scoring.checkpoint.model.layers]:
        passed += part.name in scoring.shared
        flops += 2.0 * tokens * (1 + passed) * sum(math.prod(shape) for _, shape, _ in part.shapes)
    return flops


def bytes_of_tries(scoring: Job) -> int:
    """Bytes of the hidden states of the models that a pass tries out, and of the predictions of two for a window."""
    if not scoring.recipe.allocation.tries:
        return 0
    assert scoring.shape is not None
    windows, length = map(min, scoring.shape, TRIED)
    model = scoring.checkpoint.model
    hidden = (len(scoring.shared) + 2) * windows * length * model.d_model * jnp.dtype(scoring.dtype).itemsize
    return hidden + 6 * 4 * length * model.vocab

"""How the zeros are shared out over the blocks, and the pass over the dense model that tells.

The pass goes block by block as pruning does, in the memory of one, and prunes nothing. What it finds, a number for each
block, is kept in the run folder: a run that is gone on with shares out as it did before.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jprune import devices
from jprune.allocations.base import score_of_block
from jprune.anatomy.kernels import Kernel
from jprune.anatomy.parts import Part, parts
from jprune.errors import JpruneError
from jprune.pipeline.forecast.allocation import bytes_of_tries
from jprune.pipeline.forecast.forecast import Forecast
from jprune.pipeline.forecast.layout import hidden_specs
from jprune.pipeline.job import Job
from jprune.pipeline.oneshot.begin import Run
from jprune.pipeline.oneshot.blocks import check_finite, embedded, read_part
from jprune.pipeline.oneshot.damage import Damage
from jprune.pipeline.oneshot.report import KernelReport
from jprune.pipeline.oneshot.solve import solve
from jprune.pipeline.oneshot.stages import Params, PartRun
from jprune.pipeline.options import Machine
from jprune.places import Place
from jprune.runs import processes
from jprune.runs.activations import Batches
from jprune.runs.background import Background
from jprune.runs.report import Progress
from jprune.statistics import Stacked, Statistic

MARK = "allocation"


def allocated(job: Job, run: Run, machine: Machine) -> Job:
    """The job with the patterns that its allocation gives; scores its blocks if no earlier process of the run has."""
    if job.scoring is None:
        return job.allocated(None)
    known = processes.decided_by_first(lambda: run.folder.marked(MARK))
    if known is None:
        scoring = job.scoring
        layout, memory = Forecast(scoring, machine).choose(run.folder.folder)

        def tell(step: Progress) -> None:
            run.tell(dataclasses.replace(step, phase="allocate"))

        room = memory.room
        room.take(bytes_of_tries(scoring))  # where there is none, the activations go to disk anyway
        own = dataclasses.replace(run, layout=layout, room=room, tell=tell)
        with run.stopwatch.phase("allocation"):
            known = processes.gathered({"scores": _scores(scoring, own, list(job.shared))})[0]
        run.folder.mark(MARK, known)
    return job.allocated(known["scores"])


def _scores(job: Job, run: Run, blocks: list[str]) -> list[float]:
    """The scores of the blocks, in one pass."""
    assert job.shape is not None
    specs = hidden_specs(job.checkpoint.model.d_model, job.shape, run.layout, job.dtype, job.mesh)
    scores: dict[str, float] = {}
    with jax.default_matmul_precision("highest"), Background() as reading:
        hidden = embedded(job, specs, _batches(run, specs, 0))
        damage = Damage(job) if job.recipe.allocation.tries else None
        ahead = reading.submit(functools.partial(read_part, job.checkpoint, job.parts[0]))
        for i, part in enumerate(job.parts):
            values, last = ahead.result(), i + 1 == len(job.parts)
            if not last:
                ahead = reading.submit(functools.partial(read_part, job.checkpoint, job.parts[i + 1]))
            params = _placed(job, part, values)
            seen: dict[str, Any] = {}
            make = None if last else functools.partial(_batches, run, specs, i + 1)
            part_run = PartRun(i, job, run, solve=functools.partial(_try if damage else _remember, seen))
            _, after = part_run.with_data(dict(params), hidden, make)
            hidden.drop()
            if damage is not None:
                damage.pass_through(part, params, seen)
            elif part.name in blocks:
                scores[part.name] = _score(job, part_run.wanted, params, seen)
            if after is not None:
                hidden = after
        if damage is not None:
            for part in parts(job.checkpoint)[len(job.parts) : job.checkpoint.model.layers]:
                damage.pass_through(part, _placed(job, part, read_part(job.checkpoint, part)), {})
            scores = damage.all()
    for name in blocks:
        if not math.isfinite(scores[name]):
            raise JpruneError(
                f"{name}: its score for the allocation is {scores[name]}; activations overflow there or behind it: use "
                "a wider `dtype`, or the uniform allocation"
            )
    return [scores[name] for name in blocks]


def _placed(job: Job, part: Part, values: dict[str, Any]) -> Params:
    """A part's parameters on the devices; `values` are used up, so that no array is held twice."""
    where = part.shardings(job.mesh, job.checkpoint.model.d_model)
    params = {path: devices.place(values.pop(path), where[path]) for path, _, _ in part.shapes}
    check_finite({part.path(path): value for path, value in params.items()})
    return params


def _batches(run: Run, specs: Any, index: int) -> Batches:
    return Batches(specs, run.room, run.folder.spill / f"allocation-{index}.bin")


def _remember(
    seen: dict[str, Any], job: Job, kernels: Mapping[str, Kernel], values: Params, statistic: Statistic | None
) -> tuple[dict[str, jax.Array], list[KernelReport]]:
    """In the place of `solve`: what is known of the kernels' inputs is kept, and nothing is pruned."""
    del job, values
    seen.update(dict.fromkeys(kernels, statistic))
    return {}, []


def _try(
    seen: dict[str, Any], job: Job, kernels: Mapping[str, Kernel], values: Params, statistic: Statistic | None
) -> tuple[dict[str, jax.Array], list[KernelReport]]:
    """As `_remember`, of what pruning would make of the kernels."""
    pruned, _ = solve(job, kernels, values, statistic)
    seen.update(pruned)
    return {}, []


def _score(job: Job, kernels: Mapping[str, Kernel], params: Params, seen: Mapping[str, Any]) -> float:
    """The score of a block; a stack of kernels counts with each of them."""
    matrices, statistics = [], []
    for path, kernel in kernels.items():
        stack = Place(path=path, in_axes=kernel.in_axes, batch_axes=kernel.batch_axes).matrices(params[path])
        own = seen[path].each if isinstance(seen[path], Stacked) else jax.tree.map(lambda x: x[None], seen[path])
        chosen = np.arange(len(stack)) if kernel.chosen is None else np.array(kernel.chosen)
        statistics.append(jax.tree.map(lambda x, chosen=chosen: x[chosen], own))
        matrices.append(stack[chosen])
    return float(score_of_block(job.recipe.allocation, matrices, statistics))

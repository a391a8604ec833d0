"""What a run will take, and how it is laid out for the memory there is.

A run needs, beside what the process has: the weights of three parts (the one at work, the next, which is being read,
and the last, which is being written), the working memory of compiled programs, and the activations. The first three
do not depend on the calibration set or on the number of blocks. What is left of the limit is for activations, and what
does not fit goes to disk, or is recomputed where computing is faster than disks are.
"""

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jprune import devices, trees
from jprune.anatomy.kernels import Kernel
from jprune.errors import JpruneError
from jprune.models.batching import windows_at_once
from jprune.pipeline.forecast import speed
from jprune.pipeline.forecast.costs import DenseModel, UnitCost, rough_working, unit_cost, working
from jprune.pipeline.forecast.layout import Layout, at_once, hidden_specs
from jprune.pipeline.job import Job
from jprune.pipeline.options import Machine
from jprune.runs import memory
from jprune.runs.activations import Room

T = TypeVar("T")
COMPILER = 3 * 2**27
"""Bytes that compiling, and the programs compiled, leave in the process."""
UNITS_IN_MEMORY = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartPlan:
    """What one part (a block, or the head) is expected to take."""

    name: str
    bytes_read: int
    flops: float
    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    """Of each device; None on CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a run will do, known beforehand."""

    kernels: tuple[Kernel, ...]
    sparsity: trees.Sparsity
    """Expected."""
    tokens: int
    """Calibration tokens; 0 where the method needs none."""
    layout: Layout
    units: tuple[PartPlan, ...]
    activations: str
    """Where they are between parts: "device", "memory", "disk" (in part) or "none"."""
    intermediates: str
    """What becomes of the values between stages: "kept", "disk" (in part), "recomputed" or "none"."""
    disk_bytes: int
    """That the run folder takes at most, beside the result."""
    memory_limit: int
    peak_memory_bytes: int
    """Expected, with what Python and JAX took when the plan was made; without `evaluate`."""
    peak_device_memory_bytes: int | None
    dense_model: DenseModel | None
    """Of all this, what the second stream of activations takes; None if there is only one."""
    advice: tuple[str, ...]
    """What to change so that it fits the limit; empty if it fits."""
    allocation: Mapping[str, Any] | None = None
    """How zeros are shared out, and the sparsities of the blocks where they are known; None if uniformly."""

    @property
    def flops(self) -> float:
        """Of matmuls over the calibration tokens, of statistics, and of the solver."""
        return sum(unit.flops for unit in self.units)

    @property
    def seconds(self) -> float:
        """Expected, without compiling and evaluating."""
        return sum(unit.seconds for unit in self.units)

    @property
    def fits(self) -> bool:
        """Whether the expected peak is within the limit."""
        return not self.advice

    @property
    def time_class(self) -> str:
        """Seconds, minutes, hours or days."""
        limits = ((60, "seconds"), (3600, "minutes"), (86400, "hours"), (math.inf, "days"))
        return next(name for limit, name in limits if self.seconds < limit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What a layout takes."""

    host_fixed: int
    """Bytes of host memory beside activations."""
    device_fixed: int | None
    """Of each accelerator; None on CPU."""
    hidden: int
    """Bytes of the activations between parts that this process has."""
    carry: int
    """The most bytes of the values between two stages (which contain the activations) that this process has."""
    limit: int
    device_limit: int | None
    """Of each device."""
    devices: int = 1
    """That this process has."""

    @property
    def room(self) -> Room:
        """What is left for activations."""
        host = max(self.limit - self.host_fixed, 0)
        if self.device_fixed is None or self.device_limit is None:
            return Room(device=host, host=0)
        return Room(device=self.devices * max(self.device_limit - self.device_fixed, 0), host=host)

    @property
    def left(self) -> int:
        """Bytes in that room."""
        return self.room.left

    @property
    def device_left(self) -> int:
        """Bytes of them where programs run: on the accelerator, or on a CPU all."""
        return self.room.device

    @property
    def fits(self) -> bool:
        """Whether everything but activations is within the limits: activations can go elsewhere."""
        device = self.device_fixed is None or self.device_limit is None or self.device_fixed <= self.device_limit
        return device and self.host_fixed <= self.limit


class Forecast:
    """The costs of a run.

    Args:
      job: what is to be done.
      machine: what it may take: bytes of memory, by default what `memory.default_limit` says, and calibration windows
        at once on each device, where memory suffices, by default as many as are fast.
    """

    def __init__(self, job: Job, machine: Machine | None = None):
        machine = machine or Machine()
        if machine.micro_batch is not None and machine.micro_batch < 1:
            raise JpruneError(f"micro_batch must be at least 1, got {machine.micro_batch}")
        self.job, self.micro_batch = job, machine.micro_batch
        self.base = memory.resident() + COMPILER
        self.limit = machine.memory or memory.default_limit()

    def choose(self, disk: Path, *, exact: bool = False) -> tuple[Layout, Memory]:
        """The layout for the memory there is, and what it takes.

        Args:
          disk: the run folder, or where it will be.
          exact: ask the compiler for the working memory even where a rough bound fits.
        """
        data = self.job.mesh.shape[devices.DATA]
        each = 1
        if self.job.shape is not None:
            most = self.micro_batch or windows_at_once(self.job.shape[1])
            each = at_once(self.job.shape[0], data, most, held_out=self.job.recipe.reconstruct > 0)
        while not (found := self.memory(layout := Layout(windows=each * data), exact=exact)).fits and each > 1:
            each //= 2
        needed = max(found.hidden, found.carry)
        if needed > found.left and (jax.default_backend() != "cpu" or 2 * needed > _free_disk(disk)):
            all_of_it = int((found.left - found.hidden) / devices.local_share(self.job.mesh))
            layout = Layout(windows=layout.windows, carry_limit=max(all_of_it, 0))
        return layout, found

    def memory(self, layout: Layout, *, exact: bool = False) -> Memory:
        """What a layout takes: asks the compiler if that is wanted, or if by a rough bound there is no room."""
        if not exact:
            found = self._memory(layout, exact=False)
            if max(found.hidden, found.carry) <= found.left and found.fits:
                return found
        return self._memory(layout, exact=True)

    def _memory(self, layout: Layout, *, exact: bool) -> Memory:
        costs = self.costs(layout)
        peaks = self.working(layout, exact=exact)
        weights = max(cost.weights for cost in costs)
        hidden = self.job.streams * sum(map(_nbytes, self.hidden(layout)))
        on_cpu = jax.default_backend() == "cpu"
        share, count = devices.local_share(self.job.mesh), len(self.job.mesh.local_devices)
        return Memory(
            host_fixed=self.base + self._host(weights, max(peaks)),
            device_fixed=None if on_cpu else weights + max(peaks),
            hidden=math.ceil(hidden * share),
            carry=math.ceil(max(cost.carry for cost in costs) * share),
            limit=self.limit,
            device_limit=memory.device_limit(),
            devices=count,
        )

    def _host(self, weights: int, peak: int) -> int:
        """Bytes of host memory for a unit's weights, and for what its programs take where devices are of the host."""
        if jax.default_backend() != "cpu":
            return UNITS_IN_MEMORY * weights
        count = len(self.job.mesh.local_devices)
        return (UNITS_IN_MEMORY + count - 1) * weights + count * peak

    def hidden(self, layout: Layout) -> list[jax.ShapeDtypeStruct]:
        """The hidden states of one stream, micro-batch by micro-batch."""
        if self.job.shape is None:
            return []
        width = self.job.checkpoint.model.d_model
        return [x for (x,) in hidden_specs(width, self.job.shape, layout, self.job.dtype, self.job.mesh)]

    def costs(self, layout: Layout) -> list[UnitCost]:
        """Of every unit."""
        return self._of_parts(unit_cost, self.hidden(layout), spread=self.job.mesh.size > 1)

    def working(self, layout: Layout, *, exact: bool) -> list[int]:
        """Working memory of every unit on each device, in bytes."""
        hidden = self.hidden(layout)
        x = None
        if hidden:
            shape = hidden[0].sharding.shard_shape(hidden[0].shape)
            x = jax.ShapeDtypeStruct(shape, hidden[0].dtype)
        options = {"spread": self.job.mesh.size > 1} if exact else {}
        return self._of_parts(working if exact else rough_working, x, **options)

    def _of_parts(self, estimate: Callable[..., T], x: Any, **options: Any) -> list[T]:
        job, passes = self.job, self.job.recipe.reconstruct
        return [estimate(part, job.kernels_of(part), job.method, x, passes, **options) for part in job.parts]

    def plan(self, disk: Path) -> Plan:
        """Everything, with a short measurement of this machine."""
        layout, found = self.choose(disk, exact=True)
        d_model, widest = self.job.checkpoint.model.d_model, max(kernel.d_in for kernel in self.job.kernels)
        rates = speed.measure(self.job.method, d_model=d_model, d_ff=widest, dtype=self.job.dtype)
        kept = max(found.hidden, found.carry if layout.carry_limit is None else 0)
        on_device = min(kept, found.device_left)
        on_host = min(kept - on_device, found.left - found.device_left)
        disk_bytes = 2 * found.hidden + (2 * found.carry if kept > found.left else 0)
        planned, costs = [], self.costs(layout)
        for part, cost, peak in zip(self.job.parts, costs, self.working(layout, exact=True), strict=True):
            on_cpu = found.device_fixed is None
            host = self.base + self._host(cost.weights, peak) + (on_device if on_cpu else on_host)
            planned.append(
                PartPlan(
                    name=part.name,
                    bytes_read=cost.weights,
                    flops=cost.forward_flops + cost.statistic_flops + cost.solve_flops + cost.training_flops,
                    seconds=rates.seconds(cost),
                    peak_memory_bytes=host,
                    peak_device_memory_bytes=None if on_cpu else cost.weights + peak + on_device // found.devices,
                )
            )
        sparsity = self.job.sparsity(sum(k.zeros for k in self.job.kernels))
        embedding = sum(_nbytes(s) for p, s in self.job.checkpoint.shapes.items() if p.startswith("embed/"))
        peak = max(self.base + embedding + min(found.hidden, found.left), *(u.peak_memory_bytes for u in planned))
        device_peaks = [u.peak_device_memory_bytes for u in planned if u.peak_device_memory_bytes is not None]
        return Plan(
            kernels=self.job.kernels,
            sparsity=sparsity,
            tokens=math.prod(self.job.shape) if self.job.shape else 0,
            layout=layout,
            units=tuple(planned),
            activations=_where(found),
            intermediates=_what(layout, found),
            disk_bytes=disk_bytes,
            memory_limit=self.limit,
            peak_memory_bytes=peak,
            peak_device_memory_bytes=max(device_peaks, default=None),
            dense_model=_dense_model([c.beside for c in costs if c.beside], rates, on_device + on_host, disk_bytes),
            advice=() if found.fits else self.advice(),
        )

    def advice(self) -> tuple[str, ...]:
        """What would make a run smaller, the most telling first."""
        layout = Layout(windows=1)
        found = self.memory(layout, exact=False)
        widest = max(self.job.kernels, key=lambda kernel: kernel.d_in)
        answers = []
        if self.job.shape is not None:
            values = max(found.carry, found.hidden) // max(len(self.hidden(layout)), 1)
            answers.append(
                f"a shorter `sequence_length`: one window of {self.job.shape[1]} tokens takes about "
                f"{_words(2 * values)} between stages, and more within them"
            )
            if np.dtype(self.job.dtype).itemsize > 2:
                answers.append("`dtype` bfloat16, which halves the activations")
            if self.job.streams > 1:
                answers.append("`dense_targets` 0, which halves the activations")
        kind = self.job.method.statistic
        known = [] if kind is None else jax.tree.leaves(jax.eval_shape(lambda: kind.zeros(widest.d_in)))
        # A few numbers an input, as Wanda's, are nothing beside the kernel.
        if kind is not None and 10 * (taken := sum(map(_nbytes, known))) > 4 * widest.whole:
            answers.append(
                f"`skip` {widest.path.split('/', 2)[-1].removesuffix('/kernel')}: what is known of its {widest.d_in} "
                f"inputs ({kind.__name__}) takes {_words(taken)}, and is needed several times over; or a method that "
                "needs less, such as wanda"
            )
        answers.append(
            f"more memory: {_words(found.host_fixed)} of host memory are needed whatever the calibration, "
            f"{_words(UNITS_IN_MEMORY * max(c.weights for c in self.costs(layout)))} of them for weights"
        )
        return tuple(answers)


def _dense_model(costs: list[UnitCost], rates: speed.Speed, in_memory: int, on_disk: int) -> DenseModel | None:
    """Half of all activations, and what else computing the dense model costs; None if no part does."""
    if not costs:
        return None
    return DenseModel(
        memory_bytes=in_memory // 2 + max(cost.weights for cost in costs),
        disk_bytes=on_disk // 2,
        seconds=sum(map(rates.seconds, costs)),
    )


def _where(found: Memory) -> str:
    if found.hidden == 0:
        return "none"
    if found.hidden > found.left:
        return "disk"
    on_device = found.device_fixed is not None and found.hidden <= found.device_left
    return "device" if on_device else "memory"


def _what(layout: Layout, found: Memory) -> str:
    if found.carry == 0:
        return "none"
    if found.carry <= found.left:
        return "kept"
    return "disk" if layout.carry_limit is None else "recomputed"


def _free_disk(folder: Path) -> int:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _nbytes(shape: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape.shape) * np.dtype(shape.dtype).itemsize


def _words(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2g} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2g} MB"

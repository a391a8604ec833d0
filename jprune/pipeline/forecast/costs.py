"""What one unit costs: bytes, flops, and the memory that its compiled programs take.

Two estimates of working memory. `rough_working` is a formula from shapes, on the high side, and free. `working`
compiles the very programs that will run, for their shapes, and asks the compiler what each takes: seconds for each kind
of block.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune import devices, statistics, trees
from jprune.anatomy.kernels import Kernel
from jprune.anatomy.parts import Part
from jprune.cross_gram import streams
from jprune.methods import Method
from jprune.pipeline.forecast import learning
from jprune.pipeline.forecast.programs import Spec, finish, inputs_of, observe, zero_parts
from jprune.statistics import Stacked, Statistic
from jprune.trace import Stages
from jprune.trace.inputs import Rows
from jprune.train import locally

_STATE = 16
"""Bytes of an element of a kernel that is trained: itself, two moments, and the best that there was."""
AT_ONCE = 2
"""Micro-batches that are computed side by side."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitCost:
    """What one unit costs."""

    weights: int
    """Bytes, as stored."""
    carry: int
    """The most bytes that go from one stage to the next, over all micro-batches; 0 without calibration."""
    forward_flops: float
    """Of the matmuls over the calibration tokens."""
    statistic_flops: float
    solve_flops: float
    solve_elements: float
    """Of the kernels that are solved for."""
    training_flops: float = 0.0
    """Of local reconstruction, as long as it may take."""
    beside: "UnitCost | None" = None
    """Of these, what it costs to compute the dense model beside the pruned one, if that is done. Its weights are those
    of the kernels, which are there twice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseModel:
    """What it takes to compute the dense model beside the pruned one, within what a run takes in all."""

    memory_bytes: int
    """Of its activations, as far as they are in memory, and of kernels that are there twice."""
    disk_bytes: int
    """Of its activations in the run folder, at most."""
    seconds: float
    """For its matmuls, and for products of its inputs with those of the pruned model."""


def unit_cost(
    unit: Part,
    kernels: Sequence[Kernel],
    method: Method,
    hidden: Sequence[jax.ShapeDtypeStruct],
    passes: int = 0,
    *,
    spread: bool = False,
) -> UnitCost:
    """The cost of pruning `kernels` of `unit`, with micro-batches of hidden states as given (none: no calibration), and
    of so many passes of local reconstruction; `spread` over several devices or not."""
    weights = sum(math.prod(shape) * np.dtype(dtype).itemsize for _, shape, dtype in unit.shapes)
    parameters = sum(math.prod(shape) for _, shape, _ in unit.shapes)
    tokens = sum(x.shape[0] * x.shape[1] for x in hidden)
    models = streams(method.statistic)
    plans = [_spec(unit, kernels, x, models, spread).stages() for x in hidden] if kernels else []
    rows = {unit.path(path): count for path, count in _sorted_rows(plans).items()}
    statistic = alone = solve = 0.0
    for d_in, members in _sharing(kernels):
        seen = rows.get(members[0].path, _count(members) * tokens)
        if method.statistic is not None:
            statistic += statistics.flops(method.statistic, seen, d_in)
            alone += statistics.flops(statistics.Gram, seen, d_in)
        solve += max(k.count for k in members) * method.flops(d_in, _outputs(members))
    carry = 0
    if plans:
        carry = max(sum(_nbytes(plan.carries[s]) for plan in plans) for s in range(1, len(plans[0].matmuls) + 1))
        inputs = plans[0].found.inputs
        statistic += sum(2.0 * tokens * inputs[i].d_in * d_out for i, d_out in _outputs_added(plans[0]).items())
    unsent = sum(k.whole * (tokens - rows[k.path] / _count([k])) for k in kernels if k.path in rows)
    forward = 2.0 * (tokens * parameters - unsent)
    training = 0.0
    if trained(unit, kernels, passes):
        # Forwards and backwards, and what is held out; the dense one, and forwards again with what has come of it.
        training = (3 * passes + 2) * forward
        carry += sum(math.prod(x.shape) * x.dtype.itemsize for x in hidden)  # the hidden states are kept for it
    twice = None
    if models > 1:
        twice = UnitCost(
            weights=_kernel_bytes(unit, kernels),
            carry=carry,
            forward_flops=forward,
            statistic_flops=statistic - alone,
            solve_flops=0.0,
            solve_elements=0.0,
        )
    return UnitCost(
        weights=weights,
        carry=models * carry,
        forward_flops=models * forward,
        statistic_flops=statistic,
        solve_flops=solve,
        solve_elements=float(sum(kernel.size for kernel in kernels)),
        training_flops=training,
        beside=twice,
    )


def trained(unit: Part, kernels: Sequence[Kernel], passes: int) -> bool:
    """Whether anything of a part is trained: not the head."""
    return bool(passes and kernels and unit.prefix)


def _sorted_rows(plans: Sequence[Stages]) -> dict[str, int]:
    """Of stacks whose kernels read sorted rows, how many all of them read in all micro-batches, by path in the unit."""
    counts: dict[str, int] = {}
    for plan in plans:
        for m in itertools.chain(*plan.matmuls):
            read = plan.found.inputs[m.input_id]
            if isinstance(read.rows, Rows):
                counts[m.path] = counts.get(m.path, 0) + math.prod(read.value.aval.shape) // read.d_in
    return counts


def rough_working(
    unit: Part, kernels: Sequence[Kernel], method: Method, x: jax.ShapeDtypeStruct | None, passes: int = 0
) -> int:
    """Bytes, at most, that a unit takes beside weights and activations; x: one micro-batch of hidden states."""
    elements = sum(math.prod(shape) for _, shape, _ in unit.shapes)
    groups = _sharing(kernels)
    seen = max((_count(members) * _seen_bytes(method, d_in) for d_in, members in groups), default=0)
    solve = seen + max((_solve_bytes(method, d_in, members) for d_in, members in groups), default=0)
    if x is None:
        return solve
    models = streams(method.statistic)
    twice = _kernel_bytes(unit, kernels) if models > 1 else 0
    widest = max((math.prod(shape) // x.shape[-1] for _, shape, _ in unit.shapes if len(shape) > 1), default=1)
    values = 4 * math.prod(x.shape[:-1]) * (12 * x.shape[-1] + 4 * widest)
    observing = AT_ONCE * (3 * seen + models * values + 4 * elements)
    training = 0
    if trained(unit, kernels, passes):
        heads = max((shape[1] for path, shape, _ in unit.shapes if path == "attn/q/kernel"), default=0)
        attention = 4 * 4 * heads * x.shape[1] * math.prod(x.shape[:-1])  # going back asks for all its weights
        training = _STATE * sum(k.whole for k in kernels) + 4 * elements + 5 * values + attention
    return twice + max(solve, observing, training)


def working(
    unit: Part,
    kernels: Sequence[Kernel],
    method: Method,
    x: jax.ShapeDtypeStruct | None,
    passes: int = 0,
    *,
    spread: bool = False,
) -> int:
    """As `rough_working`, from the compiled programs; `spread` over several devices or not."""
    wanted = tuple(_Wanted(dataclasses.replace(k, path=unit.relative(k.path))) for k in kernels)
    twice = _kernel_bytes(unit, kernels) if streams(method.statistic) > 1 else 0
    own = None if x is None else (x.shape, jnp.dtype(x.dtype))
    return twice + _working(unit.function, unit.shapes, wanted, method, own, trained(unit, kernels, passes), spread)


class _Wanted:
    """A kernel, equal to those of other blocks that are pruned in the same way."""

    def __init__(self, kernel: Kernel):
        k = self.kernel = kernel
        self._key = (k.path, k.shape, k.in_axes, k.batch_axes, k.stage, k.pattern, k.chosen is None)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Wanted) and self._key == other._key


@functools.lru_cache(maxsize=64)
def _working(
    function: Callable,
    shapes: tuple,
    wanted: tuple[_Wanted, ...],
    method: Method,
    x: tuple | None,
    trains: bool,
    spread: bool,
) -> int:
    unit = Part("", function, shapes)
    kernels = {w.kernel.path: w.kernel for w in wanted}
    dtypes = {path: dtype for path, _, dtype in shapes}
    if x is None or method.statistic is None:
        return max((_solving(method, {p: k}, dtypes, None) for p, k in kernels.items()), default=0)
    models = streams(method.statistic)
    spec = Spec(function, shapes, frozenset(kernels), x, devices.one_device(), models, spread)
    if not kernels:
        program = jax.jit(function).lower(unit.abstract(), jax.ShapeDtypeStruct(*x))
        return models * AT_ONCE * _taken(program)
    params, plan, most = (unit.abstract(),) * models, spec.stages(), 0
    outputs = _outputs_added(plan)
    for stage, matmuls in enumerate(plan.matmuls):
        inputs = inputs_of(matmuls)
        known = {
            i: _abstract_zeros(method, spec, kernels[path], outputs.get(i, 0))
            for path, ids in inputs.items()
            for i in ids
        }
        all_statistics = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(known))
        carry = _abstract(plan.carries[stage]) * models
        observing = _taken(observe(spec, stage, stage, True).lower(params, carry, known)) - all_statistics
        most = max(most, AT_ONCE * (observing + all_statistics))
        for ids in dict.fromkeys(inputs.values()):
            together = {path: kernels[path] for path in inputs if inputs[path] == ids}
            whole = jax.eval_shape(statistics.merge_parts, known[ids[0]])
            most = max(most, all_statistics + _solving(method, together, dtypes, whole))
    if trains:
        most = max(most, _training(spec, params[0], kernels))
    last = finish(spec, len(plan.matmuls)).lower(params, _abstract(plan.carries[-2]) * models)
    return max(most, AT_ONCE * _taken(last))


def _solving(method: Method, kernels: dict[str, Kernel], dtypes: dict[str, Any], statistic: Statistic | None) -> int:
    """Bytes for solving for kernels that share an input, without the statistic."""
    count = math.prod(next(iter(kernels.values())).stack)  # one of a stack is solved for at a time
    matrices = [jax.ShapeDtypeStruct((k.d_in, k.d_out), dtypes[p]) for p, k in kernels.items()]
    copies = count * sum(m.size * m.dtype.itemsize for m in matrices)
    if isinstance(statistic, Stacked):
        statistic = jax.eval_shape(lambda s: s.of(0), statistic)
    leaves, tree = jax.tree.flatten(statistic)
    abstract = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    taken = _solver(method, tuple(matrices), tuple(k.pattern for k in kernels.values()), abstract, tree)
    if taken is None:
        return _solve_bytes(method, next(iter(kernels.values())).d_in, list(kernels.values()))
    return copies + taken


@functools.lru_cache(maxsize=64)
def _solver(method: Method, matrices: tuple, patterns: tuple, leaves: tuple, tree: Any) -> int | None:
    """Bytes that solving for matrices takes, compiled once for all that are alike; None if it cannot be traced."""
    named = {str(i): matrix for i, matrix in enumerate(matrices)}
    wanted = dict(zip(named, patterns, strict=True))
    try:
        program = jax.jit(lambda m, s: method.together(m, s, wanted, {})).lower(named, jax.tree.unflatten(tree, leaves))
    except jax.errors.JAXTypeError:  # a method that looks at values
        return None
    return _taken(program)


def _training(spec: Spec, params: Any, kernels: dict[str, Kernel]) -> int:
    """Bytes for training the kernels of a part, with the state of Adam and the best of them so far."""
    leaves = trees.flatten(params)
    pruned = {path: leaves.pop(path) for path in kernels}
    x, one = jax.ShapeDtypeStruct(*spec.x), jax.ShapeDtypeStruct((), jnp.float32)
    state = jax.eval_shape(locally.begin, pruned)
    leaves |= {path: pruned[path] for path, kernel in kernels.items() if kernel.chosen is not None}  # what stays of it
    program = learning.step(spec).lower(state, pruned, leaves, x, x, one, one)
    return _taken(program) + _STATE * sum(kernel.whole for kernel in kernels.values())


def _taken(lowered: Any) -> int:
    """Bytes that one call of a program takes: temporaries and results."""
    memory = lowered.compile().memory_analysis()
    if memory is None:  # the backend does not say
        return 0
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def _spec(unit: Part, kernels: Iterable[Kernel], x: jax.ShapeDtypeStruct, models: int, spread: bool) -> Spec:
    chosen = frozenset(unit.relative(k.path) for k in kernels)
    one = devices.one_device()
    return Spec(unit.function, unit.shapes, chosen, (x.shape, jnp.dtype(x.dtype)), one, models, spread)


def _abstract_zeros(method: Method, spec: Spec, kernel: Kernel, d_out: int) -> Any:
    return jax.eval_shape(zero_parts(method.statistic, 1, spec.sharding, kernel.d_in, *kernel.stack, d_out=d_out))


def _outputs_added(plan: Stages) -> dict[int, int]:
    """By input_id, how many outputs are added to something that is observed too."""
    return {i: addition.d_out for stage in range(len(plan.matmuls)) for i, addition in plan.added(stage).items()}


def _kernel_bytes(unit: Part, kernels: Iterable[Kernel]) -> int:
    dtypes = {unit.path(path): np.dtype(dtype) for path, _, dtype in unit.shapes}
    return sum(k.whole * dtypes[k.path].itemsize for k in kernels)


def _sharing(kernels: Iterable[Kernel]) -> list[tuple[int, list[Kernel]]]:
    """Kernels by what they most likely share: the stage, and the number of inputs."""
    groups: dict[tuple[int, int, tuple[int, ...]], list[Kernel]] = {}
    for k in kernels:
        groups.setdefault((k.stage, k.d_in, k.stack), []).append(k)
    return [(d_in, members) for (_, d_in, _), members in groups.items()]


def _count(sharing: Sequence[Kernel]) -> int:
    """The number of statistics of kernels that share an input: that of a stack, or one."""
    return math.prod(sharing[0].stack)


def _outputs(sharing: Sequence[Kernel]) -> int:
    """Outputs of kernels that share an input; of one kernel of each, where they are stacks."""
    return sum(k.d_out for k in sharing)


def _seen_bytes(method: Method, d_in: int) -> int:
    return 0 if method.statistic is None else statistics.nbytes(method.statistic, d_in)


def _solve_bytes(method: Method, d_in: int, sharing: Sequence[Kernel]) -> int:
    """Bytes for solving for kernels that share an input, by the method's formula: one of a stack, and copies of all."""
    whole = sum(k.whole for k in sharing)
    outputs = _outputs(sharing)
    return math.ceil(method.nbytes(d_in, outputs)) + 7 * 4 * (whole - outputs * d_in)


def _abstract(carry: Iterable[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in carry)


def _nbytes(carry: Iterable[Any]) -> int:
    return sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in carry)

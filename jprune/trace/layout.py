"""Which atoms each axis of each value is made of: one walk of the flat jaxpr, a rule for each primitive.

A rule makes axes equal, regroups them or cuts them (`jprune.trace.atoms`), and freezes the atoms for which the equation
tells one index from another by its position. An axis along which all elements are known to be the same array element
(the result of a broadcast) is `None`: it follows whatever it meets and ties nothing, so a shared ``zeros`` does not
couple two layers.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jprune.trace.atoms import ONE, Axis, Misfit, atom, concatenation, cut, freeze, regroup, unify
from jprune.trace.jaxpr import ELEMENTWISE, IDENTITIES, Atom, Body, Equation, Trace, Var, flat_body, where_written

Axes = tuple[Axis | None, ...]

POINTWISE = ELEMENTWISE | {
    *("real", "imag", "conj", "complex", "asinh", "acosh", "atanh", "nextafter", "lgamma", "digamma", "erf_inv"),
    *("population_count", "clz"),
}
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"}
CUMULATIVE = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"}
WINDOWS = {"reduce_window_sum", "reduce_window_max", "reduce_window_min"}

_LOOKED_AT = 1 << 22  # elements of a constant that are compared to see whether it varies along an axis


class Layout:
    """The axes of every value of a trace, after the walk."""

    def __init__(self, trace: Trace):
        self.axes: dict[Var, Axes] = {}
        self.bodies: dict[int, Body] = {}
        """Of every scan, by the identity of its equation."""
        for var in trace.params.values():
            self.axes[var] = tuple(atom(size) for size in var.aval.shape)
        for var in trace.args:
            self.axes[var] = tuple(atom(n, f"axis {i} of an argument of f") for i, n in enumerate(var.aval.shape))
        self._constants(trace.constants)
        self._walk(trace.equations)
        for x in trace.outputs:
            for i, axis in enumerate(self.read(x)):
                if axis is not None:
                    freeze(axis, f"axis {i} of an output of f")

    def read(self, x: Atom) -> Axes:
        """The axes of an operand."""
        return (None,) * len(x.aval.shape) if isinstance(x, jex.Literal) else self.axes[x]

    def _constants(self, constants: dict[Var, Any]) -> None:
        for var, value in constants.items():
            shape = tuple(var.aval.shape)
            same = varies_not(value)
            reason = f"a constant array of shape {list(shape)} that f closes over or computes from numbers"
            self.axes[var] = tuple(
                ONE if n == 1 else None if alike else atom(n, reason) for n, alike in zip(shape, same, strict=True)
            )

    def _walk(self, equations: Iterable[Equation]) -> None:
        for equation in equations:
            operands = [self.read(x) for x in equation.invars]
            try:
                results = self._rule(equation, operands)
            except Misfit:
                results = _opaque(equation, operands, "its axes are divided across each other by")
            for var, axes in zip(equation.outvars, results, strict=True):
                # Size one is known from the shape alone.
                self.axes[var] = tuple(ONE if n == 1 else axis for n, axis in zip(var.aval.shape, axes, strict=True))

    def _rule(self, equation: Equation, operands: list[Axes]) -> Sequence[Axes]:
        name, params = equation.primitive.name, equation.params
        if equation.effects:
            return _opaque(equation, operands, "side effects of")
        if name in POINTWISE or name in IDENTITIES:
            return [_elementwise(equation.outvars[0].aval.shape, operands)]
        if name in REDUCTIONS:
            return [tuple(x for i, x in enumerate(operands[0]) if i not in params["axes"])]
        if name in CUMULATIVE:
            return [_at(operands[0], params["axis"], _ordered(operands[0][params["axis"]], equation))]
        if name in WINDOWS:
            return _windows(equation, operands)
        rule = _RULES.get(name)
        if name == "scan":
            return self._scan(equation, operands)
        if rule is None:
            return _opaque(equation, operands, "not followed through")
        return rule(equation, operands)

    def _scan(self, equation: Equation, operands: list[Axes]) -> Sequence[Axes]:
        """The body is walked once: what it ties in one step is tied in all. The axis scanned over is frozen."""
        params = equation.params
        body = self.bodies[id(equation)] = flat_body(params["jaxpr"])
        inputs = body.inputs
        n_consts, n_carry = params["num_consts"], params["num_carry"]
        reason = _reason("scanned over by", equation)
        steps = atom(params["length"], reason)
        for axes in operands[n_consts + n_carry :]:
            _tie(axes[0], steps)
        # A carry that begins as a broadcast need not stay one.
        carry = [_concrete(x, axes) for x, axes in zip(inputs[n_consts:], operands[n_consts : n_consts + n_carry])]
        inner = [*operands[:n_consts], *carry, *(axes[1:] for axes in operands[n_consts + n_carry :])]
        self.axes.update(zip(inputs, inner, strict=True))
        self._constants(body.constants)
        self._walk(body.equations)
        results = [self.read(x) for x in body.outputs]
        for x, axes, after in zip(inputs[n_consts:], carry, results):
            _elementwise(x.aval.shape, [axes, after])
        return [*carry, *((steps, *axes) for axes in results[n_carry:])]


def varies_not(value: Any) -> tuple[bool, ...]:
    """For each axis of a constant, whether its elements are the same all along it; False where that is not known."""
    shape = np.shape(value)
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) or math.prod(shape) > _LOOKED_AT or 0 in shape:
        return (False,) * len(shape)
    array = np.asarray(value)
    return tuple(bool((array == array.take([0], axis=i)).all()) for i in range(array.ndim))


def _reason(what: str, equation: Equation) -> str:
    return f"{what} {equation.primitive.name} at {where_written(equation)}"


def _opaque(equation: Equation, operands: Iterable[Axes], what: str) -> list[Axes]:
    """Nothing is known but the shapes: all atoms are frozen."""
    reason = _reason(what, equation)
    for axes in operands:
        for axis in axes:
            if axis is not None:
                freeze(axis, reason)
    return [tuple(atom(n, reason) for n in x.aval.shape) for x in equation.outvars]


def _tie(a: Axis | None, b: Axis | None) -> Axis | None:
    """Makes two axes one unless one of them is a broadcast; the axis they are now. Frozen if that cannot be."""
    if a is None or b is None:
        return a if b is None else b
    unify(a, b)
    return a


def _elementwise(shape: Sequence[int], operands: Iterable[Axes]) -> Axes:
    """Axes of an operand are those of the result, or of size one, or the operand is a scalar."""
    result: list[Axis | None] = [None] * len(shape)
    for axes in operands:
        if axes:
            for i, axis in enumerate(axes):
                if axis is not ONE:
                    result[i] = _tie(result[i], axis)
    return tuple(result)


def _at(axes: Axes, i: int, axis: Axis | None) -> Axes:
    return (*axes[:i], axis, *axes[i + 1 :])


def _concrete(x: Var, axes: Axes) -> Axes:
    """Axes of a value of which none is a broadcast any more."""
    return tuple(atom(n) if axis is None else axis for n, axis in zip(x.aval.shape, axes, strict=True))


def _frozen(axis: Axis | None, reason: str) -> None:
    if axis is not None:
        freeze(axis, reason)


def _ordered(axis: Axis | None, equation: Equation) -> Axis | None:
    """The axis of a running sum: its own; a running sum of one repeated value tells positions apart."""
    if axis is None:
        return atom(
            equation.outvars[0].aval.shape[equation.params["axis"]], _reason("its positions are values of", equation)
        )
    return axis


def _broadcast_in_dim(equation: Equation, operands: list[Axes]) -> list[Axes]:
    source = dict(zip(equation.params["broadcast_dimensions"], operands[0]))
    return [
        tuple(axis if (axis := source.get(i, ONE)) is not ONE else None for i in range(equation.outvars[0].aval.ndim))
    ]


def _transpose(equation: Equation, operands: list[Axes]) -> list[Axes]:
    return [tuple(operands[0][i] for i in equation.params["permutation"])]


def _squeeze(equation: Equation, operands: list[Axes]) -> list[Axes]:
    return [tuple(x for i, x in enumerate(operands[0]) if i not in equation.params["dimensions"])]


def _reshape(equation: Equation, operands: list[Axes]) -> list[Axes]:
    if equation.params["dimensions"] is not None:
        return _opaque(equation, operands, "axes are permuted by")
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    result: list[Axis | None] = []
    for inputs, outputs in reshape_blocks(before, after):
        axes = [operands[0][i] for i in inputs if before[i] > 1]
        sizes = [after[i] for i in outputs]
        if all(x is None for x in axes):
            result += [ONE if n == 1 else None for n in sizes]
        else:
            known = [atom(before[i]) if operands[0][i] is None else operands[0][i] for i in inputs]
            result += regroup([x for x in known if x is not None], sizes)
    return [tuple(result)]


def reshape_blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes of two shapes of one size whose products agree; the axes of each run."""
    if 0 in before:
        return [(list(range(len(before))), list(range(len(after))))]
    blocks, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        inputs, outputs, left, right = [], [], 1, 1
        while True:
            if left <= right and i < len(before):
                left, i = left * before[i], i + 1
                inputs.append(i - 1)
            elif j < len(after):
                right, j = right * after[j], j + 1
                outputs.append(j - 1)
            else:
                left, i = left * before[i], i + 1
                inputs.append(i - 1)
            if left == right and ((inputs and outputs) or i == len(before) or j == len(after)):
                break
        blocks.append((inputs, outputs))
    return blocks


def _concatenate(equation: Equation, operands: list[Axes]) -> list[Axes]:
    dimension, shape = equation.params["dimension"], equation.outvars[0].aval.shape
    rest = _elementwise(shape, [_at(axes, dimension, None) for axes in operands])
    parts = [
        atom(x.aval.shape[dimension]) if a[dimension] is None else a[dimension]
        for x, a in zip(equation.invars, operands)
    ]
    return [_at(rest, dimension, concatenation([x for x in parts if x is not None]))]


def _pad(equation: Equation, operands: list[Axes]) -> list[Axes]:
    reason = _reason("a fixed width is added by", equation)
    result: list[Axis | None] = []
    for n, size, axis, (low, high, interior) in zip(
        equation.outvars[0].aval.shape, equation.invars[0].aval.shape, operands[0], equation.params["padding_config"]
    ):
        if (low, high, interior) == (0, 0, 0):
            result.append(axis)
        elif low < 0 or high < 0 or interior:
            _frozen(axis, reason)
            result.append(atom(n, reason))
        else:
            parts = [atom(low, reason), atom(size) if axis is None else axis, atom(high, reason)]
            result.append(concatenation(x for x in parts if x.size))
    return [tuple(result)]


def _piece(axis: Axis | None, start: int, stop: int, size: int) -> Axis | None:
    """Indices start to stop of an axis of `size`."""
    if axis is None or stop - start == size:
        return axis
    if stop == start:
        return atom(0)
    if start:
        _, axis = cut(axis, start)
    if stop < size:
        axis, _ = cut(axis, stop - start)
    return axis


def _slice(equation: Equation, operands: list[Axes]) -> list[Axes]:
    params, shape = equation.params, equation.invars[0].aval.shape
    result: list[Axis | None] = []
    for i, (axis, start, stop) in enumerate(zip(operands[0], params["start_indices"], params["limit_indices"])):
        if params["strides"] is not None and params["strides"][i] != 1:
            reason = _reason("every n-th index is taken by", equation)
            _frozen(axis, reason)
            result.append(None if axis is None else atom(equation.outvars[0].aval.shape[i], reason))
        else:
            result.append(_piece(axis, start, stop, shape[i]))
    return [tuple(result)]


def _split(equation: Equation, operands: list[Axes]) -> list[Axes]:
    at, size = equation.params["axis"], equation.invars[0].aval.shape[equation.params["axis"]]
    results, start = [], 0
    for n in equation.params["sizes"]:
        results.append(_at(operands[0], at, _piece(operands[0][at], start, start + n, size)))
        start += n
    return results


def _rev(equation: Equation, operands: list[Axes]) -> list[Axes]:
    for i in equation.params["dimensions"]:
        _frozen(operands[0][i], _reason("its order is reversed by", equation))
    return [operands[0]]


def _iota(equation: Equation, operands: list[Axes]) -> list[Axes]:
    del operands
    shape, at = equation.outvars[0].aval.shape, equation.params["dimension"]
    return [_at((None,) * len(shape), at, atom(shape[at], _reason("its positions are values of", equation)))]


def _dot_general(equation: Equation, operands: list[Axes]) -> list[Axes]:
    (contract, batch), (left, right) = equation.params["dimension_numbers"], operands[:2]
    for i, j in zip(*contract, strict=True):
        _tie(left[i], right[j])
    both = tuple(_tie(left[i], right[j]) for i, j in zip(*batch, strict=True))
    free = [
        tuple(x for i, x in enumerate(axes) if i not in contract[side] and i not in batch[side])
        for side, axes in enumerate((left, right))
    ]
    return [(*both, *free[0], *free[1])]


def _gather(equation: Equation, operands: list[Axes]) -> list[Axes]:
    """Axes taken whole follow; indexed ones are frozen; the indices' own axes come in between, in their order."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    (source, indices), shape = operands, equation.invars[0].aval.shape
    reason = _reason("indexed by", equation)
    offsets: list[Axis | None] = []
    for i, axis in enumerate(source):
        if i in numbers.operand_batching_dims:
            _tie(axis, indices[numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(i)]])
        elif i in numbers.collapsed_slice_dims or sizes[i] < shape[i]:
            _frozen(axis, reason)
            if i not in numbers.collapsed_slice_dims:
                offsets.append(atom(sizes[i], reason))
        else:
            offsets.append(axis)
    rows, follow = iter(indices[:-1]), iter(offsets)
    return [
        tuple(next(follow) if i in numbers.offset_dims else next(rows) for i in range(equation.outvars[0].aval.ndim))
    ]


def _dynamic_slice(equation: Equation, operands: list[Axes]) -> list[Axes]:
    reason = _reason("indexed by", equation)
    result = []
    for axis, n, size in zip(operands[0], equation.outvars[0].aval.shape, equation.invars[0].aval.shape):
        if n != size:
            _frozen(axis, reason)
        result.append(axis if n == size or axis is None else atom(n, reason))
    return [tuple(result)]


def _dynamic_update_slice(equation: Equation, operands: list[Axes]) -> list[Axes]:
    reason = _reason("indexed by", equation)
    result: list[Axis | None] = []
    for old, new, n, size in zip(*operands[:2], equation.invars[1].aval.shape, equation.invars[0].aval.shape):
        if n == size:
            result.append(_tie(old, new))
        else:
            _frozen(old, reason)
            _frozen(new, reason)
            result.append(atom(size, reason) if old is None else old)
    return [tuple(result)]


def _arg(equation: Equation, operands: list[Axes]) -> list[Axes]:
    for i in equation.params["axes"]:
        _frozen(operands[0][i], _reason("its positions are values of", equation))
    return [tuple(x for i, x in enumerate(operands[0]) if i not in equation.params["axes"])]


def _sort(equation: Equation, operands: list[Axes]) -> list[Axes]:
    at, shape = equation.params["dimension"], equation.outvars[0].aval.shape
    reason = _reason("its order is changed by", equation)
    axes = _elementwise(shape, operands)
    _frozen(axes[at], reason)
    return [_at(axes, at, atom(shape[at], reason) if axes[at] is None else axes[at])] * len(equation.outvars)


def _top_k(equation: Equation, operands: list[Axes]) -> list[Axes]:
    at = equation.params.get("axis", -1) % len(operands[0])
    reason = _reason("its order is changed by", equation)
    _frozen(operands[0][at], reason)
    return [_at(operands[0], at, atom(x.aval.shape[at], reason)) for x in equation.outvars]


def _convolution(equation: Equation, operands: list[Axes]) -> list[Axes]:
    """Features of a group go together; axes of the image and of the window are frozen."""
    params = equation.params
    if params["batch_group_count"] != 1:
        return _opaque(equation, operands, "not followed through")
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    image, kernel = (_concrete(x, axes) for x, axes in zip(equation.invars, operands))
    reason = _reason("an axis of the image or the window of", equation)
    for axes, spec in ((image, numbers.lhs_spec), (kernel, numbers.rhs_spec)):
        for i in spec[2:]:
            _frozen(axes[i], reason)
    batch, features = (image[i] for i in numbers.lhs_spec[:2])
    outputs, inputs = (kernel[i] for i in numbers.rhs_spec[:2])
    assert features is not None and outputs is not None and inputs is not None  # made concrete above
    together, each = regroup([features], [groups, features.size // groups])
    unify(each, inputs)
    unify(together, regroup([outputs], [groups, outputs.size // groups])[0])
    shape = equation.outvars[0].aval.shape
    result: list[Axis | None] = [atom(n, reason) for n in shape]
    result[numbers.out_spec[0]], result[numbers.out_spec[1]] = batch, outputs
    return [tuple(result)]


def _windows(equation: Equation, operands: list[Axes]) -> list[Axes]:
    params, result = equation.params, []
    reason = _reason("an axis of the image or the window of", equation)
    for i, (axis, n) in enumerate(zip(operands[0], equation.outvars[0].aval.shape)):
        if untouched(params, i):
            result.append(axis)
        else:
            _frozen(axis, reason)
            result.append(atom(n, reason))
    return [tuple(result)]


def untouched(params: dict[str, Any], i: int) -> bool:
    """Whether a windowed reduction treats each index of axis i by itself."""
    single = params["window_dimensions"][i] == params["window_strides"][i] == 1
    dilations = [params[k][i] for k in ("base_dilation", "window_dilation") if params.get(k) is not None]
    return single and tuple(params["padding"][i]) == (0, 0) and all(d == 1 for d in dilations)


_RULES = {
    "broadcast_in_dim": _broadcast_in_dim,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "concatenate": _concatenate,
    "pad": _pad,
    "slice": _slice,
    "split": _split,
    "rev": _rev,
    "iota": _iota,
    "dot_general": _dot_general,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "argmax": _arg,
    "argmin": _arg,
    "sort": _sort,
    "top_k": _top_k,
    "conv_general_dilated": _convolution,
}

"""What each primitive does to the axes of its operands.

A rule makes axes equal, regroups them or cuts them (`jprune.trace.coupling.atoms`), and freezes the atoms for which the
equation tells one index from another by its position. It returns the axes of the results; None is an axis along which
all elements are the same.
"""

from collections.abc import Sequence
from typing import Any

from jprune.trace.coupling import rearranged
from jprune.trace.coupling.atoms import Axis, atom, regroup, unify
from jprune.trace.coupling.elementwise import POINTWISE
from jprune.trace.coupling.ties import Axes, concrete, elementwise, freeze_known, opaque, reason, replaced, tie
from jprune.trace.jaxpr import IDENTITIES, Equation

REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"}
CUMULATIVE = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"}
WINDOWS = {"reduce_window_sum", "reduce_window_max", "reduce_window_min"}


def follow(equation: Equation, operands: list[Axes]) -> Sequence[Axes]:
    """The axes of an equation's results; what cannot be followed is frozen.

    Raises:
      Misfit: the equation divides an axis in another way than it is divided already.
    """
    name, params = equation.primitive.name, equation.params
    if equation.effects:
        return opaque(equation, operands, "side effects of")
    if name in POINTWISE or name in IDENTITIES:
        return [elementwise(equation.outvars[0].aval.shape, operands)]
    if name in REDUCTIONS:
        return [tuple(x for i, x in enumerate(operands[0]) if i not in params["axes"])]
    if name in CUMULATIVE:
        return [replaced(operands[0], params["axis"], _ordered(operands[0][params["axis"]], equation))]
    if name in WINDOWS:
        return _windows(equation, operands)
    if name not in _RULES:
        return opaque(equation, operands, "not followed through")
    return _RULES[name](equation, operands)


def _ordered(axis: Axis | None, equation: Equation) -> Axis | None:
    """The axis of a running sum: its own; a running sum of one repeated value tells positions apart."""
    if axis is None:
        return atom(
            equation.outvars[0].aval.shape[equation.params["axis"]], reason("its positions are values of", equation)
        )
    return axis


def _iota(equation: Equation, operands: list[Axes]) -> list[Axes]:
    del operands
    shape, at = equation.outvars[0].aval.shape, equation.params["dimension"]
    return [replaced((None,) * len(shape), at, atom(shape[at], reason("its positions are values of", equation)))]


def _dot_general(equation: Equation, operands: list[Axes]) -> list[Axes]:
    (contract, batch), (left, right) = equation.params["dimension_numbers"], operands[:2]
    for i, j in zip(*contract, strict=True):
        tie(left[i], right[j])
    both = tuple(tie(left[i], right[j]) for i, j in zip(*batch, strict=True))
    free = [
        tuple(x for i, x in enumerate(axes) if i not in contract[side] and i not in batch[side])
        for side, axes in enumerate((left, right))
    ]
    return [(*both, *free[0], *free[1])]


def _gather(equation: Equation, operands: list[Axes]) -> list[Axes]:
    """Axes taken whole follow; indexed ones are frozen; the indices' own axes come in between, in their order."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    (source, indices), shape = operands, equation.invars[0].aval.shape
    why = reason("indexed by", equation)
    offsets: list[Axis | None] = []
    for i, axis in enumerate(source):
        if i in numbers.operand_batching_dims:
            tie(axis, indices[numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(i)]])
        elif i in numbers.collapsed_slice_dims or sizes[i] < shape[i]:
            freeze_known(axis, why)
            if i not in numbers.collapsed_slice_dims:
                offsets.append(atom(sizes[i], why))
        else:
            offsets.append(axis)
    rows, follow = iter(indices[:-1]), iter(offsets)
    return [
        tuple(next(follow) if i in numbers.offset_dims else next(rows) for i in range(equation.outvars[0].aval.ndim))
    ]


def _dynamic_slice(equation: Equation, operands: list[Axes]) -> list[Axes]:
    why = reason("indexed by", equation)
    result = []
    for axis, n, size in zip(operands[0], equation.outvars[0].aval.shape, equation.invars[0].aval.shape):
        if n != size:
            freeze_known(axis, why)
        result.append(axis if n == size or axis is None else atom(n, why))
    return [tuple(result)]


def _dynamic_update_slice(equation: Equation, operands: list[Axes]) -> list[Axes]:
    why = reason("indexed by", equation)
    result: list[Axis | None] = []
    for old, new, n, size in zip(*operands[:2], equation.invars[1].aval.shape, equation.invars[0].aval.shape):
        if n == size:
            result.append(tie(old, new))
        else:
            freeze_known(old, why)
            freeze_known(new, why)
            result.append(atom(size, why) if old is None else old)
    return [tuple(result)]


def _arg(equation: Equation, operands: list[Axes]) -> list[Axes]:
    for i in equation.params["axes"]:
        freeze_known(operands[0][i], reason("its positions are values of", equation))
    return [tuple(x for i, x in enumerate(operands[0]) if i not in equation.params["axes"])]


def _sort(equation: Equation, operands: list[Axes]) -> list[Axes]:
    at, shape = equation.params["dimension"], equation.outvars[0].aval.shape
    why = reason("its order is changed by", equation)
    axes = elementwise(shape, operands)
    freeze_known(axes[at], why)
    return [replaced(axes, at, atom(shape[at], why) if axes[at] is None else axes[at])] * len(equation.outvars)


def _top_k(equation: Equation, operands: list[Axes]) -> list[Axes]:
    at = equation.params.get("axis", -1) % len(operands[0])
    why = reason("its order is changed by", equation)
    freeze_known(operands[0][at], why)
    return [replaced(operands[0], at, atom(x.aval.shape[at], why)) for x in equation.outvars]


def _convolution(equation: Equation, operands: list[Axes]) -> list[Axes]:
    """Features of a group go together; axes of the image and of the window are frozen."""
    params = equation.params
    if params["batch_group_count"] != 1:
        return opaque(equation, operands, "not followed through")
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    image, kernel = (concrete(x, axes) for x, axes in zip(equation.invars, operands))
    why = reason("an axis of the image or the window of", equation)
    for axes, spec in ((image, numbers.lhs_spec), (kernel, numbers.rhs_spec)):
        for i in spec[2:]:
            freeze_known(axes[i], why)
    batch, features = (image[i] for i in numbers.lhs_spec[:2])
    outputs, inputs = (kernel[i] for i in numbers.rhs_spec[:2])
    together, each = regroup([features], [groups, features.size // groups])
    unify(each, inputs)
    unify(together, regroup([outputs], [groups, outputs.size // groups])[0])
    shape = equation.outvars[0].aval.shape
    result: list[Axis | None] = [atom(n, why) for n in shape]
    result[numbers.out_spec[0]], result[numbers.out_spec[1]] = batch, outputs
    return [tuple(result)]


def _windows(equation: Equation, operands: list[Axes]) -> list[Axes]:
    params, result = equation.params, []
    why = reason("an axis of the image or the window of", equation)
    for i, (axis, n) in enumerate(zip(operands[0], equation.outvars[0].aval.shape)):
        if untouched(params, i):
            result.append(axis)
        else:
            freeze_known(axis, why)
            result.append(atom(n, why))
    return [tuple(result)]


def untouched(params: dict[str, Any], i: int) -> bool:
    """Whether a windowed reduction treats each index of axis i by itself."""
    single = params["window_dimensions"][i] == params["window_strides"][i] == 1
    dilations = [params[k][i] for k in ("base_dilation", "window_dilation") if params.get(k) is not None]
    return single and tuple(params["padding"][i]) == (0, 0) and all(d == 1 for d in dilations)


_RULES = {
    **rearranged.RULES,
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

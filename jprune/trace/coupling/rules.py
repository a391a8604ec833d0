"""What each primitive does to the axes of its operands.

A rule makes axes equal, regroups them or cuts them (`jprune.trace.coupling.atoms`), and freezes the atoms for which the
equation tells one index from another by its position. It returns the axes of the results; None is an axis along which
all elements are the same.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from jprune.trace.coupling.atoms import ONE, Axis, atom, concatenation, cut, freeze, product, regroup, unify
from jprune.trace.coupling.elementwise import POINTWISE
from jprune.trace.jaxpr import IDENTITIES, Equation, Var, where_written

Axes = tuple[Axis | None, ...]

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
        return [_at(operands[0], params["axis"], _ordered(operands[0][params["axis"]], equation))]
    if name in WINDOWS:
        return _windows(equation, operands)
    if name not in _RULES:
        return opaque(equation, operands, "not followed through")
    return _RULES[name](equation, operands)


def reason(what: str, equation: Equation) -> str:
    """Why an atom is frozen, with the source line."""
    return f"{what} {equation.primitive.name} at {where_written(equation)}"


def opaque(equation: Equation, operands: Iterable[Axes], what: str) -> list[Axes]:
    """Nothing is known but the shapes: all atoms are frozen."""
    why = reason(what, equation)
    for axes in operands:
        for axis in axes:
            if axis is not None:
                freeze(axis, why)
    return [tuple(atom(n, why) for n in x.aval.shape) for x in equation.outvars]


def tie(a: Axis | None, b: Axis | None) -> Axis | None:
    """Makes two axes one unless one of them is a broadcast; the axis they are now. Frozen if that cannot be."""
    if a is None or b is None:
        return a if b is None else b
    unify(a, b)
    return a


def elementwise(shape: Sequence[int], operands: Iterable[Axes]) -> Axes:
    """Axes of an operand are those of the result, or of size one, or the operand is a scalar."""
    result: list[Axis | None] = [None] * len(shape)
    for axes in operands:
        if axes:
            for i, axis in enumerate(axes):
                if axis is not ONE:
                    result[i] = tie(result[i], axis)
    return tuple(result)


def _at(axes: Axes, i: int, axis: Axis | None) -> Axes:
    return (*axes[:i], axis, *axes[i + 1 :])


def concrete(x: Var, axes: Axes) -> tuple[Axis, ...]:
    """Axes of a value of which none is a broadcast any more."""
    return tuple(atom(n) if axis is None else axis for n, axis in zip(x.aval.shape, axes, strict=True))


def _frozen(axis: Axis | None, why: str) -> None:
    if axis is not None:
        freeze(axis, why)


def _ordered(axis: Axis | None, equation: Equation) -> Axis | None:
    """The axis of a running sum: its own; a running sum of one repeated value tells positions apart."""
    if axis is None:
        return atom(
            equation.outvars[0].aval.shape[equation.params["axis"]], reason("its positions are values of", equation)
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
        return opaque(equation, operands, "axes are permuted by")
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
    rest = elementwise(shape, [_at(axes, dimension, None) for axes in operands])
    parts = [
        atom(x.aval.shape[dimension]) if a[dimension] is None else a[dimension]
        for x, a in zip(equation.invars, operands)
    ]
    return [_at(rest, dimension, concatenation([x for x in parts if x is not None]))]


def _stack(equation: Equation, operands: list[Axes]) -> list[Axes]:
    """The new axis has one unit for each operand, and f tells them apart."""
    at, shape = equation.params["axis"], equation.outvars[0].aval.shape
    rest = elementwise([n for i, n in enumerate(shape) if i != at], operands)
    return [(*rest[:at], concatenation([ONE] * len(operands)), *rest[at:])]


def _unstack(equation: Equation, operands: list[Axes]) -> list[Axes]:
    at = equation.params["axis"]
    _frozen(operands[0][at], reason("its units are told apart by", equation))
    return [tuple(x for i, x in enumerate(operands[0]) if i != at)] * len(equation.outvars)


def _tile(equation: Equation, operands: list[Axes]) -> list[Axes]:
    return [
        tuple(
            axis if axis is None else product([atom(n), axis]) for axis, n in zip(operands[0], equation.params["reps"])
        )
    ]


def _pad(equation: Equation, operands: list[Axes]) -> list[Axes]:
    why = reason("a fixed width is added by", equation)
    result: list[Axis | None] = []
    for n, size, axis, widths in zip(
        equation.outvars[0].aval.shape, equation.invars[0].aval.shape, operands[0], equation.params["padding_config"]
    ):
        low, high, interior = map(int, widths)
        if (low, high, interior) == (0, 0, 0):
            result.append(axis)
        elif low < 0 or high < 0 or interior:
            _frozen(axis, why)
            result.append(atom(n, why))
        else:
            parts = [atom(low, why), atom(size) if axis is None else axis, atom(high, why)]
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
            why = reason("every n-th index is taken by", equation)
            _frozen(axis, why)
            result.append(None if axis is None else atom(equation.outvars[0].aval.shape[i], why))
        else:
            result.append(_piece(axis, start, stop, shape[i]))
    return [tuple(result)]


def _split(equation: Equation, operands: list[Axes]) -> list[Axes]:
    """Parts of one size are tied: who splits into n equal parts wants n equal parts of the smaller array too."""
    at, size = equation.params["axis"], equation.invars[0].aval.shape[equation.params["axis"]]
    sizes = [int(n) for n in equation.params["sizes"]]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [_piece(operands[0][at], start, start + n, size) for start, n in zip(starts, sizes)]
    if len(set(sizes)) == 1:
        for piece in pieces[1:]:
            tie(pieces[0], piece)
    return [_at(operands[0], at, piece) for piece in pieces]


def _rev(equation: Equation, operands: list[Axes]) -> list[Axes]:
    for i in equation.params["dimensions"]:
        _frozen(operands[0][i], reason("its order is reversed by", equation))
    return [operands[0]]


def _iota(equation: Equation, operands: list[Axes]) -> list[Axes]:
    del operands
    shape, at = equation.outvars[0].aval.shape, equation.params["dimension"]
    return [_at((None,) * len(shape), at, atom(shape[at], reason("its positions are values of", equation)))]


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
            _frozen(axis, why)
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
            _frozen(axis, why)
        result.append(axis if n == size or axis is None else atom(n, why))
    return [tuple(result)]


def _dynamic_update_slice(equation: Equation, operands: list[Axes]) -> list[Axes]:
    why = reason("indexed by", equation)
    result: list[Axis | None] = []
    for old, new, n, size in zip(*operands[:2], equation.invars[1].aval.shape, equation.invars[0].aval.shape):
        if n == size:
            result.append(tie(old, new))
        else:
            _frozen(old, why)
            _frozen(new, why)
            result.append(atom(size, why) if old is None else old)
    return [tuple(result)]


def _arg(equation: Equation, operands: list[Axes]) -> list[Axes]:
    for i in equation.params["axes"]:
        _frozen(operands[0][i], reason("its positions are values of", equation))
    return [tuple(x for i, x in enumerate(operands[0]) if i not in equation.params["axes"])]


def _sort(equation: Equation, operands: list[Axes]) -> list[Axes]:
    at, shape = equation.params["dimension"], equation.outvars[0].aval.shape
    why = reason("its order is changed by", equation)
    axes = elementwise(shape, operands)
    _frozen(axes[at], why)
    return [_at(axes, at, atom(shape[at], why) if axes[at] is None else axes[at])] * len(equation.outvars)


def _top_k(equation: Equation, operands: list[Axes]) -> list[Axes]:
    at = equation.params.get("axis", -1) % len(operands[0])
    why = reason("its order is changed by", equation)
    _frozen(operands[0][at], why)
    return [_at(operands[0], at, atom(x.aval.shape[at], why)) for x in equation.outvars]


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
            _frozen(axes[i], why)
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
            _frozen(axis, why)
            result.append(atom(n, why))
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
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
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

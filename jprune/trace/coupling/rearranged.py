"""Rules of the primitives that compute nothing: they move, regroup, cut and join axes."""

from collections.abc import Sequence

from jprune.trace.coupling.atoms import ONE, Axis, atom, concatenation, cut, product, regroup
from jprune.trace.coupling.ties import Axes, elementwise, freeze_known, opaque, reason, replaced, tie
from jprune.trace.jaxpr import Equation


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
    rest = elementwise(shape, [replaced(axes, dimension, None) for axes in operands])
    parts = [
        atom(x.aval.shape[dimension]) if a[dimension] is None else a[dimension]
        for x, a in zip(equation.invars, operands)
    ]
    return [replaced(rest, dimension, concatenation([x for x in parts if x is not None]))]


def _stack(equation: Equation, operands: list[Axes]) -> list[Axes]:
    """The new axis has one unit for each operand, and f tells them apart."""
    at, shape = equation.params["axis"], equation.outvars[0].aval.shape
    rest = elementwise([n for i, n in enumerate(shape) if i != at], operands)
    return [(*rest[:at], concatenation([ONE] * len(operands)), *rest[at:])]


def _unstack(equation: Equation, operands: list[Axes]) -> list[Axes]:
    at = equation.params["axis"]
    freeze_known(operands[0][at], reason("its units are told apart by", equation))
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
            freeze_known(axis, why)
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
            freeze_known(axis, why)
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
    return [replaced(operands[0], at, piece) for piece in pieces]


def _rev(equation: Equation, operands: list[Axes]) -> list[Axes]:
    for i in equation.params["dimensions"]:
        freeze_known(operands[0][i], reason("its order is reversed by", equation))
    return [operands[0]]


RULES = {
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
}
"""By the primitive's name."""

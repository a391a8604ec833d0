"""Products of a value with a kernel: where the kernel lies in its leaf, and what it reads.

Followed are `dot_general`, convolutions (of the patches below the filter), `ragged_dot` and `jprune.sorted_rows.dot`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jprune.places import Place
from jprune.trace.inputs import Input, Patches, Pick, Rows
from jprune.trace.jaxpr import Equation, Var
from jprune.trace.kernels import View
from jprune.trace.views import COPIES, Axes, Digit, join, regroup, whole

LOOKED_UP = "it is looked up in, row by row"
"""What `product` says of rows that an index picks and that are no kernels, as those of an embedding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A product of a value with a kernel."""

    leaf: tuple[int, ...]
    """Shape of the part of the leaf."""
    place: Place
    input: Input
    scanned: tuple[tuple[int, tuple[Digit, ...]], ...]
    """As of its view."""
    stack: tuple[Digit, ...]
    """Digits of the part that number a stack of kernels, in the order in which statistics have them; scans first."""
    side: int
    """Which operand the kernel is."""
    axes: Axes
    """As of its view."""
    plain: bool
    """Whether it is a `dot_general` of a whole leaf that is no stack."""

    @property
    def ndim(self) -> int:
        """How many axes the leaf has."""
        return len(self.leaf)


def product(equation: Equation, side: int, view: View, known: Any) -> Product | str:
    """The product of a value with the kernel that operand `side` is a view of, or why it is none.

    Args:
      equation: of a primitive in `MATMULS`.
      side: 0 or 1.
      view: of that operand.
      known: (value) -> what it is a view of and its axes, so that equal inputs are seen to be equal.
    """
    match equation.primitive.name:
        case "dot_general":
            return _dot(equation, side, view, known)
        case "conv_general_dilated":
            return _convolution(equation, side, view)
        case "ragged_dot" | "ragged_dot_general":
            return _ragged(equation, side, view)
        case "sorted_dot":
            return _sorted(equation, side, view)
    return f"{equation.primitive.name} is not followed"


def _dot(equation: Equation, side: int, view: View, known: Any) -> Product | str:
    contracted, batch = equation.params["dimension_numbers"]
    ours, theirs, axes = contracted[side], contracted[1 - side], view.axes
    rows = [d for i in ours for d in axes[i] if d.axis >= 0]
    summed = [d for i in ours for d in axes[i] if d.axis < 0]
    if any(d.axis == COPIES for d in summed):
        return "it sums over copies of the kernel"
    if not ours:
        return "it sums over no axis of the parameter"
    along = [d for i in batch[side] for d in axes[i]]
    free = [d for i, digits in enumerate(axes) if i not in (*ours, *batch[side]) for d in digits]
    if view.picked is not None and not any(d.axis >= 0 for d in free):
        return LOOKED_UP
    if not rows and not any(n == 1 for n in _sizes(view.part)):
        return "it sums over no axis of the parameter"
    stacked = [d for d in along if d.axis >= 0]
    operand = equation.invars[1 - side]
    pairs = list(zip([*theirs, *batch[1 - side]], [axes[i] for i in (*ours, *batch[side])]))
    met = _met(pairs, *known(operand)) if view.picked is None else None
    value = known(operand)[0] if met is not None else operand
    met = _met(pairs, operand, whole(operand.aval.shape)) if met is None else met
    if met is None:
        return "its axes cut across those of what it is multiplied with"
    columns = _ordered([(d, m) for d, m in met if d.axis >= 0 and d in rows])
    numbers = _ordered([(d, m) for d, m in met if d.axis >= 0 and d in stacked])
    if view.picked is None:
        read = Input(value=value, columns=columns, batch=numbers)
    else:
        index = tuple((-1 - d.axis, m) for d, m in met if COPIES < d.axis < 0)
        if any(len(m) != 1 or m[0].size != view.picked.shape[axis] for axis, m in index):
            return "its index is reshaped across the axes of what it is multiplied with"
        read = Input(
            value=value,
            columns=columns,
            batch=numbers,
            rows=Pick(
                index=view.picked.index,
                shape=view.picked.shape,
                count=math.prod(d.size for d in view.picked.digits),
                clipped=view.picked.clipped,
                met=tuple((axis, m[0]) for axis, m in index),
                summed=tuple(m[0] for axis, m in index if any(-1 - d.axis == axis for d in summed)),
            ),
        )
    return _finished(view, rows, stacked, read, side, dot=True)


def _met(
    pairs: Sequence[tuple[int, Sequence[Digit]]], value: Var, axes: Axes
) -> list[tuple[Digit, tuple[Digit, ...]]] | None:
    """Each digit of a kernel's axes beside the digits of `value` that it meets; None if they cut across."""
    found = []
    for dim, digits in pairs:
        split = regroup(axes[dim], [d.size for d in digits])
        if split is None:
            return None
        found += list(zip(digits, split))
    return found


def _ordered(pairs: Sequence[tuple[Digit, Any]]) -> tuple[Digit, ...]:
    """The digits met, in the order of the leaf."""
    return join(d for _, other in sorted(pairs, key=lambda pair: (pair[0].axis, -pair[0].stride)) for d in other)


def _convolution(equation: Equation, side: int, view: View) -> Product | str:
    params = equation.params
    if side != 1 or params["batch_group_count"] != 1 or view.picked is not None:
        return "a convolution in which it is not the filter"
    out, *inner = params["dimension_numbers"].rhs_spec
    groups = params["feature_group_count"]
    rows = [d for i in inner for d in view.axes[i]]
    split = regroup(view.axes[out], [groups, equation.invars[1].aval.shape[out] // groups])
    if split is None or any(d.axis < 0 for d in (*rows, *split[0], *split[1])):
        return "a convolution whose groups cut across its axes"
    # The patches are [groups, tokens, inputs of a group ..., filter ...]: axes from 2 on are those of `inner`.
    pairs = [(d, (m,)) for i, dim in enumerate(inner, 2) for d, m in zip(view.axes[dim], _split(i, view.axes[dim]))]
    filters = tuple(equation.invars[1].aval.shape[i] for i in inner)
    patches = Patches(
        groups=groups,
        filters=filters,
        options=tuple((k, params[k]) for k in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")),
        numbers=params["dimension_numbers"],
    )
    batch = (Digit(0, groups, 1),) if groups > 1 else ()
    read = Input(value=equation.invars[0], columns=_ordered(pairs), batch=batch, patches=patches)
    return _finished(view, rows, list(split[0]), read, side)


def _split(axis: int, digits: Sequence[Digit]) -> list[Digit]:
    """The digits of an axis that is numbered as `digits` number one of the leaf."""
    strides = [math.prod(d.size for d in digits[i + 1 :]) for i in range(len(digits))]
    return [Digit(axis, d.size, stride) for d, stride in zip(digits, strides)]


def _ragged(equation: Equation, side: int, view: View) -> Product | str:
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, batch) = numbers.dot_dimension_numbers
    groups = list(numbers.rhs_group_dimensions)
    if side != 1 or any(batch) or len(groups) != 1 or view.picked is not None or len(contracted[1]) != 1:
        return "a ragged product of another form than [rows, inputs] with [groups, inputs, outputs]"
    if list(numbers.lhs_ragged_dimensions) == list(contracted[0]) or equation.params.get("group_offset") is not None:
        return "a ragged product of another form than [rows, inputs] with [groups, inputs, outputs]"
    return _sorted(equation, side, view, group=groups[0], inputs=contracted[1][0], features=contracted[0][0])


def _sorted(
    equation: Equation, side: int, view: View, *, group: int = 0, inputs: int = 1, features: int = 1
) -> Product | str:
    """Of rows sorted by their kernel: which axes of the stack number kernels and inputs, which of the rows features."""
    if side != 1 or view.picked is not None:
        return "a product of sorted rows in which it is not the stack"
    rows, stacked = list(view.axes[inputs]), list(view.axes[group])
    if any(d.axis < 0 for d in (*rows, *stacked)):
        return "a ragged product with copies of it"
    columns = _split(features, rows)
    read = Input(
        value=equation.invars[0],
        columns=_ordered([(d, (m,)) for d, m in zip(rows, columns)]),
        rows=Rows(sizes=equation.invars[2], count=math.prod(d.size for d in stacked)),
    )
    return _finished(view, rows, stacked, read, side)


def _sizes(part: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in part)


def _finished(
    view: View, rows: Sequence[Digit], stacked: Sequence[Digit], read: Input, side: int, *, dot: bool = False
) -> Product | str:
    """The product, with the place of its kernel: whole axes of the leaf where they are of one kind each."""
    sizes = _sizes(view.part)
    scans = [d for _, digits in view.scanned for d in digits]
    picks = list(view.picked.digits) if view.picked else []
    numbers = [*scans, *picks, *sorted(stacked, key=lambda d: (d.axis, -d.stride))]
    kinds = {**dict.fromkeys(numbers, "stack"), **dict.fromkeys(rows, "in")}
    cuts: list[tuple[Digit, str]] = []
    for axis, size in enumerate(sizes):
        stride = 1
        for digit in sorted((d for d in kinds if d.axis == axis and d.size > 1), key=lambda d: d.stride):
            if digit.stride > stride:
                cuts.append((Digit(axis, digit.stride // stride, stride), "out"))
            elif digit.stride < stride:
                return "two of its axes overlap"
            cuts.append((digit, kinds[digit]))
            stride = digit.stride * digit.size
        if size > stride or size == 1:
            cuts.append((Digit(axis, size // stride, stride), "out"))
    cuts.sort(key=lambda cut: (cut[0].axis, -cut[0].stride))
    by_axis = [{kind for d, kind in cuts if d.axis == axis} for axis in range(len(sizes))]
    if all(len(kinds) <= 1 for kinds in by_axis):
        shape, of = None, [next(iter(kinds), "out") for kinds in by_axis]
    else:
        shape, of = tuple(d.size for d, _ in cuts), [kind for _, kind in cuts]
    in_axes = tuple(i for i, kind in enumerate(of) if kind == "in")
    if not in_axes:  # a reshape loses sight of axes of size one; a matmul has at least one input axis
        ones = [i for i, n in enumerate(shape or sizes) if n == 1 and of[i] == "out"]
        if not ones:
            return "it sums over no axis of the parameter"
        in_axes = (ones[0],)
    batch_axes = tuple(i for i, kind in enumerate(of) if kind == "stack")
    return Product(
        leaf=sizes,
        place=Place(path=view.path, in_axes=in_axes, batch_axes=batch_axes, part=view.part, shape=shape),
        input=read,
        scanned=view.scanned,
        stack=tuple(numbers),
        side=side,
        axes=view.axes,
        plain=dot and not numbers and shape is None and not any(d.axis < 0 for i in view.axes for d in i),
    )

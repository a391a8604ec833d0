"""Kernels as a program sees them: views of parameter leaves.

A view says which leaf, which part of it, and what each of its axes is made of. Where an index that is only known when
the program runs picks from an axis (experts by a gather, a layer by its number), or a scan goes along one, the view
says that too: these axes number a stack of kernels, of which each sees only its own tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as jex

from jprune.trace.jaxpr import CASTS, Equation, Var
from jprune.trace.views import COPIES, Axes, Digit, follow, restrict, whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picked:
    """An index of an axis, known when the program runs."""

    digits: tuple[Digit, ...]
    """Of the leaf: what the index numbers."""
    index: Var
    shape: tuple[int, ...]
    """Axes of the index: digits of axis -1 - i run along axis i."""
    clipped: bool
    """Whether an index beyond the axis picks its first or last row; else it picks none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """A value that is made of the elements of a leaf, in another layout."""

    path: str
    part: tuple[tuple[int, int], ...]
    """Start and stop along every axis of the leaf."""
    axes: Axes
    """Digits of the part (and copies, and indices) that number each axis."""
    picked: Picked | None = None
    scanned: tuple[tuple[int, tuple[Digit, ...]], ...] = ()
    """By the depth of a scan, the digits that it goes along."""


def of_leaf(path: str, shape: Sequence[int]) -> View:
    """A leaf as the view of itself."""
    return View(path=path, part=tuple((0, n) for n in shape), axes=whole(shape))


def views(equation: Equation, view: View, constant: Any) -> list[View | str]:
    """What the results of an equation are of its first operand: views of the same leaf, or why not.

    Args:
      equation: with one result, or a split.
      view: of its first operand.
      constant: (atom) -> its value as an integer if it is known, else None.
    """
    name = equation.primitive.name
    if name == "slice":
        strides = equation.params["strides"]
        if strides is not None and any(s != 1 for s in strides):
            return ["a slice with strides"]
        return [_cut(view, list(zip(equation.params["start_indices"], equation.params["limit_indices"])))]
    if name == "split":
        axis, start, found = equation.params["axis"], 0, []
        shape = equation.invars[0].aval.shape
        for size in map(int, equation.params["sizes"]):
            cuts = [(0, n) for n in shape]
            cuts[axis] = (start, start + size)
            found.append(_cut(view, cuts))
            start += size
        return found
    if name == "dynamic_slice":
        return [_dynamic_slice(equation, view, constant)]
    if name == "gather":
        return [_gather(equation, view)]
    axes = view.axes if name in CASTS else follow(equation, view.axes, copies=True)
    return [f"made by {name}" if axes is None else dataclasses.replace(view, axes=axes)]


def _cut(view: View, cuts: Sequence[tuple[int, int]]) -> View | str:
    for dim, (start, stop) in enumerate(cuts):
        if not view.axes[dim]:
            continue
        found = restrict(view.axes, dim, start, stop)
        if found is None:
            return "a slice across its axes"
        axes, digit, (low, high) = found
        if digit is None:
            continue
        if digit.axis == COPIES:
            view = dataclasses.replace(view, axes=axes)
            continue
        begin, end = view.part[digit.axis] if digit.axis >= 0 else (0, 0)
        if digit.stride * digit.size != end - begin:
            return "a slice across its axes"
        part = list(view.part)
        part[digit.axis] = begin + low * digit.stride, begin + high * digit.stride
        view = dataclasses.replace(view, axes=axes, part=tuple(part))
    return view


def _dynamic_slice(equation: Equation, view: View, constant: Any) -> View | str:
    shape, sizes = equation.invars[0].aval.shape, equation.params["slice_sizes"]
    starts = equation.invars[1:]
    known = [0 if size == n else constant(x) for x, n, size in zip(starts, shape, sizes)]
    moving = [i for i, start in enumerate(known) if start is None]
    clipped = [None if s is None else min(max(s, 0), n - size) for s, n, size in zip(known, shape, sizes)]
    cut = _cut(view, [(0, n) if s is None else (s, s + size) for s, n, size in zip(clipped, shape, sizes)])
    if not moving or isinstance(cut, str):
        return cut
    (dim, *more) = moving
    if more or sizes[dim] != 1:
        return "a slice of more than one row that begins where an argument says"
    # The primitive moves a slice that would begin outside back inside.
    return _pick(cut, dim, starts[dim], (), lambda axes: (*axes[:dim], (), *axes[dim + 1 :]), clipped=True)


def _gather(equation: Equation, view: View) -> View | str:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    indices: Any = equation.invars[1]
    shape = equation.invars[0].aval.shape
    if not isinstance(indices, jex.Var) or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return "a gather of more than rows"
    (dim,) = numbers.start_index_map
    if sizes[dim] != 1 or any(size != n for i, (size, n) in enumerate(zip(sizes, shape)) if i != dim):
        return "a gather of more than rows"
    rows = equation.invars[1].aval.shape[:-1]

    def along(axes: Axes) -> Axes:
        kept = iter([axes[i] for i in range(len(axes)) if i not in numbers.collapsed_slice_dims])
        index = iter([(Digit(-1 - i, n, 1),) if n > 1 else () for i, n in enumerate(rows)])
        ndim = equation.outvars[0].aval.ndim
        return tuple(next(kept) if i in numbers.offset_dims else next(index) for i in range(ndim))

    return _pick(view, dim, indices, rows, along, clipped=equation.params["mode"] == jax.lax.GatherScatterMode.CLIP)


def _pick(view: View, dim: int, index: Var, shape: tuple[int, ...], along: Any, *, clipped: bool) -> View | str:
    digits = view.axes[dim]
    if view.picked is not None or any(d.axis < 0 for d in digits):
        return "picked from more than once"
    if not digits:
        return dataclasses.replace(view, axes=along(view.axes))  # of one row
    axes = along((*view.axes[:dim], (), *view.axes[dim + 1 :]))
    return dataclasses.replace(view, axes=axes, picked=Picked(digits=digits, index=index, shape=shape, clipped=clipped))

"""The algebra of axes: an axis is an atom, a product of axes (major to minor), or several axes one after another.

Equations of a jaxpr make axes equal (`unify`), regroup them (`regroup`, as a reshape does) or take parts (`cut`, as a
slice does). Each of these may refine an atom, and then it is refined wherever it occurs: the axis of 32 that one
reshape splits into 4 x 8 is made of an atom of 4 and one of 8 in every value that has it. Union-find keeps this
near-linear. Where two ways of splitting cut across each other (12 as 3 x 4 and as 4 x 3), no common atoms exist:
`Misfit`.
"""

import math
from collections.abc import Callable, Iterable, Sequence

LEAF, PRODUCT, SUM = "leaf", "product", "sum"


class Misfit(Exception):
    """Two ways of dividing an axis cut across each other."""


class Axis:
    """A node of the union-find forest: an atom (leaf), a product of axes, or a sum (concatenation) of axes.

    A part is always smaller than the whole, so no axis contains itself. Use the functions of this module, which follow
    `parent`; only leaves are ever frozen.
    """

    __slots__ = ("frozen", "kind", "parent", "parts", "size")

    def __init__(self, size: int, kind: str = LEAF, parts: tuple["Axis", ...] = (), frozen: str | None = None):
        self.size = size
        self.kind = kind
        self.parts = parts
        self.parent: Axis | None = None
        self.frozen = frozen


ONE = Axis(1)
"""Every axis of size one: nothing to prune, nothing to tie."""


def atom(size: int, frozen: str | None = None) -> Axis:
    """A new axis that is not known to be made of parts."""
    return ONE if size == 1 else Axis(size, frozen=frozen)


def find(axis: Axis) -> Axis:
    """The axis that stands for all that are equal to this one."""
    root = axis
    while root.parent is not None:
        root = root.parent
    while axis.parent is not None:
        axis.parent, axis = root, axis.parent
    return root


def product(axes: Iterable[Axis]) -> Axis:
    """The axis whose index runs over all indices of `axes`, the last one fastest."""
    parts = tuple(x for axis in axes for x in factors(axis))
    if len(parts) < 2:
        return parts[0] if parts else ONE
    return Axis(math.prod(x.size for x in parts), PRODUCT, parts)


def concatenation(axes: Iterable[Axis]) -> Axis:
    """The axis that is one of `axes` after the other."""
    parts = tuple(x for axis in axes for x in terms(axis) if x.size)
    if len(parts) == 1:
        return parts[0]
    return Axis(sum(x.size for x in parts), SUM, parts)


def factors(axis: Axis) -> list[Axis]:
    """The axes whose product this is, none of them a product; without those of size one."""
    axis = find(axis)
    if axis.kind == PRODUCT:
        return [x for part in axis.parts for x in factors(part)]
    return [] if axis is ONE else [axis]


def terms(axis: Axis) -> list[Axis]:
    """The axes whose concatenation this is, none of them a concatenation."""
    axis = find(axis)
    return [x for part in axis.parts for x in terms(part)] if axis.kind == SUM else [axis]


def leaves(axis: Axis) -> list[Axis]:
    """All atoms of an axis, major to minor and first to last; an atom that occurs twice is there twice."""
    axis = find(axis)
    if axis.kind == LEAF:
        return [] if axis is ONE else [axis]
    return [x for part in axis.parts for x in leaves(part)]


def freeze(axis: Axis, reason: str) -> None:
    """None of the axis' atoms may be pruned. The first reason stays."""
    for leaf in leaves(axis):
        leaf.frozen = leaf.frozen or reason


def unify(a: Axis, b: Axis) -> None:
    """The two axes, of equal size, are one from now on: index i of one is index i of the other."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.kind == LEAF:
        _link(a, b)
    elif b.kind == LEAF:
        _link(b, a)
    elif a.kind == b.kind == PRODUCT:
        _align(factors(a), factors(b), split)
        _link(a, b)
    elif a.kind == b.kind == SUM:
        _align(terms(a), terms(b), cut)
        _link(a, b)
    else:
        whole, pieces = (a, b) if a.kind == PRODUCT else (b, a)
        _distribute(whole, pieces)
        _link(pieces, whole)


def cut(axis: Axis, at: int) -> tuple[Axis, Axis]:
    """The first `at` indices of an axis (0 < at < size), and the others."""
    axis = find(axis)
    if axis.kind == LEAF:
        return _refine(axis, SUM, (at, axis.size - at))
    if axis.kind == SUM:
        left, rest = [], terms(axis)
        while rest and rest[0].size <= at:
            at -= rest[0].size
            left.append(rest.pop(0))
        if at:
            first, rest[0] = cut(rest[0], at)
            left.append(first)
        return concatenation(left), concatenation(rest)
    major, *minor = factors(axis)
    inner = math.prod(x.size for x in minor)
    if at % inner:
        raise Misfit
    first, second = cut(major, at // inner)
    return product([first, *minor]), product([second, *minor])


def split(axis: Axis, major: int) -> tuple[Axis, Axis]:
    """The axis as a product of one of size `major` and a minor one."""
    axis = find(axis)
    if axis.size % major:
        raise Misfit
    minor = axis.size // major
    if major == 1 or minor == 1:
        return (ONE, axis) if major == 1 else (axis, ONE)
    if axis.kind == LEAF:
        return _refine(axis, PRODUCT, (major, minor))
    if axis.kind == PRODUCT:
        first, second = regroup([axis], [major, minor])
        return first, second
    parts = terms(axis)
    if all(x.size % minor == 0 for x in parts):  # as heads of one size, some of them queries and some of them keys
        pairs = [split(x, x.size // minor) if x.size > minor else (ONE, x) for x in parts]
        outer, inner = concatenation(x for x, _ in pairs), [x for _, x in pairs]
    else:  # as a head's query, key and value, which repeat in every head
        inner, rest = [], axis
        for _ in range(major - 1):
            piece, rest = cut(rest, minor)
            inner.append(piece)
        inner.append(rest)
        outer = concatenation([ONE] * major)
    for x in inner[1:]:
        unify(inner[0], x)
    axis.kind, axis.parts = PRODUCT, (outer, inner[0])
    return outer, inner[0]


def regroup(axes: Iterable[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Axes regrouped into others of the given sizes (same product), as a row-major reshape does."""
    rest = [x for axis in axes for x in factors(axis)][::-1]
    result = []
    for size in sizes:
        group: list[Axis] = []
        while size > 1:
            if not rest:
                raise Misfit  # an empty array
            if len(parts := factors(rest.pop())) > 1:  # refined by a split since
                rest += parts[::-1]
                continue
            (part,) = parts
            if part.size > size:
                part, minor = split(part, size)
                rest.append(minor)
            elif size % part.size:
                raise Misfit
            group.append(part)
            size //= part.size
        result.append(product(group))
    return result


def _link(a: Axis, b: Axis) -> None:
    """`b` stands for `a` too."""
    a, b = find(a), find(b)
    if a is b:
        return
    a.parent = b
    if a.frozen:
        freeze(b, a.frozen)


def _refine(leaf: Axis, kind: str, sizes: tuple[int, int]) -> tuple[Axis, Axis]:
    first, second = (atom(size, leaf.frozen) for size in sizes)
    leaf.kind, leaf.parts, leaf.frozen = kind, (first, second), None
    return first, second


def _align(xs: list[Axis], ys: list[Axis], divide: Callable[[Axis, int], tuple[Axis, Axis]]) -> None:
    """Unifies the factors (or terms) of two equal axes from the left, dividing the larger where they differ."""
    xs, ys = xs[::-1], ys[::-1]
    parts = factors if divide is split else terms
    while xs and ys:
        for stack in (xs, ys):
            stack += parts(stack.pop())[::-1]  # it may have been refined since
        x, y = xs.pop(), ys.pop()
        if x.size > y.size:
            x, rest = divide(x, y.size)
            xs.append(rest)
        elif y.size > x.size:
            y, rest = divide(y, x.size)
            ys.append(rest)
        unify(x, y)


def _distribute(whole: Axis, pieces: Axis) -> None:
    """Unifies a product with a concatenation: the product's major factor is cut where the pieces end."""
    parts = terms(pieces)
    try:
        rest = whole
        for i, part in enumerate(parts):
            piece, rest = cut(rest, part.size) if i + 1 < len(parts) else (rest, rest)
            unify(piece, part)
    except Misfit:
        major, *minor = factors(whole)
        outer, inner = split(pieces, major.size)
        unify(major, outer)
        unify(product(minor), inner)

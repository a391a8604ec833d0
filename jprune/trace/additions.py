"""What the product with a kernel is added to: in a transformer's block, the residual stream."""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jax.extend import core as jex

from jprune.annotations import Array, Shaped
from jprune.trace.jaxpr import CASTS, IDENTITIES, Equation, Trace, Var, variables
from jprune.trace.matmuls import Found, Site
from jprune.trace.views import whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition:
    """What outputs of a kernel are added to: a sum of values."""

    terms: tuple[tuple[Var, float], ...]
    """Each value, and what the outputs are multiplied with before it comes to them."""
    d_out: int

    @property
    def variables(self) -> tuple[Var, ...]:
        """The values that it is made of."""
        return tuple(x for x, _ in self.terms)

    def rows(self, *values: Shaped[Array | np.ndarray, "..."]) -> Shaped[Array | np.ndarray, "tokens d_out"]:
        """The sum for each token that the kernel reads, in units of the kernel's outputs, out of these values."""
        each = [x if factor == 1 else x / factor for x, (_, factor) in zip(values, self.terms, strict=True)]
        return functools.reduce(operator.add, each).reshape(-1, self.d_out)


def additions(flat: Trace, found: Found) -> dict[Var, Addition]:
    """By the variable of a matmul's result what it is added to, as far as that is known at the matmul's stage.

    Followed are casts, factors that are numbers, and sums; what depends on no argument (a bias) or comes later (the
    other half of a block whose halves run side by side) does not count. Only matmuls of whole leaves that keep tokens
    first and outputs last do, and of each only what its result alone goes into.
    """
    users: dict[Var, list[Equation]] = {}
    for equation in flat.equations:
        for x in dict.fromkeys(variables(equation)):
            users.setdefault(x, []).append(equation)
    kept = {x for x in flat.outputs if isinstance(x, jex.Var)}
    places: dict[Var, Addition] = {}
    for site in found.sites:
        if site.level is not found.top or not _in_order(found, site):
            continue
        result, factor, terms = site.result, 1.0, []
        for equation, x in _along(result, users, kept):
            other = next(y for y in equation.invars if y is not x)
            if equation.primitive.name == "mul":
                factor *= float(np.asarray(other.val))
            elif factor and _known(found, other, site.matmul.stage) and other.aval.shape == result.aval.shape:
                terms.append((other, factor))
        if terms:
            width = math.prod(site.product.leaf[i] for i in site.matmul.out_axes)
            places[result] = Addition(terms=tuple(terms), d_out=width)
    return places


def _along(x: Var, users: dict[Var, list[Equation]], kept: set[Var]) -> Iterator[tuple[Equation, Var]]:
    """The multiplications and sums on the way of a value, for as long as it is one way."""
    while len(own := users.get(x, [])) == 1 and x not in kept:
        equation = own[0]
        match equation.primitive.name:
            case name if name in CASTS | IDENTITIES:
                pass
            case "add" | "add_any" if equation.invars[0] is not equation.invars[1]:
                yield equation, x
            case "mul" if any(isinstance(y, jex.Literal) and np.ndim(y.val) == 0 for y in equation.invars):
                yield equation, x
            case _:
                return
        x = equation.outvars[0]


def _known(found: Found, x: Any, stage: int) -> bool:
    return isinstance(x, jex.Var) and x in found.depth and found.depth[x] <= stage


def _in_order(found: Found, site: Site) -> bool:
    """Whether the rows of the result are those of the input's matrix view, and its columns the kernel's outputs."""
    product = site.product
    if not product.plain or product.side != 1:
        return False
    equation = next(e for e in found.top.body.equations if site.result in e.outvars)
    (lhs, rhs), _batch = equation.params["dimension_numbers"]
    operand = equation.invars[0]
    root, axes = found.top.root(operand)
    if root is not product.input.value:
        axes = whole(operand.aval.shape)
    rows = [d for i, digits in enumerate(axes) if i not in lhs for d in digits]
    columns = [d for i, digits in enumerate(product.axes) if i not in rhs for d in digits]
    return all(_ascending(digits) for digits in (rows, columns))


def _ascending(digits: Iterable[Any]) -> bool:
    places = [(d.axis, -d.stride) for d in digits if d.size > 1]
    return places == sorted(places)

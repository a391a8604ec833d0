"""Residual blocks: the parameters through which a block adds to what enters it.

A block ``f(params, x) = x + a + b + ...`` is left out by a mask if every addend but x is multiplied by it. Each addend
is linear in some parameter close to its end: the kernel of attention's output and its bias, or the scale of a norm
that comes after. Multiplied there, the mask costs nothing and can be folded into the parameters for good.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jax.extend import core as jex

from jprune.errors import JpruneError
from jprune.trace.jaxpr import CASTS, IDENTITIES, LAYOUTS, Atom, Equation, PyTree, Trace, Var, trace, where_written

_LINEAR = {*CASTS, *IDENTITIES, *LAYOUTS, "neg", "reduce_sum", "slice", "div"}
"""In their first operand."""
_SUMS = {"add", "add_any", "sub"}
_PRODUCTS = {"mul", "dot_general"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlet:
    """A parameter in which an addend of a block is linear."""

    path: str
    offset: float = 0.0
    """What the block adds to the parameter first: 1 where a norm's scale is stored less one."""


def outlets(f: Callable, params: PyTree, x: PyTree) -> tuple[Outlet, ...]:
    """The parameters of the block ``f(params, x)`` that, all multiplied by z, make it ``x + z (f(params, x) - x)`` for
    z in {0, 1}; for z between them every addend counts z times.

    Arrays and `jax.ShapeDtypeStruct`s serve alike; x is one array.

    Raises:
      JpruneError: f is no such block: its result is not x and something more, or an addend is linear in no parameter.
    """
    return _Walk(trace(f, params, x)).outlets()


class _Walk:
    def __init__(self, flat: Trace):
        self.flat = flat
        self.makers: dict[Var, Equation] = {y: e for e in flat.equations for y in e.outvars}
        self.names: dict[Var, str] = {var: path for path, var in flat.params.items()}

    def outlets(self) -> tuple[Outlet, ...]:
        (stream,), (output,) = self.flat.args, self.flat.outputs
        addends = list(self.addends(output))
        if sum(x is stream for x in addends) != 1:
            last = self.makers.get(output)
            where = "" if last is None else f" (it ends with {last.primitive.name} at {where_written(last)})"
            raise JpruneError(
                f"a layer can be left out if its output is its input and something more; here it is not{where}"
            )
        found: dict[str, Outlet] = {}
        for addend in addends:
            if addend is stream:
                continue
            linear = self.linear(addend)
            if linear is None:
                last = self.makers[addend]
                raise JpruneError(
                    "a layer can be left out if what it adds to its input is linear in some parameter; here "
                    f"{last.primitive.name} at {where_written(last)} is not"
                )
            found |= {outlet.path: outlet for outlet in linear}
        return tuple(found.values())

    def addends(self, x: Atom) -> Iterator[Atom]:
        maker = None if isinstance(x, jex.Literal) else self.makers.get(x)
        if maker is not None and maker.primitive.name in ("add", "add_any"):
            for operand in maker.invars:
                yield from self.addends(operand)
        else:
            yield x

    def linear(self, x: Atom) -> tuple[Outlet, ...] | None:
        """The parameters that are factors of x, one for each of its addends; None if an addend has none."""
        if (own := self.parameter(x)) is not None:
            return (own,)
        maker = None if isinstance(x, jex.Literal) else self.makers.get(x)
        if maker is None:
            return None
        name, operands = maker.primitive.name, maker.invars
        if name in _LINEAR:
            return self.linear(operands[0])
        if name in _SUMS:
            both = [self.linear(operand) for operand in operands]
            return None if None in both else tuple(w for each in both if each is not None for w in each)
        if name in _PRODUCTS:
            parameters = [own for operand in operands if (own := self.parameter(operand)) is not None]
            if parameters:
                return (parameters[0],)
            return next((found for operand in operands if (found := self.linear(operand)) is not None), None)
        return None

    def parameter(self, x: Atom) -> Outlet | None:
        """The parameter that x is, in another layout or precision, perhaps with a number added; None if it is none."""
        offset = 0.0
        while not isinstance(x, jex.Literal) and x not in self.names:
            maker = self.makers.get(x)
            if maker is None:
                return None
            operands = [y for y in maker.invars if not isinstance(y, jex.Literal)]
            numbers = [float(np.asarray(y.val)) for y in maker.invars if isinstance(y, jex.Literal)]
            if maker.primitive.name == "add" and len(operands) == len(numbers) == 1:
                offset += numbers[0]
            elif maker.primitive.name not in (*CASTS, *IDENTITIES, *LAYOUTS):
                return None
            x = operands[0]
        return None if isinstance(x, jex.Literal) else Outlet(path=self.names[x], offset=offset)

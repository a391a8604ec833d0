"""Equations on single numbers of which some are not known."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jprune.trace.jaxpr import CASTS, ELEMENTWISE, IDENTITIES, Equation

POINTWISE = ELEMENTWISE | {
    *("real", "imag", "conj", "complex", "asinh", "acosh", "atanh", "nextafter", "lgamma", "digamma", "erf_inv"),
    *("population_count", "clz"),
}
"""Each element of the result depends on the same element of each operand."""

IDEMPOTENT = {"reduce_max", "reduce_min", "reduce_and", "reduce_or"}
"""Reductions of one repeated number to that number."""

Number = float | int | bool | None
"""A known number; None for one that is not known, but finite wherever it is in the whole network; nan for a number
that may have become infinite or undefined."""


def _erf(x: Any) -> Any:
    return np.vectorize(math.erf)(x)


def _logistic(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


KNOWN: dict[str, Callable[..., Any]] = {
    **{"abs": np.abs, "neg": np.negative, "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "round": np.round},
    **{"exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log1p": np.log1p, "sqrt": np.sqrt},
    **{"rsqrt": lambda x: 1 / np.sqrt(x), "cbrt": np.cbrt, "square": np.square, "logistic": _logistic, "erf": _erf},
    **{"erfc": lambda x: 1 - _erf(x), "sin": np.sin, "cos": np.cos, "tan": np.tan, "sinh": np.sinh, "cosh": np.cosh},
    **{"tanh": np.tanh, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "asinh": np.arcsinh},
    **{"acosh": np.arccosh, "atanh": np.arctanh, "is_finite": np.isfinite, "atan2": np.arctan2},
    **{"add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum},
    **{"rem": np.fmod, "pow": np.power, "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
    **{"not": np.invert, "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high)},
}


def apply(equation: Equation, numbers: Sequence[Number]) -> Number:
    """The result of an elementwise equation on these numbers."""
    name = equation.primitive.name
    if any(x is not None and x != x for x in numbers) and name != "select_n":
        return math.nan
    if None in numbers:
        return _partly(name, equation, numbers)
    dtype = equation.outvars[0].aval.dtype
    values = [np.asarray(x, y.aval.dtype) for x, y in zip(numbers, equation.invars)]
    if not all(_is_simple(x.dtype) for x in (*values, np.empty(0, dtype))):
        return math.nan
    wide = [x.astype(np.float64) if x.dtype.kind not in "biu" else x for x in values]
    with np.errstate(all="ignore"):
        if name in CASTS or name in IDENTITIES:
            result = wide[0]
        elif name == "div":
            result = np.divide(*wide) if wide[0].dtype.kind == "f" else np.trunc(np.divide(*wide))
        elif name == "integer_pow":
            result = np.power(wide[0].astype(np.float64), equation.params["y"])
        elif name == "select_n":
            result = wide[1 + int(wide[0])]
        elif name in KNOWN:
            result = KNOWN[name](*wide)
        else:
            return math.nan  # nothing is known of the function
        number = np.asarray(result).astype(dtype).item()
    return math.nan if number != number else number  # one nan for all: states are compared


def fold(equation: Equation, numbers: Sequence[Number]) -> Number:
    """The one number that a result consists of, if each operand consists of one (None: it does not)."""
    name = equation.primitive.name
    if name in POINTWISE or name in IDENTITIES:
        return apply(equation, numbers)
    if name in ("broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", *IDEMPOTENT):
        return numbers[0]
    if name in ("reduce_sum", "reduce_prod") and numbers[0] is not None:
        times = math.prod(equation.invars[0].aval.shape[i] for i in equation.params["axes"])
        if name == "reduce_sum":
            return numbers[0] * times
        return numbers[0] ** times if abs(numbers[0]) <= 1 else None
    return None


def _partly(name: str, equation: Equation, numbers: Sequence[Number]) -> Number:
    known = [x for x in numbers if x is not None]
    match name:
        case "mul" if known:
            return 0 if known[0] == 0 else None if math.isfinite(known[0]) else math.nan
        case "div" if known:
            top, bottom = numbers
            if bottom is None:
                return 0 if top == 0 else None
            return math.nan if bottom == 0 else None
        case "and" if False in known and equation.outvars[0].aval.dtype == bool:
            return False
        case "or" if True in known and equation.outvars[0].aval.dtype == bool:
            return True
        case "select_n":
            which, *cases = numbers
            if which is not None:
                return cases[int(which)]
            if any(x is not None and x != x for x in cases):
                return math.nan
            return cases[0] if all(x == cases[0] for x in cases) else None
        case "add" | "sub" | "add_any" if any(not math.isfinite(x) for x in known):
            return math.nan
        case "rem" if numbers[1] == 0:
            return math.nan
        case "pow" if numbers[0] == 0:
            return math.nan  # the exponent may be negative
    return None


def _is_simple(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)

"""A jaxpr of a whole model cut into parts: before the layers, each layer, and behind them.

What one part needs of the parts before it crosses the cut: hidden states, and where layers read them also the
embedding, keys and values of earlier layers, or the tokens. All of it travels as one array [B, T, width], side by side
and filled up with zeros to the width of the widest cut, so that a block is f(params, x) -> x as in every other model.
What depends on no token is computed anew in each part that reads it.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jprune.errors import JpruneError
from jprune.trace.jaxpr import runner

Var = Any


class Carried(NamedTuple):
    """A value that crosses a cut: an array of which every token has its part."""

    var: Var
    order: tuple[int, ...]
    """Its axes with those of windows and tokens first; of one that joins both, that axis first."""
    joined: bool
    """Whether one axis is that of windows and tokens."""

    @property
    def width(self) -> int:
        """Numbers for each token."""
        shape = self.var.aval.shape
        return math.prod(shape[i] for i in self.order[1 if self.joined else 2 :])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """One part as equations of its own."""

    equations: tuple[Any, ...]
    params: dict[str, Var]
    """The parameters that it reads, by PyTorch's name."""
    constants: dict[Var, Any]
    reads: tuple[Var, ...]
    """What it reads that depends on tokens: of the first part the tokens, of others what crosses the cut before it."""
    gives: tuple[Var, ...]
    """What the parts after it read; of the last one, the logits."""

    @functools.cached_property
    def run(self) -> Callable[[Sequence[Any], Sequence[Any]], list]:
        """(Values of `params`, values of `reads`) -> values of `gives`."""
        own = runner("bridge", self.equations, [*self.constants, *self.params.values(), *self.reads], self.gives)
        return lambda params, values: own([*self.constants.values(), *params, *values])


class Cut:
    """The parts of one trace.

    Args:
        closed: the jaxpr of (parameters by name, tokens) -> logits.
        names: of its parameters, in their order.
        layer_of: (equation) -> the number of the layer that made it, or None.
        layers: how many there are.
        axes: the axes of windows and tokens of what crosses each cut, of a trace in which no other axis has their
            sizes; None if this is that trace.
        what: the model, for messages.
    """

    def __init__(
        self,
        closed: Any,
        names: Sequence[str],
        layer_of: Callable[[Any], int | None],
        layers: int,
        axes: "Cut | None",
        what: str,
    ):
        self.what = what
        jaxpr = getattr(closed, "jaxpr", closed)
        self._equations, self._logits = jaxpr.eqns, jaxpr.outvars[0]
        *params, self.tokens = jaxpr.invars
        self._names = dict(zip(params, names, strict=True))
        self._constants = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
        self._digests: dict[Var, str] = {}
        self._dependent = self._of_tokens()
        starts = self._starts([layer_of(e) for e in self._equations], layers)
        bounds = [0, *starts, len(self._equations)]
        segments: list[Segment] = []
        wanted: list[Var] = [self._logits]
        for k in reversed(range(len(bounds) - 1)):
            segment = self._segment(bounds[k], bounds[k + 1], wanted)
            segments.append(segment)
            wanted = [v for v in segment.reads if v in self._dependent]
        self.segments = segments[::-1]
        """Before the layers, each layer, and behind them."""
        self.carried: tuple[tuple[Carried, ...], ...] = tuple(
            self._carried(k, segment.reads, None if axes is None else axes.carried[k - 1])
            for k, segment in enumerate(self.segments)
            if k
        )
        """What crosses the cut before each layer, and the one behind the last."""
        self.width = max(sum(c.width for c in carried) for carried in self.carried)

    def text(self, number: int) -> str:
        """Equal for parts that compute the same of their parameters, whatever these are called."""
        segment = self.segments[number]
        inputs = [*segment.constants, *segment.params.values(), *segment.reads]
        debug = jex.DebugInfo("bridge", "text", None, None)
        jaxpr = jex.Jaxpr((), inputs, list(segment.gives), list(segment.equations), frozenset(), debug)
        return f"{jaxpr} {[self._digest(var) for var in segment.constants]}"

    def _digest(self, var: Var) -> str:
        if var not in self._digests:
            value = np.asarray(self._constants[var])
            self._digests[var] = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return self._digests[var]

    def _of_tokens(self) -> dict[Var, int]:
        """The variables that depend on the tokens, numbered in their order."""
        found = {self.tokens: 0}
        for equation in self._equations:
            if any(isinstance(v, jex.Var) and v in found for v in equation.invars):
                found |= {v: len(found) + i for i, v in enumerate(equation.outvars)}
        return found

    def _starts(self, of: list[int | None], layers: int) -> list[int]:
        """Where each layer begins, and where the last one ends.

        What stands between two layers goes with the second.
        """
        last: dict[int, int] = {}
        first: dict[int, int] = {}
        for i, (layer, equation) in enumerate(zip(of, self._equations, strict=True)):
            if layer is not None and any(v in self._dependent for v in equation.outvars):
                first.setdefault(layer, i)
                last[layer] = i
        if missing := [k for k in range(layers) if k not in first]:
            raise JpruneError(f"{self.what}: its call runs layer {missing[0]} of {layers} nowhere")
        for k in range(1, layers):
            if first[k] < last[k - 1]:
                raise JpruneError(
                    f"{self.what}: layer {k - 1} is run again after layer {k}, so that the layers are no sequence of "
                    "blocks"
                )
        return [first[0], *(last[k] + 1 for k in range(layers))]

    def _segment(self, start: int, stop: int, wanted: Sequence[Var]) -> Segment:
        """The equations from `start` to `stop` that give what is wanted, and what they need that no token changes."""
        missing = dict.fromkeys(wanted)
        chosen = []
        for i in reversed(range(stop)):
            equation = self._equations[i]
            own = i >= start or not any(v in self._dependent for v in equation.outvars)
            if own and any(v in missing for v in equation.outvars):
                chosen.append(equation)
                for v in equation.outvars:
                    missing.pop(v, None)
                missing |= {v: None for v in equation.invars if isinstance(v, jex.Var)}
        return Segment(
            equations=tuple(chosen[::-1]),
            params={self._names[v]: v for v in self._names if v in missing},
            constants={v: self._constants[v] for v in missing if v in self._constants},
            reads=tuple(sorted((v for v in missing if v in self._dependent), key=lambda v: self._dependent[v])),
            gives=tuple(wanted),
        )

    def _carried(
        self, number: int, crossing: Sequence[Var], reference: tuple[Carried, ...] | None
    ) -> tuple[Carried, ...]:
        if reference is not None and len(reference) != len(crossing):
            raise JpruneError(
                f"{self.what}: what layer {number} reads of the layers before it depends on how many tokens there are"
            )
        windows, length = self.tokens.aval.shape
        found = []
        for i, var in enumerate(crossing):
            shape = var.aval.shape
            order, joined = _axes(shape, windows, length) if reference is None else reference[i][1:]
            sizes = tuple(shape[a] for a in order[: 1 if joined else 2])
            if sizes != ((windows * length,) if joined else (windows, length)):
                raise JpruneError(
                    f"{self.what}: layer {number} reads something of the layers before it that has no part for every "
                    f"token: an array of shape {shape} for {windows} windows of {length} tokens"
                )
            found.append(Carried(var, order, joined))
        return tuple(found)


def _axes(shape: tuple[int, ...], windows: int, length: int) -> tuple[tuple[int, ...], bool]:
    """The axes of an array with those of windows and tokens first; no order if it has none."""
    rest = list(range(len(shape)))
    if windows in shape and length in shape:
        first = [shape.index(windows), shape.index(length)]
        return (*first, *(i for i in rest if i not in first)), False
    if windows * length in shape:
        first = [shape.index(windows * length)]
        return (*first, *(i for i in rest if i not in first)), True
    return (), False


def pack(
    values: Sequence[jax.Array], carried: Sequence[Carried], shape: tuple[int, int], width: int, dtype: Any
) -> Any:
    """What crosses a cut, as one array [B, T, width]."""
    parts = [jnp.transpose(v, c.order).reshape(*shape, c.width).astype(dtype) for v, c in zip(values, carried)]
    left = width - sum(c.width for c in carried)
    if left:
        parts.append(jnp.zeros((*shape, left), dtype))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def unpack(x: jax.Array, carried: Sequence[Carried]) -> list[jax.Array]:
    """The inverse of `pack`."""
    values, start = [], 0
    for c in carried:
        aval = c.var.aval
        ordered = tuple(aval.shape[i] for i in c.order)
        part = x if x.shape[-1] == c.width else x[..., start : start + c.width]
        values.append(
            jnp.transpose(part.reshape(ordered).astype(aval.dtype), tuple(map(c.order.index, range(len(c.order)))))
        )
        start += c.width
    return values

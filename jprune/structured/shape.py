"""The shape of a decoder whose layers are equal: how it is written, when one fits into another, and which has a
number of parameters.

    layers=24,hidden=2048,heads=16,kv_heads=4,intermediate=5504
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

from jprune.errors import JpruneError

Count = Callable[["Shape"], int]
"""How many parameters a model of a shape has: linear in its layers, and in their intermediate size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())


NAMES = tuple(field.name for field in dataclasses.fields(Shape))


def parse(text: str, source: Shape) -> Shape:
    """The shape that a text such as ``layers=24,hidden=2048`` means; what is not named stays as in `source`.

    Of heads and KV heads, a single one that is named takes the other along, in proportion.

    Raises:
      JpruneError: no such text; the message says what is expected.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in NAMES or not equals or not value.isdecimal():
            raise JpruneError(
                f"`target` is a config.json or sizes such as layers=24,hidden=2048,heads=16,intermediate=5504 "
                f"({', '.join(NAMES)}); got {part.strip()!r}"
            )
        if name in sizes:
            raise JpruneError(f"`target`: {name} is there twice")
        sizes[name] = int(value)
    group = source.heads // source.kv_heads
    if "heads" in sizes and "kv_heads" not in sizes and sizes["heads"] % group == 0:
        sizes["kv_heads"] = sizes["heads"] // group
    elif "kv_heads" in sizes and "heads" not in sizes:
        sizes["heads"] = sizes["kv_heads"] * group
    return dataclasses.replace(source, **sizes)


def check(target: Shape, source: Shape) -> None:
    """Raises `JpruneError` if `source` cannot be pruned to `target`: a size is larger, or heads do not fit."""
    for name in NAMES:
        wanted, there = getattr(target, name), getattr(source, name)
        if not 1 <= wanted <= there:
            raise JpruneError(
                f"the target has {name} {wanted} and the model {there}: pruning can only lower it, and to 1 at least"
            )
    if target.heads % target.kv_heads:
        raise JpruneError(
            f"the target has {target.heads} query heads for {target.kv_heads} KV heads: every KV head needs equally "
            "many, so heads must be a multiple of kv_heads"
        )
    group, whole = target.heads // target.kv_heads, source.heads // source.kv_heads
    if group > whole:
        raise JpruneError(
            f"the target has {group} query heads for each KV head and the model {whole}: a KV head goes with its query "
            f"heads, so at most {whole * target.kv_heads} heads stay with {target.kv_heads} KV heads"
        )
    if target == source:
        raise JpruneError(f"the target {target} is what the model has: nothing to prune")


def solve(source: Shape, parameters: int, count: Count) -> Shape:
    """The shape with at most `parameters` that is most like the source: all sizes smaller by one factor, nearly.

    Layers, heads and the hidden size are nearest to a common share of the source's (a KV head with all of its query
    heads; the hidden size in steps of up to 64), and the intermediate size makes up the count, in the same steps. Of
    all these shapes it is the one whose shares differ least.

    Raises:
      JpruneError: no smaller shape has so few parameters, or the source has no more.
    """
    if count(source) <= parameters:
        raise JpruneError(
            f"the model has {count(source):,} parameters, no more than the {parameters:,} asked for: nothing to prune"
        )
    best: tuple[float, int] | None = None
    shape = source
    for candidate in _candidates(source, parameters, count):
        shares = _shares(candidate, source).values()
        rank = math.log(max(shares) / min(shares)), -count(candidate)
        if best is None or rank < best:
            best, shape = rank, candidate
    if best is None:
        raise JpruneError(
            f"a model of {source} cannot be pruned to {parameters:,} parameters: too few even for one layer and the "
            "embedding"
        )
    return shape


def _candidates(source: Shape, parameters: int, count: Count) -> Iterator[Shape]:
    wide, step = _step(source.hidden), _step(source.intermediate)
    group = source.heads // source.kv_heads
    for layers in range(1, source.layers + 1):
        share = layers / source.layers
        for kv_heads in _around(share * source.kv_heads, 1, source.kv_heads):
            for hidden in _around(share * source.hidden, wide, source.hidden):
                shape = Shape(
                    layers=layers, hidden=hidden, heads=kv_heads * group, kv_heads=kv_heads, intermediate=step
                )
                least = count(shape)
                if least > parameters:
                    continue
                each = count(dataclasses.replace(shape, intermediate=2 * step)) - least
                steps = min(1 + (parameters - least) // each, source.intermediate // step)
                yield dataclasses.replace(shape, intermediate=steps * step)


def _shares(shape: Shape, source: Shape) -> Mapping[str, float]:
    return {name: getattr(shape, name) / getattr(source, name) for name in NAMES}


def _step(size: int) -> int:
    """The largest power of two up to 64 that divides a size."""
    return math.gcd(size, 64)


def _around(size: float, step: int, most: int) -> set[int]:
    """The multiples of a step on both sides, between one step and `most`."""
    return {min(max(n, 1), most // step) * step for n in (math.floor(size / step), math.ceil(size / step))}


def number(text: str) -> int:
    """A count such as 1300000000, 1.3B, 370M or 2.5k.

    Raises:
      JpruneError: it is none.
    """
    scale = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if scale != 1 else text) * scale
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise JpruneError(f"expected a number of parameters such as 1.3B, 370M or 123456789, got {text!r}")
    return round(value)

"""Low-rank products beside the matmuls of a trace: how `jprune.lora.adapt` runs a function.

The function runs from its trace, and next to each matmul with an adapter ``(x a) b`` is added to its result. A scan
with such matmuls is run again with its body so changed; adapters of stacked kernels are scanned along with them.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jprune.annotations import Array, Float, Key, Shaped
from jprune.errors import JpruneError
from jprune.trace.jaxpr import Equation, Var, runner, scan_counts, variables
from jprune.trace.levels import Level
from jprune.trace.matmuls import Found, Site
from jprune.trace.views import Digit
from jprune.train.remat import named

Given = Mapping[str, tuple[Any, Any]]
"""(A, B) by the path of their kernel."""

DROPOUT_LEVELS = (
    256  # a probability is rounded to a multiple of 1 / 256: random bits are a fifth of a step's time on CPU
)


class Factors(NamedTuple):
    """The adapter of a kernel, or of what is left of a stack of kernels inside of scans along it."""

    a: Shaped[Array, "..."]
    b: Shaped[Array, "..."]
    stack: tuple[int, ...]
    """The axes of the leaf that number the first axes of a and b."""


State = dict[Site, Factors]


def check(found: Found, given: Given, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses adapters whose product could not stand beside every use of their kernel, or is of another shape."""
    scanned = set(_scanned(found.top))
    for path in sorted(given):
        own = [site for site in found.sites if site.matmul.path == path]
        why = next((f"it is used at {s.source}, but {s.reason}" for s in found.skipped if path in s.paths), None)
        if any(site.level not in scanned for site in own):
            why = "it is used inside of a while loop or branch; adapt the function of one iteration"
        elif not all(_plain(site, shapes[path]) for site in own):
            why = (
                "it is used as a stack (other than along a scan), in parts, in copies or by a convolution, and "
                "adapters are of whole kernels"
            )
        elif not own and why is None:
            why = "no matmul reads it"
        if why is not None:
            raise JpruneError(f"there is an adapter for {path!r}, but {why}; see jprune.report")
        _check_shapes(own[0], *given[path], shapes[path])


def _scanned(level: Level) -> Iterator[Level]:
    """A level and all within it that scans alone lead to."""
    yield level
    for equation in level.body.equations:
        if equation.primitive.name == "scan":
            for inner in level.inner.get(equation.outvars[0], ()) if equation.outvars else ():
                yield from _scanned(inner)


def _plain(site: Site, shape: tuple[int, ...]) -> bool:
    """Whether a matmul is one of a whole kernel, or of one of a stack that scans go along, an axis each."""
    product = site.product
    if product.plain or not product.scanned:
        return product.plain
    along = [digit for _, digits in product.scanned for digit in digits]
    return (
        list(product.stack) == along
        and all(len(digits) == 1 for _, digits in product.scanned)
        and all(digit.size == shape[digit.axis] for digit in along)
        and site.matmul.part is None
        and site.matmul.shape is None
        and not any(digit.axis < 0 for axis in product.axes for digit in axis)
        and any(e.primitive.name == "dot_general" and e.outvars[0] is site.result for e in site.level.body.equations)
    )


def _check_shapes(site: Site, a: Any, b: Any, shape: tuple[int, ...]) -> None:
    matmul = site.matmul
    stack, d_in, d_out = (
        tuple(shape[i] for i in axes) for axes in (matmul.batch_axes, matmul.in_axes, matmul.out_axes)
    )
    n = len(stack)
    if a.shape[:-1] != stack + d_in or b.shape[:n] + b.shape[n + 1 :] != stack + d_out or a.shape[-1] != b.shape[n]:
        stacked = f" and stacked axes {matmul.batch_axes}" if stack else ""
        raise JpruneError(
            f"{matmul.path}: expected adapters a {stack + d_in} x r and b {f'{stack} x ' if stack else ''}r x {d_out} "
            f"for a kernel {shape} with input axes {matmul.in_axes}{stacked}, got {a.shape} and {b.shape}"
        )


class Beside:
    """Runs a trace with adapters, each multiplied by alpha / r."""

    def __init__(self, found: Found, given: Given, alpha: int | float, dropout: float) -> None:
        self.found, self.alpha, self.dropout = found, alpha, dropout
        self.whole: State = {site: Factors(*given[site.matmul.path], site.matmul.batch_axes) for site in found.sites}

    def __call__(self, inputs: Sequence[Any], key: Key[Array, ""] | None) -> list[Any]:
        """The outputs of the function, from the leaves of its parameters and arguments."""
        return self.run(self.found.top, inputs, self.whole, key)

    def run(self, level: Level, inputs: Sequence[Any], state: State, key: Key[Array, ""] | None) -> list[Any]:
        """The outputs of a level."""
        values: dict[Var, Any] = dict(zip(level.body.inputs, inputs, strict=True)) | level.body.constants
        own = {site.result: site for site in state if site.level is level}
        read: dict[int, Array] = {}  # what is left of what adapters read, by input_id
        for part in self.parts(level, own):
            last = part[-1]
            if self.within(level, last):
                values.update(zip(last.outvars, self.scan(level, last, values, state, key), strict=True))
                continue
            made = {x for e in part for x in e.outvars}
            takes = list(dict.fromkeys(x for e in part for x in variables(e) if x not in made))
            gives = [x for e in part for x in e.outvars]
            values.update(zip(gives, runner("lora", part, takes, gives)([values[x] for x in takes]), strict=True))
            site = own.get(last.outvars[0]) if last.outvars else None
            if site is not None:
                x = values[last.invars[1 - site.product.side]]
                if self.dropout and key is not None:
                    x = x * self.kept(read, site.matmul.input_id, x, key).astype(x.dtype)
                delta = _product(last, site, x, state[site])
                scale = self.alpha / state[site].a.shape[-1]
                values[site.result] = values[site.result] + (delta * scale).astype(site.result.aval.dtype)
        return [x.val if isinstance(x, jex.Literal) else values[x] for x in level.body.outputs]

    def within(self, level: Level, equation: Equation) -> list[Site]:
        """The matmuls with adapters inside of an equation."""
        inner = level.inner.get(equation.outvars[0], ()) if equation.outvars else ()
        if not inner:
            return []
        levels = {x for body in inner for x in _scanned(body)}
        return [site for site in self.whole if site.level in levels]

    def parts(self, level: Level, ends: Mapping[Var, Site]) -> list[list[Equation]]:
        """The equations in their order, cut after every matmul with an adapter, and around scans with such inside."""
        parts: list[list[Equation]] = [[]]
        for equation in level.body.equations:
            if self.within(level, equation):
                parts += [[equation], []]
                continue
            parts[-1].append(equation)
            if equation.outvars and equation.outvars[0] in ends:
                parts.append([])
        return [part for part in parts if part]

    def kept(self, read: dict[int, Array], i: int, x: Array, key: Key[Array, ""]) -> Array:
        """The dropout of a value; kernels that read the same one share it."""
        # The same value may be read through two views; then it has another layout, and its own dropout.
        if i not in read or read[i].shape != x.shape:
            read[i] = _keep(jax.random.fold_in(key, i), x.shape, self.dropout)
        return read[i]

    def scan(
        self, level: Level, equation: Equation, values: Mapping[Var, Any], state: State, key: Key[Array, ""] | None
    ) -> list[Any]:
        """Runs a scan with adapters inside; those of stacks along it are scanned over."""
        (body,) = level.inner[equation.outvars[0]]
        operands = [x.val if isinstance(x, jex.Literal) else values[x] for x in equation.invars]
        params, (consts, carried) = equation.params, scan_counts(equation)
        whole: State = {}
        slices: dict[int, tuple[Array, Array]] = {}
        inside = self.within(level, equation)
        for i, site in enumerate(inside):
            a, b, stack = whole[site] = state[site]
            for digit in dict(site.product.scanned).get(level.depth, ()):
                k = stack.index(digit.axis)
                slices[i] = jnp.moveaxis(a, k, 0), jnp.moveaxis(b, k, 0)
                whole[site] = Factors(a, b, (*stack[:k], *stack[k + 1 :]))

        def step(carry: list[Any], each: tuple[list[Any], dict[int, tuple[Array, Array]], Array]) -> Any:
            xs, own, number = each
            here = whole | {inside[i]: Factors(*factors, whole[inside[i]].stack) for i, factors in own.items()}
            new = None if key is None else jax.random.fold_in(key, number)
            outputs = self.run(body, [*operands[:consts], *carry, *xs], here, new)
            return outputs[:carried], outputs[carried:]

        carry, ys = jax.lax.scan(
            step,
            operands[consts : consts + carried],
            (operands[consts + carried :], slices, jnp.arange(params["length"])),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys]


def _keep(key: Key[Array, ""], shape: tuple[int, ...], dropout: float) -> Float[Array, "..."]:
    """Zero with the probability `dropout`, else what keeps the mean."""
    level = round(dropout * DROPOUT_LEVELS)
    # Four elements out of each word: JAX spends a whole one on every element, however narrow its type.
    words = named(jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 4)), jnp.uint32))
    bits = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*shape[:-1], -1)[..., : shape[-1]]
    return jnp.where(bits >= level, DROPOUT_LEVELS / (DROPOUT_LEVELS - level), 0.0)


def _product(equation: Equation, site: Site, x: Float[Array, "..."], factors: Factors) -> Float[Array, "..."]:
    """What the matmul `equation` gives for a kernel ``a b``, computed as ``(x a) b``, in the dtype of a and b."""
    kernel, in_axes, out_axes = site.product, site.matmul.in_axes, site.matmul.out_axes
    a, b, _ = factors
    other = 1 - kernel.side
    contracted, batch = equation.params["dimension_numbers"]
    free = [i for i in range(len(kernel.axes)) if i not in (*contracted[kernel.side], *batch[kernel.side])]
    # a and b as the operand has the leaf's axes: [contracted ..., r] and [r, free ...].
    a = _as_operand(a, [kernel.axes[i] for i in contracted[kernel.side]], in_axes)
    b = _as_operand(jnp.moveaxis(b, 0, -1), [kernel.axes[i] for i in free], out_axes)
    y = _contract(x.astype(a.dtype), a, (tuple(contracted[other]), tuple(range(a.ndim - 1))))
    y = _contract(y, b, ((y.ndim - 1,), (b.ndim - 1,)))  # [rest of x ..., free ...]
    rest = [i for i in range(x.ndim) if i not in contracted[other]]
    before = [rest.index(i) for i in batch[other]]  # of size one
    of_x = [i for i in range(len(rest)) if i not in before]
    of_kernel = list(range(len(rest), len(rest) + len(free)))
    return y.transpose([*before, *(of_kernel + of_x if kernel.side == 0 else of_x + of_kernel)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract(
    x: Float[Array, "..."], factor: Float[Array, "..."], over: tuple[tuple[int, ...], tuple[int, ...]]
) -> Float[Array, "..."]:
    """x and one factor of an adapter contracted over axes of each: ``[rest of x ..., rest of the factor ...]``.

    The factor's gradient is computed with the narrow one of x and of what comes back as the left operand: XLA on a CPU
    transposes that one in memory, and has it the other way round if left to itself.
    """
    return jax.lax.dot_general(x, factor, (over, ((), ())))


def _contract_forward(x: Any, factor: Any, over: Any) -> tuple[Array, tuple[Array, Array]]:
    return _contract(x, factor, over), (x, factor)


def _contract_backward(over: Any, read: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, factor = read
    of_x, of_factor = over
    tokens = [i for i in range(x.ndim) if i not in of_x]
    pair = (g, x), (tuple(range(len(tokens))), tuple(tokens))
    free = [i for i in range(factor.ndim) if i not in of_factor]
    # The axes of the factor that g has, and those that x has, in x's order.
    made = [free, [of_factor[of_x.index(i)] for i in sorted(of_x)]]
    if g.size > x.size:
        pair, made = (pair[0][::-1], pair[1][::-1]), made[::-1]
    product = jax.lax.dot_general(*pair[0], (pair[1], ((), ())))
    # Without the barrier XLA takes the transpose into the product, and the other operand first again.
    product = jax.lax.optimization_barrier(product)
    order = [*made[0], *made[1]]
    (of_g,) = jax.linear_transpose(lambda x: jax.lax.dot_general(x, factor, (over, ((), ()))), x)(g)
    return of_g, product.transpose([order.index(i) for i in range(factor.ndim)])


_contract.defvjp(_contract_forward, _contract_backward)


def _as_operand(
    factor: Shaped[Array, "..."], axes: Sequence[Sequence[Digit]], leaf_axes: Sequence[int]
) -> Shaped[Array, "..."]:
    """A factor with the axes `leaf_axes` of a leaf, then r, as one with the operand's `axes`, then r."""
    place = {axis: i for i, axis in enumerate(leaf_axes)}
    digits = sorted({d for group in axes for d in group if d.axis in place}, key=lambda d: (place[d.axis], -d.stride))
    split = factor.reshape(*(d.size for d in digits), factor.shape[-1])
    order = [digits.index(d) for group in axes for d in group]
    sizes = [math.prod(d.size for d in group) for group in axes]
    return split.transpose(*order, len(digits)).reshape(*sizes, factor.shape[-1])

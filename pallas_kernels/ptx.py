"""The operations of `words`, each as its NVIDIA instruction, inside a Pallas kernel lowered by Triton."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.words import const as const
from pallas_kernels.words import high_half as high_half
from pallas_kernels.words import low_half as low_half
from pallas_kernels.words import shift_right as shift_right


def _one(instruction: str, *words: jax.Array) -> jax.Array:
    shape = jnp.broadcast_shapes(*(w.shape for w in words))
    (result,) = plt.elementwise_inline_asm(
        instruction,
        args=[jnp.broadcast_to(w, shape) for w in words],
        constraints="=r" + ",r" * len(words),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int32)],
    )
    return result


def permute(low, high, selector):
    """As `words.permute`."""
    if isinstance(selector, int):
        return _one(f"prmt.b32 $0, $1, $2, {selector:#x};", low, high)
    return _one("prmt.b32 $0, $1, $2, $3;", low, high, selector)


def funnel_right(low, high, amount):
    """As `words.funnel_right`."""
    return _one("shf.r.wrap.b32 $0, $1, $2, $3;", low, high, amount)


def subtract_pairs(a, b, dtype):
    """As `words.subtract_pairs`; as a fused a - 1 * b in bfloat16, which has no plain difference before sm_90."""
    if dtype == jnp.float16:
        return _one("sub.rn.f16x2 $0, $1, $2;", a, b)
    return _one("{ .reg .b32 m; mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 $0, $2, m, $1; }", a, b)


def scale_pairs(a, power, dtype):
    """As `words.scale_pairs`; subnormal numbers are not flushed without .ftz."""
    if dtype == jnp.float16:
        factor, kind = (power + 15) << 10, "f16x2"
    else:
        factor, kind = (power + 127) << 7, "bf16x2"
    word = factor << 16 | factor
    return _one(f"{{ .reg .b32 m, z; mov.b32 m, {word:#x}; mov.b32 z, 0x80008000; fma.rn.{kind} $0, $1, m, z; }}", a)

"""The operations of `words`, each as its NVIDIA instruction, inside a Pallas kernel lowered by Triton."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels import instructions
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
    return _one(instructions.PERMUTE, low, high, selector)


def funnel_right(low, high, amount):
    """As `words.funnel_right`."""
    return _one(instructions.FUNNEL_RIGHT, low, high, amount)


def subtract_pairs(a, b, dtype):
    """As `words.subtract_pairs`."""
    float16 = dtype == jnp.float16
    return _one(instructions.SUBTRACT_FLOAT16 if float16 else instructions.SUBTRACT_BFLOAT16, a, b)


def scale_pairs(a, power, dtype):
    """As `words.scale_pairs`."""
    return _one(instructions.scale(power, float16=dtype == jnp.float16), a)

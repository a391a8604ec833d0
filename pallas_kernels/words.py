"""Operations on 32-bit words that a GPU has as one instruction, spelled out in jnp.

`decode` is written against this module's functions. A backend replaces the module by one of the same names that emits
the instruction; in interpret mode and on other devices the definitions here are what runs. Words are int32 arrays,
integer constants are Python ints below 2^32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def const(value: int) -> np.int32:
    """A 32-bit pattern as the int32 it is."""
    return np.uint32(value).view(np.int32)


def shift_right(word: jax.Array, amount: int) -> jax.Array:
    """Logical shift by a constant below 32."""
    return lax.shift_right_logical(word, jnp.full_like(word, amount))


def permute(low: jax.Array, high: jax.Array, selector: jax.Array | int) -> jax.Array:
    """PRMT: byte i of the result is byte s of (high, low), s the low 3 bits of the selector's nibble i.

    With the nibble's fourth bit set, it is the sign of that byte, 0x00 or 0xff.
    """
    if isinstance(selector, int):
        selector = jnp.full_like(low, const(selector))
    out = jnp.zeros_like(low)
    for i in range(4):
        nibble = shift_right(selector, 4 * i) & 15
        byte = lax.shift_right_logical(jnp.where((nibble & 4) != 0, high, low), (nibble & 3) * 8) & 0xFF
        sign = jnp.where((byte & 0x80) != 0, 0xFF, 0)
        out = out | (jnp.where((nibble & 8) != 0, sign, byte) << (8 * i))
    return out


def funnel_right(low: jax.Array, high: jax.Array, amount: jax.Array) -> jax.Array:
    """SHF.R.WRAP: the lower word of (high, low) shifted right by amount, 0 to 31."""
    above = jnp.where(amount == 0, jnp.zeros_like(high), high << ((32 - amount) & 31))
    return lax.shift_right_logical(low, amount) | above


def _pairwise(function, dtype, *words):
    """A function of two 16-bit floats side by side in each word."""

    def half(*parts):
        result = function(*parts).astype(dtype)
        return lax.bitcast_convert_type(result, jnp.int16).astype(jnp.int32)

    low = half(*(low_half(w, dtype) for w in words))
    high = half(*(high_half(w, dtype) for w in words))
    return (low & 0xFFFF) | (high << 16)


def subtract_pairs(a: jax.Array, b: jax.Array, dtype) -> jax.Array:
    """a - b of two 16-bit floats in each word, exact in all uses here."""
    return _pairwise(lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), dtype, a, b)


def scale_pairs(a: jax.Array, power: int, dtype) -> jax.Array:
    """a * 2^power of two 16-bit floats in each word, subnormal ones included; exact in all uses here."""
    # XLA's CPU code flushes float32 subnormals, which bfloat16's are: the integer of a subnormal is scaled instead.
    info = jnp.finfo(dtype)
    mantissa, unit = (1 << info.nmant), 2.0 ** (power + int(info.minexp) - info.nmant)

    def scaled(x):
        bits = lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32)
        magnitude = bits & 0x7FFF
        small = jnp.where(bits < 0, -1.0, 1.0) * (magnitude.astype(jnp.float32) * unit)
        return jnp.where(magnitude < mantissa, small, x.astype(jnp.float32) * 2.0**power)

    return _pairwise(scaled, dtype, a)


def low_half(word: jax.Array, dtype) -> jax.Array:
    """The lower 16 bits as a float."""
    return lax.bitcast_convert_type(word.astype(jnp.int16), dtype)


def high_half(word: jax.Array, dtype) -> jax.Array:
    """The upper 16 bits as a float."""
    return low_half(shift_right(word, 16), dtype)

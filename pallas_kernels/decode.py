"""From packed words to weights, in registers: arithmetic only, for any backend.

A nibble of the bitmap says which of 4 neighbours are stored. Their values are next to each other in the stream, so
where a weight's value lies is the number of bits set before its own. All 4 are placed by byte permutes whose selectors
come from the nibble by multiplication, and what is not stored is cleared by a mask that comes from it too:
2 to 3 instructions a weight, no branch, no table. Everything is int32 arrays of one shape; `w` is `words` or a
backend's version of it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.words import const

_SPREAD = 0x10204080
"""Times a nibble: bit j of it becomes the sign bit of byte j."""


def quad_16(low, high, nibble, before, w) -> tuple[jax.Array, jax.Array]:
    """4 weights in two words, of 16-bit values in (high, low).

    Args:
      low, high: the next 4 values of the stream.
      nibble: which of the 4 weights are stored.
      before: 0x22222222 times the values to skip, or 0.
      w: word operations.
    """
    signs = nibble * const(_SPREAD)
    ones = w.shift_right(signs, 7) & const(0x01010101)
    # A byte of the selector names the two bytes of a value: 0x10 + 0x22 * (values before it), summed by multiplication.
    selector = ones * const(0x22222200) + before
    first = w.permute(low, high, selector) & w.permute(signs, signs, 0x9988)
    second = w.permute(low, high, w.shift_right(selector, 16)) & w.permute(signs, signs, 0xBBAA)
    return first, second


FIRST_16 = 0x10101010
"""`before` of `quad_16` where no value is skipped."""


def quad_8(word, nibble, before, w) -> jax.Array:
    """4 weights in one word, of the 8-bit values in it; `before` is 0x1111 times the values to skip, or 0."""
    spread = (nibble * const(0x41)) & const(0x0303)
    spread = (spread * const(0x9)) & const(0x1111)  # bit j at nibble j
    selector = spread * const(0x1110) + before
    signs = nibble * const(_SPREAD)
    return w.permute(word, word, selector & const(0x7777)) & w.permute(signs, signs, 0xBA98)


def widen(word, values: str, dtype, w) -> list[jax.Array]:
    """4 8-bit values in a word as two words of two bfloat16 or float16 each; exact."""
    if values == "int8" and dtype == jnp.float16:
        # 0x6400 + u is 1024 + u in float16: the value is that, with its sign bit flipped, less 1024 + 128.
        word = word ^ const(0x80808080)
        bias = jnp.full_like(word, const(0x64806480))
        magic = jnp.full_like(word, const(0x64646464))
        return [w.subtract_pairs(w.permute(word, magic, s), bias, dtype) for s in (0x4140, 0x4342)]
    zero = jnp.zeros_like(word)
    if values == "int8":
        # 0x4300 + u is 128 + u in bfloat16 for 7 bits u; adding the sign bit, 0x80, makes it 256: that is taken away.
        pairs = [w.permute(word, zero, s) for s in (0x4140, 0x4342)]
        base = const(0x43004300)
        return [w.subtract_pairs((p & const(0x007F007F)) | base, (p & const(0x00800080)) | base, dtype) for p in pairs]
    # e4m3: its exponent and mantissa, in place, are those of a float16 or bfloat16 a power of two too small.
    shift, power = (1, 8) if dtype == jnp.float16 else (4, 120)
    pairs = [w.permute(word, zero, s) for s in (0x1404, 0x3424)]
    placed = [(p & const(0x80008000)) | w.shift_right(p & const(0x7F007F00), shift) for p in pairs]
    return [w.scale_pairs(p, power, dtype) for p in placed]


def interleave(elements: Sequence[jax.Array]) -> jax.Array:
    """`[..., n]` of n arrays, n a power of 2, by stacking two at a time, which is all that Triton can."""

    def stack(parts):
        if len(parts) == 1:
            return parts[0]
        return jnp.stack([stack(parts[0::2]), stack(parts[1::2])], axis=-1)

    stacked = stack(list(elements))
    return stacked.reshape(*elements[0].shape, len(elements))


def halves(words: Sequence[jax.Array], dtype, w) -> list[jax.Array]:
    """The 16-bit floats of words, in order."""
    return [half(word, dtype) for word in words for half in (w.low_half, w.high_half)]


def capped_group(byte, planes: Sequence[jax.Array], values: str, dtype, w) -> list[jax.Array]:
    """The 8 weights of a group, as arrays of `dtype`.

    Args:
      byte: bitmap of the group, bits above the eighth zero.
      planes: the group's slots as in `formats.Capped`, widened to int32 with any upper bits.
      values: dtype of the slots.
      dtype: bfloat16 or float16 for 8-bit slots, else the slots' own.
      w: word operations.
    """
    low, high = byte & 15, w.shift_right(byte, 4)
    if values == "float32":
        return [
            lax.bitcast_convert_type(e, jnp.float32)
            for e in (*_select_32(planes, low, 0), *_select_32(planes, high, lax.population_count(low)))
        ]
    skipped = lax.population_count(low)
    if dtype_size(values) == 2:
        first, second = planes[0], planes[-1]
        base = jnp.full_like(byte, FIRST_16)
        words = [
            *quad_16(first, second, low, base, w),
            *quad_16(first, second, high, skipped * const(0x22222222) + base, w),
        ]
    else:
        word = planes[0] if len(planes) == 1 else (planes[0] & 0xFFFF) | (planes[1] << 16)
        quads = (quad_8(word, low, jnp.zeros_like(byte), w), quad_8(word, high, skipped * const(0x1111), w))
        words = [word for quad in quads for word in widen(quad, values, dtype, w)]
    return halves(words, dtype, w)


def _select_32(slots, nibble, before) -> list[jax.Array]:
    """4 weights of 32 bits: slot (number of bits before) where the bit is set, else zero."""
    place, out = before + jnp.zeros_like(nibble), []
    for j in range(4):
        bit = (nibble >> j) & 1
        value = slots[-1]
        for c in range(len(slots) - 2, -1, -1):
            value = jnp.where(place == c, slots[c], value)
        out.append(jnp.where(bit != 0, value, 0))
        place = place + bit
    return out


def bitmap_quad(nibble, words: Sequence[jax.Array], first, values: str, dtype, w) -> list[jax.Array]:
    """4 weights of a stream, as arrays of `dtype`.

    Args:
      nibble: which of them are stored.
      words: the words of the stream from the one that holds the first value: 3 for 16-bit values, 2 for 8-bit ones.
      first: index of the first value in the stream.
      values: dtype of the stream.
      dtype: bfloat16 or float16 for 8-bit values, else the stream's own.
      w: word operations.
    """
    if dtype_size(values) == 2:
        a, b, c = words
        amount = (first & 1) << 4
        quad = [*quad_16(w.funnel_right(a, b, amount), w.funnel_right(b, c, amount), nibble, const(FIRST_16), w)]
    else:
        a, b = words
        word = w.funnel_right(a, b, (first & 3) << 3)
        quad = widen(quad_8(word, nibble, jnp.zeros_like(nibble), w), values, dtype, w)
    return halves(quad, dtype, w)


def dtype_size(values: str) -> int:
    """Bytes of a stored value."""
    return {"float32": 4, "bfloat16": 2, "float16": 2}.get(values, 1)

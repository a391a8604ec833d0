"""`words` and `decode` in Triton's own language; see there for what is computed and why.

Words are uint32 here, which Triton shifts logically. `ASM` chooses between an instruction and its definition, which is
for Triton's interpreter: it knows no inline assembly.
"""

import triton
import triton.language as tl

from pallas_kernels import instructions

_PERMUTE = tl.constexpr(instructions.PERMUTE)
_FUNNEL_RIGHT = tl.constexpr(instructions.FUNNEL_RIGHT)
_COUNT = tl.constexpr(instructions.COUNT)
_SUBTRACT_FLOAT16 = tl.constexpr(instructions.SUBTRACT_FLOAT16)
_SUBTRACT_BFLOAT16 = tl.constexpr(instructions.SUBTRACT_BFLOAT16)
_SCALE_FLOAT16 = tl.constexpr(instructions.scale(8, float16=True))
_SCALE_BFLOAT16 = tl.constexpr(instructions.scale(120, float16=False))


@triton.jit
def permute(low, high, selector, ASM: tl.constexpr):
    """As `words.permute`."""
    if ASM:
        return tl.inline_asm_elementwise(_PERMUTE, "=r,r,r,r", [low, high, selector], tl.uint32, is_pure=True, pack=1)
    else:
        selector = selector + (low & 0)
        out = low & 0
        for i in tl.static_range(4):
            nibble = (selector >> (4 * i)) & 15
            byte = (tl.where((nibble & 4) != 0, high, low) >> ((nibble & 3) * 8)) & 0xFF
            sign = (byte >> 7) * 0xFF
            out = out | (tl.where((nibble & 8) != 0, sign, byte) << (8 * i))
        return out


@triton.jit
def funnel_right(low, high, amount, ASM: tl.constexpr):
    """As `words.funnel_right`."""
    if ASM:
        return tl.inline_asm_elementwise(
            _FUNNEL_RIGHT, "=r,r,r,r", [low, high, amount], tl.uint32, is_pure=True, pack=1
        )
    else:
        return (((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> amount.to(tl.uint64)).to(tl.uint32)


@triton.jit
def count(word, ASM: tl.constexpr):
    """Bits set."""
    if ASM:
        return tl.inline_asm_elementwise(_COUNT, "=r,r", [word], tl.uint32, is_pure=True, pack=1)
    else:
        pairs = word - ((word >> 1) & 0x55555555)
        fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        return (((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _half(word, DTYPE: tl.constexpr):
    """The lower 16 bits as a float."""
    return (word & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def _bits(x, DTYPE: tl.constexpr):
    """Of a float32, rounded to a 16-bit float; the inverse of `_half`."""
    return x.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _subtract_pairs(a, b, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """As `words.subtract_pairs`."""
    if ASM:
        if tl.float16 == DTYPE:
            return tl.inline_asm_elementwise(_SUBTRACT_FLOAT16, "=r,r,r", [a, b], tl.uint32, is_pure=True, pack=1)
        else:
            return tl.inline_asm_elementwise(_SUBTRACT_BFLOAT16, "=r,r,r", [a, b], tl.uint32, is_pure=True, pack=1)
    else:
        low = _half(a, DTYPE).to(tl.float32) - _half(b, DTYPE).to(tl.float32)
        high = _half(a >> 16, DTYPE).to(tl.float32) - _half(b >> 16, DTYPE).to(tl.float32)
        return _bits(low, DTYPE) | (_bits(high, DTYPE) << 16)


@triton.jit
def _scale_e4m3(a, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """As `words.scale_pairs`, by the powers that `decode.widen` takes."""
    if ASM:
        if tl.float16 == DTYPE:
            return tl.inline_asm_elementwise(_SCALE_FLOAT16, "=r,r", [a], tl.uint32, is_pure=True, pack=1)
        else:
            return tl.inline_asm_elementwise(_SCALE_BFLOAT16, "=r,r", [a], tl.uint32, is_pure=True, pack=1)
    else:
        power = 256.0 if tl.float16 == DTYPE else 1.329227995784916e36  # 2^8, 2^120
        low = _bits(_half(a, DTYPE).to(tl.float32) * power, DTYPE)
        return low | (_bits(_half(a >> 16, DTYPE).to(tl.float32) * power, DTYPE) << 16)


@triton.jit
def quad_16(low, high, nibble, before, ASM: tl.constexpr):
    """As `decode.quad_16`."""
    signs = nibble * 0x10204080
    selector = ((signs >> 7) & 0x01010101) * 0x22222200 + before
    first = permute(low, high, selector, ASM) & permute(signs, signs, 0x9988, ASM)
    second = permute(low, high, selector >> 16, ASM) & permute(signs, signs, 0xBBAA, ASM)
    return first, second


@triton.jit
def quad_8(word, nibble, before, ASM: tl.constexpr):
    """As `decode.quad_8`."""
    spread = ((nibble * 0x41) & 0x0303) * 0x9
    selector = (spread & 0x1111) * 0x1110 + before
    signs = nibble * 0x10204080
    return permute(word, word, selector & 0x7777, ASM) & permute(signs, signs, 0xBA98, ASM)


@triton.jit
def widen(word, VALUES: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """As `decode.widen`."""
    zero = word & 0
    if VALUES == "int8":
        if tl.float16 == DTYPE:
            word = word ^ 0x80808080
            first = permute(word, zero + 0x64646464, 0x4140, ASM)
            second = permute(word, zero + 0x64646464, 0x4342, ASM)
            bias = zero + 0x64806480
            return _subtract_pairs(first, bias, DTYPE, ASM), _subtract_pairs(second, bias, DTYPE, ASM)
        else:
            a, b = permute(word, zero, 0x4140, ASM), permute(word, zero, 0x4342, ASM)
            first = _subtract_pairs((a & 0x007F007F) | 0x43004300, (a & 0x00800080) | 0x43004300, DTYPE, ASM)
            second = _subtract_pairs((b & 0x007F007F) | 0x43004300, (b & 0x00800080) | 0x43004300, DTYPE, ASM)
            return first, second
    else:
        SHIFT: tl.constexpr = 1 if tl.float16 == DTYPE else 4
        a, b = permute(word, zero, 0x1404, ASM), permute(word, zero, 0x3424, ASM)
        first = _scale_e4m3((a & 0x80008000) | ((a & 0x7F007F00) >> SHIFT), DTYPE, ASM)
        second = _scale_e4m3((b & 0x80008000) | ((b & 0x7F007F00) >> SHIFT), DTYPE, ASM)
        return first, second


@triton.jit
def four(a, b, DTYPE: tl.constexpr):
    """`[..., 4]`: the 16-bit floats of two words, in order."""
    return interleave(_half(a, DTYPE), _half(a >> 16, DTYPE), _half(b, DTYPE), _half(b >> 16, DTYPE))


@triton.jit
def interleave(a, b, c, d):
    """`[..., 2, 2]`: a, b, c and d side by side."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _slot(p0, p1, p2, p3, place, PLANES: tl.constexpr):
    value = p0
    if PLANES > 1:
        value = tl.where(place >= 1, p1, value)
    if PLANES > 2:
        value = tl.where(place >= 2, p2, value)
    if PLANES > 3:
        value = tl.where(place >= 3, p3, value)
    return value


@triton.jit
def select_32(p0, p1, p2, p3, nibble, place, PLANES: tl.constexpr):
    """As `decode._select_32`, interleaved."""
    a = tl.where((nibble & 1) != 0, _slot(p0, p1, p2, p3, place, PLANES), 0)
    place += nibble & 1
    b = tl.where((nibble & 2) != 0, _slot(p0, p1, p2, p3, place, PLANES), 0)
    place += (nibble >> 1) & 1
    c = tl.where((nibble & 4) != 0, _slot(p0, p1, p2, p3, place, PLANES), 0)
    place += (nibble >> 2) & 1
    d = tl.where((nibble & 8) != 0, _slot(p0, p1, p2, p3, place, PLANES), 0)
    return interleave(a, b, c, d).to(tl.float32, bitcast=True)

"""The kernels in Triton's own language: what `_pallas` has, for `jax_triton`.

Formats, tiles, shares and sums are the same; see there for why. Arrays are flat memory, and all sizes are constants of
the compiled kernel. Imported by `_triton` alone: it needs the `triton` package.
"""

import triton
import triton.language as tl

from pallas_kernels.triton_decode import count, four, funnel_right, interleave, quad_8, quad_16, select_32, widen


@triton.jit
def _plane(pointer, at):
    return tl.load(pointer + at).to(tl.uint32)


@triton.jit
def _capped_tile(
    bits, p0, p1, p2, p3, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PLANES: tl.constexpr, VALUES: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Dense `[ROWS, COLUMNS]` of outputs at `rows`, counted over all tiles; as `_pallas._CappedReader`."""
    words = tl.load(bits + rows[:, None] * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)[None, :])
    words = words.to(tl.uint32, bitcast=True)
    byte = (words[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]) & 0xFF
    byte = tl.reshape(byte, (ROWS, COLUMNS // 8))
    at = rows[:, None] * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
    s0 = _plane(p0, at)
    s1 = _plane(p1, at) if PLANES > 1 else s0
    s2 = _plane(p2, at) if PLANES > 2 else s0
    s3 = _plane(p3, at) if PLANES > 3 else s0
    low, high = byte & 15, byte >> 4
    skipped = count(low, ASM)
    if VALUES == "float32":
        first = select_32(s0, s1, s2, s3, low, low & 0, PLANES)
        second = select_32(s0, s1, s2, s3, high, skipped, PLANES)
    elif VALUES == "bfloat16" or VALUES == "float16":
        a, b = quad_16(s0, s1, low, 0x10101010, ASM)
        c, d = quad_16(s0, s1, high, skipped * 0x22222222 + 0x10101010, ASM)
        first, second = four(a, b, DTYPE), four(c, d, DTYPE)
    else:
        word = s0 if PLANES == 1 else (s0 & 0xFFFF) | (s1 << 16)
        a, b = widen(quad_8(word, low, 0, ASM), VALUES, DTYPE, ASM)
        c, d = widen(quad_8(word, high, skipped * 0x1111, ASM), VALUES, DTYPE, ASM)
        first, second = four(a, b, DTYPE), four(c, d, DTYPE)
    # [..., 2, 2] each: fours side by side are [..., 2, 2, 2] with the first axis between them.
    both = tl.join(first, second)
    return tl.reshape(tl.permute(both, (0, 1, 4, 2, 3)), (ROWS, COLUMNS))


@triton.jit
def _bitmap_ahead(tiles, row_starts, bits, tile, rows, COLUMNS: tl.constexpr):
    """What has to be known of a tile before its values can be asked for; loaded one step early."""
    words = tl.load(bits + rows[:, None] * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)[None, :])
    starts = tl.load(tiles + tile) + tl.load(row_starts + rows).to(tl.int32)
    return starts, words.to(tl.uint32, bitcast=True)


@triton.jit
def _word(pointer):
    return tl.load(pointer).to(tl.uint32, bitcast=True)


@triton.jit
def _bitmap_tile(
    values, starts, words, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    VALUES: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Dense `[ROWS, COLUMNS]`; as `_pallas._BitmapReader`."""
    counts = count(words, ASM).to(tl.int32)
    starts = starts[:, None] + (tl.cumsum(counts, axis=1) - counts)
    place = (tl.arange(0, 8) * 4).to(tl.uint32)[None, None, :]
    wide = words[:, :, None] + (place & 0)
    below = wide & ((place * 0 + 1 << place) - 1)
    first = starts.to(tl.uint32, bitcast=True)[:, :, None] + count(below, ASM)
    nibble = (wide >> place) & 15
    if VALUES == "float32":
        pointer = values + first.to(tl.int32, bitcast=True)
        a = tl.where((nibble & 1) != 0, _word(pointer), 0)
        pointer += (nibble & 1).to(tl.int32)
        b = tl.where((nibble & 2) != 0, _word(pointer), 0)
        pointer += ((nibble >> 1) & 1).to(tl.int32)
        c = tl.where((nibble & 4) != 0, _word(pointer), 0)
        pointer += ((nibble >> 2) & 1).to(tl.int32)
        d = tl.where((nibble & 8) != 0, _word(pointer), 0)
        dense = interleave(a, b, c, d).to(tl.float32, bitcast=True)
    elif VALUES == "bfloat16" or VALUES == "float16":
        pointer = values + (first >> 1).to(tl.int32, bitcast=True)
        amount = (first & 1) << 4
        a, b, c = _word(pointer), _word(pointer + 1), _word(pointer + 2)
        low, high = funnel_right(a, b, amount, ASM), funnel_right(b, c, amount, ASM)
        a, b = quad_16(low, high, nibble, 0x10101010, ASM)
        dense = four(a, b, DTYPE)
    else:
        pointer = values + (first >> 2).to(tl.int32, bitcast=True)
        word = funnel_right(_word(pointer), _word(pointer + 1), (first & 3) << 3, ASM)
        a, b = widen(quad_8(word, nibble, 0, ASM), VALUES, DTYPE, ASM)
        dense = four(a, b, DTYPE)
    return tl.reshape(dense, (ROWS, COLUMNS))


@triton.jit
def _rows_of(first, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Row of tiles of this program, and its outputs there."""
    m = tl.program_id(0)
    PARTS: tl.constexpr = TILE_ROWS // ROWS
    return first + m // PARTS, m % PARTS * ROWS + tl.arange(0, ROWS)


@triton.jit
def _product(
    dense, x, k, N: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, DOT: tl.constexpr
):
    """Of tile `k` with the batch; rows past it read its last one again, and what comes of them is not written."""
    known = tl.minimum(tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), N - 1)
    at = known[:, None] * (STEPS * COLUMNS) + k * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rows = tl.load(x + at)
    return tl.dot(dense.to(DOT), tl.trans(rows.to(DOT)), input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _share_of(STEPS: tl.constexpr, SPLIT: tl.constexpr):
    """First tile and number of tiles of this program's share.

    Shares differ by one tile at most, and even an empty one begins within. Those of `tiles.share_of` cost 128 registers
    instead of 96 in `bitmap_multiply`.
    """
    share = tl.program_id(1)
    begin = share * STEPS // SPLIT
    return begin, (share + 1) * STEPS // SPLIT - begin


@triton.jit
def _write(out, total, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    outputs = tl.num_programs(0) * ROWS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at = (tl.program_id(1) * N + columns)[None, :] * outputs + rows[:, None]
    tl.store(out + at, total, mask=(columns < N)[None, :])


@triton.jit
def capped_multiply(
    bits, p0, p1, p2, p3, x, out,
    STEPS: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr,
    VALUES: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Partial sums `[SPLIT, N, outputs]` of x `[N, STEPS * COLUMNS]`; planes that there are not are any others."""
    m, rows = _rows_of(0, ROWS, TILE_ROWS)
    begin, tiles_of_share = _share_of(STEPS, SPLIT)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(0, STEPS // SPLIT if STEPS % SPLIT == 0 else tiles_of_share):
        k = begin + i
        here = (m * STEPS + k) * TILE_ROWS + rows
        dense = _capped_tile(bits, p0, p1, p2, p3, here, ROWS, COLUMNS, PLANES, VALUES, DTYPE, ASM)
        total += _product(dense, x, k, N, BLOCK, COLUMNS, STEPS, DOT)
    _write(out, total, N, BLOCK, ROWS)


@triton.jit
def bitmap_multiply(
    tiles, row_starts, bits, values, x, out,
    STEPS: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    VALUES: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `capped_multiply`."""
    m, rows = _rows_of(0, ROWS, TILE_ROWS)
    begin, tiles_of_share = _share_of(STEPS, SPLIT)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    tile = m * STEPS + begin
    starts, words = _bitmap_ahead(tiles, row_starts, bits, tile, tile * TILE_ROWS + rows, COLUMNS)
    for i in range(0, STEPS // SPLIT if STEPS % SPLIT == 0 else tiles_of_share):
        k = begin + i
        following = m * STEPS + tl.minimum(k + 1, STEPS - 1)
        ahead = _bitmap_ahead(tiles, row_starts, bits, following, following * TILE_ROWS + rows, COLUMNS)
        dense = _bitmap_tile(values, starts, words, ROWS, COLUMNS, VALUES, DTYPE, ASM)
        total += _product(dense, x, k, N, BLOCK, COLUMNS, STEPS, DOT)
        starts, words = ahead
    _write(out, total, N, BLOCK, ROWS)


@triton.jit
def _write_dense(out, dense, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = rows[:, None] * (STEPS * COLUMNS) + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + at, dense)


@triton.jit
def capped_dense(
    bits, p0, p1, p2, p3, out,
    STEPS: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PLANES: tl.constexpr, VALUES: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Outputs from row `FIRST` of tiles on, dense `[outputs, STEPS * COLUMNS]`, one tile a program."""
    m, rows = _rows_of(FIRST, ROWS, TILE_ROWS)
    here = (m * STEPS + tl.program_id(1)) * TILE_ROWS + rows
    dense = _capped_tile(bits, p0, p1, p2, p3, here, ROWS, COLUMNS, PLANES, VALUES, DTYPE, ASM)
    _write_dense(out, dense, STEPS, ROWS, COLUMNS)


@triton.jit
def bitmap_dense(
    tiles, row_starts, bits, values, out,
    STEPS: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    VALUES: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `capped_dense`."""
    m, rows = _rows_of(FIRST, ROWS, TILE_ROWS)
    tile = m * STEPS + tl.program_id(1)
    starts, words = _bitmap_ahead(tiles, row_starts, bits, tile, tile * TILE_ROWS + rows, COLUMNS)
    _write_dense(out, _bitmap_tile(values, starts, words, ROWS, COLUMNS, VALUES, DTYPE, ASM), STEPS, ROWS, COLUMNS)

"""NVIDIA's instructions for the operations of `words`, as inline assembly: both backends give them to Triton."""

PERMUTE = "prmt.b32 $0, $1, $2, $3;"
FUNNEL_RIGHT = "shf.r.wrap.b32 $0, $1, $2, $3;"
COUNT = "popc.b32 $0, $1;"
SUBTRACT_FLOAT16 = "sub.rn.f16x2 $0, $1, $2;"
SUBTRACT_BFLOAT16 = "{ .reg .b32 m; mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 $0, $2, m, $1; }"
"""A fused a - 1 * b: bfloat16 has no plain difference before sm_90."""


def scale(power: int, *, float16: bool) -> str:
    """Two floats times 2^power; subnormal numbers are not flushed without .ftz."""
    factor, kind = ((power + 15) << 10, "f16x2") if float16 else ((power + 127) << 7, "bf16x2")
    word = factor << 16 | factor
    return f"{{ .reg .b32 m, z; mov.b32 m, {word:#x}; mov.b32 z, 0x80008000; fma.rn.{kind} $0, $1, m, z; }}"

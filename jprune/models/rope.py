"""Rotary position embeddings and their scalings for longer contexts.

Su et al., "RoFormer" (arXiv:2104.09864), in the half-split pairing of most Hugging Face checkpoints, dimension j with
j + head_dim / 2, or in the paper's own, 2j with 2j + 1 (`interleaved`). A scaling changes only the angular frequencies
(and, for YaRN and LongRoPE, multiplies cos and sin by an attention factor):

`linear`   every frequency divided by `factor` (position interpolation, arXiv:2306.15595)
`dynamic`  theta grows with the sequence once it is longer than the context ("dynamic NTK")
`yarn`     a ramp over the dimensions between plain and interpolated frequencies (arXiv:2309.00071)
`llama3`   as YaRN's idea, the ramp taken over wavelengths (Llama 3.1)
`longrope` a divisor for every frequency, one list for short and one for long sequences (arXiv:2402.13753)
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jprune.annotations import Array, Float, Int
from jprune.errors import JpruneError

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Which rotary embedding; fields that a kind does not name above are not read by it."""

    kind: str = "default"
    theta: float = 10_000.0
    dims: int | None = None  # first dimensions of a head that are turned, the others are not; None: all
    interleaved: bool = False  # neighbouring dimensions are paired
    factor: float = 1.0  # new context / original context: linear, dynamic, yarn, llama3
    context: int = 2048  # dynamic, longrope: the length up to which nothing grows; yarn, llama3: that of pretraining
    attention_factor: float = 1.0  # yarn, longrope: cos and sin are multiplied by it
    beta_fast: float = 32.0  # yarn: rotations within the context above which a dimension keeps its frequency
    beta_slow: float = 1.0  # yarn: rotations below which a dimension is interpolated by `factor`
    truncate: bool = True  # yarn: the ramp's ends are rounded to whole dimensions
    low_freq_factor: float = 1.0  # llama3: wavelengths above context / low_freq_factor are interpolated
    high_freq_factor: float = 4.0  # llama3: wavelengths below context / high_freq_factor are kept
    short: tuple[float, ...] = ()  # longrope: divisors within the context
    long: tuple[float, ...] = ()  # longrope: divisors in sequences beyond it

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise JpruneError(f"unsupported rope_type {self.kind!r} in config.json; supported: {', '.join(KINDS)}")
        if not (1 < self.theta < math.inf and 0 < self.factor < math.inf and self.context > 0):  # a NaN is none of it
            raise JpruneError(
                f"rope parameters in config.json do not fit: theta {self.theta} (must be > 1), "
                f"factor {self.factor} and context {self.context} (must be > 0)"
            )


def frequencies(rope: Rope, head_dim: int, *, long: bool = False) -> Float[np.ndarray, "half"]:
    """Angle per position of each rotated pair, float32 [dims / 2].

    Those of `dynamic` are within the context; `long` gives those of `longrope` beyond it.
    """
    head_dim = head_dim if rope.dims is None else rope.dims
    exponents = np.arange(0, head_dim, 2) / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "longrope":
        divisors = rope.long if long else rope.short
        if len(divisors) != len(plain):
            raise JpruneError(
                f"config.json: longrope gives {len(divisors)} factors for {len(plain)} pairs of rotated dimensions"
            )
        plain = plain / np.asarray(divisors)
    elif rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "yarn":
        kept = 1.0 - _yarn_ramp(rope, head_dim)
        plain = plain / rope.factor * (1.0 - kept) + plain * kept
    elif rope.kind == "llama3":
        rotations = rope.context * plain / (2 * math.pi)
        kept = np.clip((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
        plain = plain / rope.factor * (1.0 - kept) + plain * kept
    return plain.astype(np.float32)


def _yarn_ramp(rope: Rope, head_dim: int) -> Float[np.ndarray, "half"]:
    """0 where a pair keeps its frequency, 1 where it is interpolated, linear in between."""

    def pair_with(rotations: float) -> float:  # the (fractional) pair that turns so often within the context
        return head_dim * math.log(rope.context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as in the authors' code: a step instead of a division by zero
    return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)


def _dynamic_frequencies(rope: Rope, head_dim: int, length: Int[Array, ""]) -> Float[Array, "half"]:
    """Frequencies at a sequence length: theta is scaled such that the slowest pair is stretched by the excess."""
    excess = rope.factor * jnp.maximum(length, rope.context).astype(jnp.float32) / rope.context - (rope.factor - 1)
    theta = rope.theta * excess ** (head_dim / (head_dim - 2))
    return theta ** jnp.asarray(-np.arange(0, head_dim, 2) / head_dim, jnp.float32)


def rotations(
    rope: Rope, head_dim: int, positions: Int[Array, "... time"]
) -> tuple[Float[Array, "... time half"], Float[Array, "... time half"]]:
    """cos and sin of every pair's angle at the positions, float32."""
    dims = head_dim if rope.dims is None else rope.dims
    if rope.kind == "dynamic" and dims > 2:
        speed = _dynamic_frequencies(rope, dims, positions.max() + 1)
    elif rope.kind == "longrope":
        short, long = (jnp.asarray(frequencies(rope, head_dim, long=long)) for long in (False, True))
        speed = jnp.where(positions.max() + 1 > rope.context, long, short)
    else:
        speed = jnp.asarray(frequencies(rope, head_dim))
    angles = positions[..., None].astype(jnp.float32) * speed
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "batch time heads head_dim"],
    rotation: tuple[Float[Array, "... time half"], Float[Array, "... time half"]],
    *,
    interleaved: bool = False,
) -> Float[Array, "batch time heads head_dim"]:
    """Turn every pair of every head by its angle; computed in float32, returned in x's dtype.

    There may be fewer pairs than half of head_dim: the dimensions that follow them stay as they are.
    """
    cos, sin = (part[..., None, :] for part in rotation)
    dims = 2 * cos.shape[-1]
    if dims < x.shape[-1]:
        turned = rotate(x[..., :dims], rotation, interleaved=interleaved)
        return jnp.concatenate([turned, x[..., dims:]], axis=-1)
    wide = x.astype(jnp.float32)
    if interleaved:
        pairs = wide.reshape(*x.shape[:-1], dims // 2, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    pair = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        pair = [part[..., None] for part in pair]
    return jnp.concatenate(pair, axis=-1).reshape(x.shape).astype(x.dtype)

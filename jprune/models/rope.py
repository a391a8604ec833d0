"""Rotary position embeddings and their scalings for longer contexts.

Su et al., "RoFormer" (arXiv:2104.09864), in the half-split pairing that Hugging Face checkpoints store: dimension j is
paired with j + head_dim / 2. A scaling changes only the angular frequencies (and, for YaRN, multiplies cos and sin by
an attention factor):

`linear`   every frequency divided by `factor` (position interpolation, arXiv:2306.15595)
`dynamic`  theta grows with the sequence once it is longer than the context ("dynamic NTK")
`yarn`     a ramp over the dimensions between plain and interpolated frequencies (arXiv:2309.00071)
`llama3`   as YaRN's idea, the ramp taken over wavelengths (Llama 3.1)
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jprune.errors import JpruneError

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Which rotary embedding; fields that a kind does not name above are not read by it."""

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0  # new context / original context: linear, dynamic, yarn, llama3
    context: int = 2048  # dynamic: the length from which theta grows; yarn, llama3: the length of pretraining
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    beta_fast: float = 32.0  # yarn: rotations within the context above which a dimension keeps its frequency
    beta_slow: float = 1.0  # yarn: rotations below which a dimension is interpolated by `factor`
    truncate: bool = True  # yarn: the ramp's ends are rounded to whole dimensions
    low_freq_factor: float = 1.0  # llama3: wavelengths above context / low_freq_factor are interpolated
    high_freq_factor: float = 4.0  # llama3: wavelengths below context / high_freq_factor are kept

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise JpruneError(f"unsupported rope_type {self.kind!r} in config.json; supported: {', '.join(KINDS)}")
        if self.theta <= 1 or self.factor <= 0 or self.context <= 0:
            raise JpruneError(
                f"rope parameters in config.json do not fit: theta {self.theta} (must be > 1), "
                f"factor {self.factor} and context {self.context} (must be > 0)"
            )


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, "half"]:
    """Angle per position of each rotated pair, float32 [head_dim / 2] (for `dynamic`: within the context)."""
    exponents = np.arange(0, head_dim, 2) / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
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
    if rope.kind == "dynamic" and head_dim > 2:
        speed = _dynamic_frequencies(rope, head_dim, positions.max() + 1)
    else:
        speed = jnp.asarray(frequencies(rope, head_dim))
    angles = positions[..., None].astype(jnp.float32) * speed
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "batch time heads head_dim"],
    rotation: tuple[Float[Array, "... time half"], Float[Array, "... time half"]],
) -> Float[Array, "batch time heads head_dim"]:
    """Turn every pair of every head by its angle; computed in float32, returned in x's dtype."""
    cos, sin = (part[..., None, :] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)

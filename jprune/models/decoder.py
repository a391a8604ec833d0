"""One decoder for every family: Flax NNX modules with explicit head axes, and the pure functions that stream through.

Shapes are the architecture. A module is built from its parameters (arrays, tracers or ShapeDtypeStructs in nested
dicts) and reads every size from them, and the presence of a bias, a QK-norm or an untied head too: surgery and
per-layer sizes need no other description. What no array can tell (rotary embedding, window, activation, epsilon) comes
from the config.

Axes in comments: B batch, T time (queries), S keys, H query heads, K key/value heads, G = H / K, D head_dim.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, Key

from jprune import trees
from jprune.models.attention import Cache, attend
from jprune.models.config import DecoderConfig, shapes
from jprune.models.rope import Rope, rotate, rotations

Params = Mapping[str, Any]  # nested dicts; leaves are arrays

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Linear(nnx.Module):
    """y = x kernel (+ bias): the kernel's first `inputs` axes meet x's last ones in one dot_general."""

    def __init__(self, params: Params, *, inputs: int = 1):
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None
        self.inputs = inputs

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Apply to [..., *d_in]; gives [..., *d_out] in x's dtype."""
        y = jnp.tensordot(x, self.kernel.get_value().astype(x.dtype), axes=self.inputs)
        return y if self.bias is None else y + self.bias.get_value().astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, the mean of squares in float32 (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, params: Params, *, eps: float):
        self.scale = nnx.Param(params["scale"])
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalise the last axis; in x's dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale.get_value().astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions, optional QK-norm and sliding window."""

    def __init__(self, params: Params, *, rope: Rope, window: int | None, eps: float):
        self.q, self.k, self.v = (Linear(params[name]) for name in "qkv")
        self.o = Linear(params["o"], inputs=2)
        self.q_norm = RMSNorm(params["q_norm"], eps=eps) if "q_norm" in params else None
        self.k_norm = RMSNorm(params["k_norm"], eps=eps) if "k_norm" in params else None
        self.rope = rope
        self.window = window

    def __call__(
        self,
        x: Float[Array, "B T d_model"],
        positions: Int[Array, "... T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T d_model"], Cache | None]:
        """Attend within x and, with a cache, to what it holds before x; returns the cache with x's keys added."""
        q, k, v = self.q(x), self.k(x), self.v(x)  # [B, T, H | K, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        start = 0 if cache is None else cache.length
        if positions is None:
            positions = jnp.arange(x.shape[1]) + start
        turn = rotations(self.rope, q.shape[-1], positions)
        q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            cache = cache.extend(k, v)
            k, v = cache.keys, cache.values
        return self.o(attend(q, k, v, start=start, window=self.window)), cache


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202)."""

    def __init__(self, params: Params, *, activation: str):
        self.gate, self.up, self.down = (Linear(params[name]) for name in ("gate", "up", "down"))
        self.activation = activation

    def __call__(self, x: Float[Array, "B T d_model"]) -> Float[Array, "B T d_model"]:
        """Each position by itself."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One decoder layer, pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, params: Params, *, rope: Rope, window: int | None, eps: float, activation: str):
        self.attn_norm = RMSNorm(params["attn_norm"], eps=eps)
        self.attn = Attention(params["attn"], rope=rope, window=window, eps=eps)
        self.mlp_norm = RMSNorm(params["mlp_norm"], eps=eps)
        self.mlp = GatedMLP(params["mlp"], activation=activation)

    def __call__(
        self,
        x: Float[Array, "B T d_model"],
        positions: Int[Array, "... T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T d_model"], Cache | None]:
        """The residual stream after this layer, and the cache with this layer's keys and values."""
        attended, cache = self.attn(self.attn_norm(x), positions, cache)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Embed(nnx.Module):
    """A row of the table for each token."""

    def __init__(self, params: Params):
        self.embedding = nnx.Param(params["embedding"])

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T d_model"]:
        """Look up; the table's dtype is the dtype in which the blocks compute."""
        return jnp.take(self.embedding.get_value(), tokens, axis=0, mode="clip")


class Decoder(nnx.Module):
    """The whole model as one NNX module, for `nnx.split`, `nnx.Optimizer` and the like; its state is our tree."""

    def __init__(self, config: DecoderConfig, params: Params):
        self.embed = Embed(params["embed"])
        self.blocks = nnx.Dict(
            {str(i): Block(params["blocks"][str(i)], **_block_options(config, i)) for i in range(config.layers)}
        )
        self.final_norm = RMSNorm(params["final_norm"], eps=config.norm_eps)
        self.head = Linear(params["head"]) if "head" in params else None

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T vocab"]:
        """Logits in float32."""
        x = self.embed(tokens)
        for i in range(len(self.blocks)):
            x, _ = self.blocks[str(i)](x)
        head = self.head.kernel.get_value() if self.head is not None else self.embed.embedding.get_value().T
        return _logits(self.final_norm(x), head)


def _logits(x: Float[Array, "B T d_model"], kernel: Float[Array, "d_model vocab"]) -> Float[Array, "B T vocab"]:
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=1, preferred_element_type=jnp.float32)


def _block_options(config: DecoderConfig, index: int) -> dict[str, Any]:
    return {
        "rope": config.rope,
        "window": config.windows[index],
        "eps": config.norm_eps,
        "activation": config.activation,
    }


def embed(config: DecoderConfig) -> Callable[..., Float[Array, "B T d_model"]]:
    """`f({"embed": ...}, tokens [B, T]) -> x [B, T, d_model]`, in the embedding's dtype."""
    del config  # nothing in it matters yet
    return _embed


def _embed(params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T d_model"]:
    return Embed(params["embed"])(tokens)


def block(config: DecoderConfig, index: int) -> Callable[..., Float[Array, "B T d_model"]]:
    """`f(params of blocks/<index>, x [B, T, d_model], positions=None) -> x`, computed in x's dtype.

    Layers that do not differ get the same function object, so jit compiles it once for all of them. `positions`
    [T] or [B, T] only turn queries and keys; the causal mask follows the order in x.
    """
    return _block(**_block_options(config, index))


@functools.cache
def _block(**options: Any) -> Callable[..., Float[Array, "B T d_model"]]:
    def block(
        params: Params, x: Float[Array, "B T d_model"], positions: Int[Array, "... T"] | None = None
    ) -> Float[Array, "B T d_model"]:
        return Block(params, **options)(x, positions)[0]

    return block


def cached_block(config: DecoderConfig, index: int) -> Callable[..., tuple[Float[Array, "B T d_model"], Cache]]:
    """`f(params of blocks/<index>, x, cache) -> (x, cache)`: as `block`, attending to the cache's tokens too."""
    return _cached_block(**_block_options(config, index))


@functools.cache
def _cached_block(**options: Any) -> Callable[..., tuple[Float[Array, "B T d_model"], Cache]]:
    def cached_block(
        params: Params, x: Float[Array, "B T d_model"], cache: Cache
    ) -> tuple[Float[Array, "B T d_model"], Cache]:
        x, extended = Block(params, **options)(x, None, cache)
        assert extended is not None  # a cache went in
        return x, extended

    return cached_block


def head(config: DecoderConfig) -> Callable[..., Float[Array, "B T vocab"]]:
    """`f({"final_norm": ..., "head" or "embed": ...}, x) -> logits [B, T, vocab]` in float32.

    Without a "head" the embedding is used, transposed; so tied models are given "embed" only.
    """
    return _head(config.norm_eps)


@functools.cache
def _head(eps: float) -> Callable[..., Float[Array, "B T vocab"]]:
    def head(params: Params, x: Float[Array, "B T d_model"]) -> Float[Array, "B T vocab"]:
        kernel = params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T
        return _logits(RMSNorm(params["final_norm"], eps=eps)(x), kernel)

    return head


def apply(config: DecoderConfig, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T vocab"]:
    """Logits (float32) of a whole model in memory."""
    x = embed(config)(params, tokens)
    for i in range(config.layers):
        x = block(config, i)(params["blocks"][str(i)], x)
    return head(config)(params, x)


def abstract_params(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """The parameter tree that the config describes, as ShapeDtypeStructs."""
    return trees.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes(config).items()})


def init_params(config: DecoderConfig, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Random parameters: kernels and embedding normal with deviation 0.02, norm scales one, biases zero.

    Drawn on the host, which spares the compilation of a generator for every shape.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    params = {}
    for path, shape in shapes(config).items():
        if path.endswith("/scale"):
            params[path] = jnp.ones(shape, dtype)
        elif path.endswith("/bias"):
            params[path] = jnp.zeros(shape, dtype)
        else:
            params[path] = jnp.asarray(0.02 * rng.standard_normal(shape, np.float32), dtype)
    return trees.unflatten(params)

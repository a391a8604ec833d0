"""One decoder for every family: Flax NNX modules with explicit head axes, and the pure functions that stream through.

Shapes are the architecture. A module is built from its parameters (arrays, tracers or ShapeDtypeStructs in nested
dicts) and reads every size from them, and the presence of a bias, a norm, a gate or an untied head too: surgery and
per-layer sizes need no other description. What no array can tell (rotary embedding, window, activation, epsilon) comes
from the config. The modules are in `jprune.models.modules`.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jprune import trees
from jprune.annotations import Array, DTypeLike, Float, Int, Key
from jprune.models.attention import Cache
from jprune.models.blocks import InBlocks
from jprune.models.config import DecoderConfig
from jprune.models.linear import Linear, Norm, Params
from jprune.models.modules import Block, Embed
from jprune.models.options import NormOptions, Options, norm_options
from jprune.models.parameters import shapes

__all__ = [
    "Decoder",
    "Params",
    "abstract_params",
    "apply",
    "block",
    "cached_block",
    "embed",
    "empty_cache",
    "head",
    "head_of",
    "head_parts",
    "in_blocks",
    "init_params",
]


class Decoder(nnx.Module):
    """The whole model as one NNX module, for `nnx.split`, `nnx.Optimizer` and the like; its state is our tree."""

    def __init__(self, config: DecoderConfig, params: Params):
        self.embed = Embed(params["embed"], **_embed_options(config))
        self.blocks = nnx.Dict(
            {str(i): Block(params["blocks"][str(i)], Options.of(config, i)) for i in range(config.layers)}
        )
        for name, module in _head_modules(params, norm_options(config)).items():
            setattr(self, name, module)
        self.config = config

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T vocab"]:
        """Logits in float32."""
        x = self.embed(tokens)
        for i in range(len(self.blocks)):
            x, _ = self.blocks[str(i)](x)
        parts = {name: getattr(self, name) for name in ("final_norm", "project_out", "head") if hasattr(self, name)}
        return _logits(parts, self.embed.embedding.get_value(), x, **_logit_options(self.config))


class _Head(nnx.Module):
    """The matrix from hidden states to logits and its bias; each may be missing."""

    def __init__(self, params: Params):
        self.kernel = nnx.Param(params["kernel"]) if "kernel" in params else None
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None


def _head_modules(params: Params, norm: NormOptions) -> dict[str, Any]:
    make: dict[str, Callable[[Params], Any]] = {
        "final_norm": lambda p: Norm(p, norm),
        "project_out": Linear,
        "head": _Head,
    }
    return {name: module(params[name]) for name, module in make.items() if name in params}


def _logits(
    parts: dict[str, Any], embedding: Array | None, x: Float[Array, "B T d_model"], *, scale: float, cap: float | None
) -> Float[Array, "B T vocab"]:
    for name in ("final_norm", "project_out"):
        x = parts[name](x) if name in parts else x
    head = parts.get("head")
    if head is not None and head.kernel is not None:
        kernel = head.kernel.get_value()
    else:
        assert embedding is not None  # tied
        kernel = embedding.T
    logits = jnp.tensordot(x, kernel.astype(x.dtype), axes=1, preferred_element_type=jnp.float32)
    if head is not None and head.bias is not None:
        logits = logits + head.bias.get_value().astype(jnp.float32)
    logits = logits if scale == 1.0 else logits * scale
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _embed_options(config: DecoderConfig) -> dict[str, Any]:
    return {"scale": config.embed_scale, "offset": config.position_offset, "norm": norm_options(config)}


def _logit_options(config: DecoderConfig) -> dict[str, Any]:
    return {"scale": config.logit_scale, "cap": config.logit_cap}


def embed(config: DecoderConfig) -> Callable[..., Float[Array, "B T d_model"]]:
    """`f({"embed": ...}, tokens [B, T], start=0) -> x [B, T, d_model]`, in the embedding's dtype.

    `start` is the position of the first token; only learned positions ask for it.
    """
    return _embed(**_embed_options(config))


@functools.cache
def _embed(**options: Any) -> Callable[..., Float[Array, "B T d_model"]]:
    def embed(
        params: Params, tokens: Int[Array, "B T"], start: Int[Array, ""] | int = 0
    ) -> Float[Array, "B T d_model"]:
        return Embed(params["embed"], **options)(tokens, start)

    return embed


def block(config: DecoderConfig, index: int) -> Callable[..., Float[Array, "B T d_model"]]:
    """`f(params of blocks/<index>, x [B, T, d_model], positions=None) -> x`, computed in x's dtype.

    Layers that do not differ get the same function object, so jit compiles it once for all of them. `positions`
    [T] or [B, T] only turn queries and keys; the causal mask follows the order in x.
    """
    return _block(Options.of(config, index))


@functools.cache
def _block(options: Options) -> Callable[..., Float[Array, "B T d_model"]]:
    def block(
        params: Params, x: Float[Array, "B T d_model"], positions: Int[Array, "... T"] | None = None
    ) -> Float[Array, "B T d_model"]:
        return Block(params, options)(x, positions)[0]

    return block


def cached_block(config: DecoderConfig, index: int) -> Callable[..., tuple[Float[Array, "B T d_model"], Cache]]:
    """`f(params of blocks/<index>, x, cache) -> (x, cache)`: as `block`, attending to the cache's tokens too."""
    return _cached_block(Options.of(config, index))


@functools.cache
def _cached_block(options: Options) -> Callable[..., tuple[Float[Array, "B T d_model"], Cache]]:
    def cached_block(
        params: Params, x: Float[Array, "B T d_model"], cache: Cache
    ) -> tuple[Float[Array, "B T d_model"], Cache]:
        x, extended = Block(params, options)(x, None, cache)
        assert extended is not None  # a cache went in
        return x, extended

    return cached_block


def empty_cache(params: Params, batch: int, capacity: int, dtype: DTypeLike) -> Cache:
    """A cache for `cached_block` with the parameters of a block."""
    attn = params["attn"]
    if "kv_down" in attn:
        narrow, turned = (attn[name]["kernel"].shape[1] for name in ("kv_down", "k_rope"))
        return Cache.empty(batch, capacity, 1, narrow, dtype, values=turned)
    kv_heads, head_dim = attn["k"]["kernel"].shape[1:]
    return Cache.empty(batch, capacity, kv_heads, head_dim, dtype)


def head(config: DecoderConfig) -> Callable[..., Float[Array, "B T vocab"]]:
    """`f({"final_norm": ..., "head" or "embed": ...}, x) -> logits [B, T, vocab]` in float32.

    Without a kernel in "head" the embedding is used, transposed; `head_parts` names the subtrees that a model's head
    needs.
    """
    return _head(norm_options(config), **_logit_options(config))


@functools.cache
def _head(norm: NormOptions, **options: Any) -> Callable[..., Float[Array, "B T vocab"]]:
    def head(params: Params, x: Float[Array, "B T d_model"]) -> Float[Array, "B T vocab"]:
        embedding = params["embed"]["embedding"] if "embed" in params else None
        return _logits(_head_modules(params, norm), embedding, x, **options)

    return head


def head_parts(config: DecoderConfig) -> tuple[str, ...]:
    """The subtrees of the parameters that `head` reads."""
    there = {
        "final_norm": config.final_norm,
        "project_out": config.d_embed is not None,
        "head": not config.tied or config.head_bias,
        "embed": config.tied,
    }
    return tuple(name for name, needed in there.items() if needed)


def head_of(params: Params, first: Int[Array, ""] | int, width: int) -> Params:
    """The parameters of `head` for `width` tokens of the vocabulary, from the token `first` on."""
    own = dict(params)
    if "kernel" in params.get("head", {}):
        own.pop("embed", None)
    by_token = {("head", "kernel"): 1, ("head", "bias"): 0, ("embed", "embedding"): 0}
    for (part, name), axis in by_token.items():
        if name in own.get(part, {}):
            own[part] = {**own[part], name: jax.lax.dynamic_slice_in_dim(own[part][name], first, width, axis)}
    return own


@functools.cache
def in_blocks(config: DecoderConfig) -> InBlocks:
    """The decoder as passes over a model take it."""
    return InBlocks(
        road="native",
        architecture=config.architecture,
        vocab=config.vocab,
        d_model=config.d_model,
        context=config.context,
        tied=config.tied,
        embed=embed(config),
        blocks=tuple(block(config, i) for i in range(config.layers)),
        head=head(config),
        head_parts=head_parts(config),
        head_of=head_of,
        dtype_of=functools.partial(_dtype_of, config),
        left_alone=re.compile("^head/|/(router|shared_gate)/"),
    )


def _dtype_of(config: DecoderConfig, path: str, dtype: DTypeLike) -> DTypeLike:
    return jnp.float32 if config.float32_routing and "/mlp/router/" in path else dtype


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
    """Random parameters: kernels and embeddings normal with deviation 0.02, norms the identity, biases zero.

    Drawn on the host, which spares the compilation of a generator for every shape.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    params = {}
    for path, shape in shapes(config).items():
        if path.endswith("/scale"):
            params[path] = jnp.full(shape, 0 if config.norm_offset else 1, dtype)
        elif path.endswith(("/bias", "/correction")):
            params[path] = jnp.zeros(shape, dtype)
        else:
            params[path] = jnp.asarray(0.02 * rng.standard_normal(shape, np.float32), dtype)
    return trees.unflatten(params)

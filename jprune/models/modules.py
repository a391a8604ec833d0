"""The parts of a decoder layer as Flax NNX modules, built from parameters (arrays, tracers or ShapeDtypeStructs).

Every size is read from the arrays, and the presence of a bias, a norm or a gate too. What no array can tell is in the
`Options` of the layer.

Axes in comments: B batch, T time (queries), S keys, H query heads, K key/value heads, G = H / K, D head_dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jprune.annotations import Array, Float, Int
from jprune.errors import JpruneError
from jprune.models import experts, routing
from jprune.models.attention import Cache, attend
from jprune.models.latent import LatentAttention
from jprune.models.linear import Linear, Norm, Params
from jprune.models.options import NormOptions, Options
from jprune.models.rope import rotate, rotations

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Attention(nnx.Module):
    """Causal grouped-query attention, with whatever positions, norms, windows and caps the options say."""

    def __init__(self, params: Params, options: Options):
        self.q, self.k, self.v = (Linear(params[name]) for name in "qkv")
        self.o = Linear(params["o"], inputs=2)
        axes = 2 if options.qk_norm_kind == "joint" else 1
        self.q_norm, self.k_norm = (
            Norm(params[name], options.norm, axes=axes) if name in params else None for name in ("q_norm", "k_norm")
        )
        self.sinks = nnx.Param(params["sinks"]) if "sinks" in params else None
        self.options = options
        heads = params["q"]["kernel"].shape[1]
        if options.slopes is not None and len(options.slopes) != heads:
            raise JpruneError(
                f"ALiBi gives every head a slope by its number among {len(options.slopes)}, so heads cannot be left "
                f"out; the query kernel has {heads}"
            )

    def __call__(
        self,
        x: Float[Array, "B T d_model"],
        positions: Int[Array, "... T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T d_model"], Cache | None]:
        """Attend within x and, with a cache, to what it holds before x; returns the cache with x's keys added."""
        options = self.options
        q, k, v = self.q(x), self.k(x), self.v(x)  # [B, T, H | K, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        start = 0 if cache is None else cache.length
        if options.rope is not None:
            if positions is None:
                positions = jnp.arange(x.shape[1]) + start
            turn = rotations(options.rope, q.shape[-1], positions)
            q, k = (rotate(each, turn, interleaved=options.rope.interleaved) for each in (q, k))
        if cache is not None:
            cache = cache.extend(k, v)
            k, v = cache.keys, cache.values
        attended = attend(
            q,
            k,
            v,
            start=start,
            window=options.window,
            scale=options.score_scale,
            cap=options.score_cap,
            slopes=options.slopes,
            sinks=None if self.sinks is None else self.sinks.get_value(),
        )
        return self.o(attended), cache


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202); without a gate down(activation(up(x)))."""

    def __init__(self, params: Params, *, activation: str):
        self.gate = Linear(params["gate"]) if "gate" in params else None
        self.up, self.down = Linear(params["up"]), Linear(params["down"])
        self.activation = activation

    def __call__(self, x: Float[Array, "B T d_model"]) -> Float[Array, "B T d_model"]:
        """Each position by itself."""
        act = ACTIVATIONS[self.activation]
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))


class Experts(nnx.Module):
    """A router sends every token to a few of many MLPs and mixes what they give; one more may see every token."""

    def __init__(self, params: Params, options: Options):
        self.router = Linear(params["router"])
        self.correction = nnx.Param(params["router"]["correction"]) if "correction" in params["router"] else None
        self.gate, self.up, self.down = (Linear(params["experts"][name]) for name in ("gate", "up", "down"))
        self.shared = MLP(params["shared"], activation=options.activation) if "shared" in params else None
        self.shared_gate = Linear(params["shared_gate"]) if "shared_gate" in params else None
        self.options = options

    def __call__(self, x: Float[Array, "B T d_model"]) -> Float[Array, "B T d_model"]:
        """Each position by itself."""
        options = self.options
        logits = self.router(x.astype(jnp.float32) if options.routing.float32 else x)
        correction = None if self.correction is None else self.correction.get_value()
        routes = routing.route(logits, options.routing, correction)
        kernels = {}
        for name in ("gate", "up", "down"):
            kernels[name] = getattr(self, name).kernel.get_value()
            if (bias := getattr(self, name).bias) is not None:
                kernels[f"{name} bias"] = bias.get_value()
        y = experts.mix(_expert(options.activation, options.swiglu), kernels, x, routes, logits.shape[-1])
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x))[..., None] * shared)
        return y


@functools.cache
def _expert(activation: str, swiglu: tuple[float, float] | None = None) -> experts.Expert:
    """The MLP of an expert, for `experts.mix`; see `DecoderConfig.swiglu`."""

    def expert(kernels: Params, x: Array, multiply: experts.Product) -> Array:
        gate, up = (multiply(x, kernels[name], kernels.get(f"{name} bias")) for name in ("gate", "up"))
        if swiglu is None:
            hidden = ACTIVATIONS[activation](gate) * up
        else:
            slope, most = swiglu
            gate, up = jnp.minimum(gate, most), jnp.clip(up, -most, most)
            hidden = gate * jax.nn.sigmoid(slope * gate) * (up + 1)
        return multiply(hidden, kernels["down"], kernels.get("down bias"))

    return expert


class Block(nnx.Module):
    """One decoder layer: attention and MLP, each added to the residual stream, one after the other or side by side."""

    def __init__(self, params: Params, options: Options):
        norms = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")
        self.attn_norm, self.attn_post_norm, self.mlp_norm, self.mlp_post_norm = (
            Norm(params[name], options.norm) if name in params else None for name in norms
        )
        attention = LatentAttention if "kv_down" in params["attn"] else Attention
        self.attn = attention(params["attn"], options)
        mlp = params["mlp"]
        self.mlp = Experts(mlp, options) if "experts" in mlp else MLP(mlp, activation=options.activation)
        self.options = options

    def __call__(
        self,
        x: Float[Array, "B T d_model"],
        positions: Int[Array, "... T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T d_model"], Cache | None]:
        """The residual stream after this layer, and the cache with this layer's keys and values."""
        options = self.options
        if options.norm_after:
            attended, cache = self.attn(x, positions, cache)
            x = _apply(self.attn_norm, x + attended)
            return _apply(self.mlp_norm, x + self.mlp(x)), cache
        normed = _apply(self.attn_norm, x)
        attended, cache = self.attn(normed, positions, cache)
        attended = _scaled(_apply(self.attn_post_norm, attended), options.residual_scale)
        if not options.parallel:
            x = x + attended
            normed = _apply(self.mlp_norm, x)
        elif self.mlp_norm is not None:
            normed = self.mlp_norm(x)
        y = _scaled(_apply(self.mlp_post_norm, self.mlp(normed)), options.residual_scale)
        return (x + attended + y if options.parallel else x + y), cache


class Embed(nnx.Module):
    """A row of the table for each token, and one for each position where positions are learned."""

    def __init__(self, params: Params, *, scale: float, offset: int, norm: NormOptions):
        self.embedding = nnx.Param(params["embedding"])
        self.positions = nnx.Param(params["positions"]) if "positions" in params else None
        self.project_in = Linear(params["project_in"]) if "project_in" in params else None
        self.norm = Norm(params["norm"], norm) if "norm" in params else None
        self.scale = scale
        self.offset = offset

    def __call__(self, tokens: Int[Array, "B T"], start: Int[Array, ""] | int = 0) -> Float[Array, "B T d_model"]:
        """Look up tokens that stand at positions from `start` on.

        The table's dtype is the dtype in which the blocks compute.
        """
        x = _scaled(jnp.take(self.embedding.get_value(), tokens, axis=0, mode="clip"), self.scale)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            rows = jnp.arange(tokens.shape[1]) + start + self.offset
            x = x + jnp.take(self.positions.get_value().astype(x.dtype), rows, axis=0, mode="clip")
        return _apply(self.norm, x)


def _apply(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


def _scaled(x: Array, scale: float) -> Array:
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

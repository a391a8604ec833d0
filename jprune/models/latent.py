"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

A token's keys and values, of all heads, are made of one narrow vector, and its queries of another (or of the residual
stream). Part of each head's queries and keys is turned by its position; that part of a key is the same for all heads.
A cache holds the narrow vectors and the turned keys. Of a single new token the query meets those as they are: the
kernels that would make keys and values of all tokens are multiplied into the query, and into what is attended to.
"""

import jax.numpy as jnp
from flax import nnx

from jprune.annotations import Array, Float, Int
from jprune.models.attention import Cache, attend
from jprune.models.kernels import Kernel
from jprune.models.linear import Linear, Norm, Params
from jprune.models.options import Options
from jprune.models.rope import rotate, rotations


class LatentAttention(nnx.Module):
    """Axes: R the narrow vector of keys and values, N and P what is not turned and what is of a head, V its value."""

    def __init__(self, params: Params, options: Options):
        self.q_down = Linear(params["q_down"]) if "q_down" in params else None
        self.q_down_norm = Norm(params["q_down_norm"], options.latent_norm) if "q_down_norm" in params else None
        self.kv_down, self.k_rope = Linear(params["kv_down"]), Linear(params["k_rope"])
        self.kv_down_norm = Norm(params["kv_down_norm"], options.latent_norm)
        self.q, self.k, self.v = (Linear(params[name]) for name in "qkv")
        self.o = Linear(params["o"], inputs=2)
        self.options = options

    def __call__(
        self,
        x: Float[Array, "B T d_model"],
        positions: Int[Array, "... T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T d_model"], Cache | None]:
        """Attend within x and, with a cache, to what it holds before x; returns the cache with x's tokens added."""
        q = self.q(self._queries_from(x))  # [B, T, H, N + P]
        latent = self.kv_down_norm(self.kv_down(x))[:, :, None]  # [B, T, 1, R]
        shared = self.k_rope(x)[:, :, None]  # [B, T, 1, P]
        start = 0 if cache is None else cache.length
        own, turned = jnp.split(q, [q.shape[-1] - shared.shape[-1]], axis=-1)
        if (rope := self.options.rope) is not None:
            if positions is None:
                positions = jnp.arange(x.shape[1]) + start
            turn = rotations(rope, shared.shape[-1], positions)
            turned, shared = (rotate(each, turn, interleaved=rope.interleaved) for each in (turned, shared))
        if cache is not None:
            cache = cache.extend(latent, shared)
            latent, shared = cache.keys, cache.values
        mix = self._absorbed if cache is not None and x.shape[1] == 1 else self._expanded
        return self.o(mix(own, turned, latent, shared, start)), cache

    def _queries_from(self, x: Float[Array, "B T d_model"]) -> Float[Array, "B T d"]:
        if self.q_down is None or self.q_down_norm is None:
            return x
        return self.q_down_norm(self.q_down(x))

    def _expanded(
        self,
        own: Float[Array, "B T H N"],
        turned: Float[Array, "B T H P"],
        latent: Float[Array, "B S 1 R"],
        shared: Float[Array, "B S 1 P"],
        start: Int[Array, ""] | int,
    ) -> Float[Array, "B T H V"]:
        """With keys and values of every token."""
        k, v = self.k(latent[:, :, 0]), self.v(latent[:, :, 0])  # [B, S, H, N], [B, S, H, V]
        shared = jnp.broadcast_to(shared, (*k.shape[:-1], shared.shape[-1]))
        keys = jnp.concatenate([k, shared], axis=-1)
        return self._attend(jnp.concatenate([own, turned], axis=-1), keys, v, start, own.shape[-1] + turned.shape[-1])

    def _absorbed(
        self,
        own: Float[Array, "B T H N"],
        turned: Float[Array, "B T H P"],
        latent: Float[Array, "B S 1 R"],
        shared: Float[Array, "B S 1 P"],
        start: Int[Array, ""] | int,
    ) -> Float[Array, "B T H V"]:
        """The same sums in another order: heads attend to the narrow vectors, as to one key/value head."""
        narrow = jnp.einsum("bthn,rhn->bthr", own, _array(self.k, own))
        keys = jnp.concatenate([latent, shared], axis=-1)
        queries = jnp.concatenate([narrow, turned], axis=-1)
        attended = self._attend(queries, keys, latent, start, own.shape[-1] + turned.shape[-1])
        return jnp.einsum("bthr,rhv->bthv", attended, _array(self.v, own))

    def _attend(self, q: Array, k: Array, v: Array, start: Int[Array, ""] | int, size: int) -> Array:
        options = self.options
        scale = size**-0.5 if options.score_scale is None else options.score_scale
        return attend(q, k, v, start=start, window=options.window, scale=scale, cap=options.score_cap)


def _array(linear: Linear, like: Array) -> Array:
    kernel = linear.kernel.get_value()
    return (kernel.dense() if isinstance(kernel, Kernel) else kernel).astype(like.dtype)

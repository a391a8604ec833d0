"""The parts that all others are made of: a product with a kernel, and a norm."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jprune.annotations import Array, Float
from jprune.models.kernels import multiply
from jprune.models.options import NormOptions
from jprune.train.remat import named

Params = Mapping[str, Any]  # nested dicts; leaves are arrays


class Linear(nnx.Module):
    """y = x kernel (+ bias): the kernel's first `inputs` axes meet x's last ones in one product."""

    def __init__(self, params: Params, *, inputs: int = 1):
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None
        self.inputs = inputs

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Apply to [..., *d_in]; gives [..., *d_out] in x's dtype."""
        y = multiply(x, self.kernel.get_value(), self.inputs)
        return named(y if self.bias is None else y + self.bias.get_value().astype(x.dtype))


class Norm(nnx.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last axes, means in float32.

    With a parameter "kept", 0 or 1 in the shape of "scale", the means are those of the elements where it is 1: the norm
    of a smaller model, in the shapes of a larger one (`jprune.structured.masking`).
    """

    def __init__(self, params: Params, options: NormOptions, *, axes: int = 1):
        self.scale = nnx.Param(params["scale"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None
        self.kept = nnx.Param(params["kept"]) if "kept" in params else None
        self.options = options
        self.axes = tuple(range(-axes, 0))

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalise the last axes; in x's dtype."""
        wide = x.astype(jnp.float32)
        if self.options.kind == "layer":
            wide = wide - self._mean(wide)
        wide = wide * jax.lax.rsqrt(self._mean(wide * wide) + self.options.eps)
        scale = self.scale.get_value()
        if self.options.kind == "rms" and not self.options.offset:
            return wide.astype(x.dtype) * scale.astype(x.dtype)  # rounded before it is scaled, as Llama's original does
        wide = wide * (scale.astype(jnp.float32) + (1.0 if self.options.offset else 0.0))
        if self.bias is not None:
            wide = wide + self.bias.get_value().astype(jnp.float32)
        return wide.astype(x.dtype)

    def _mean(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.kept is None:
            return jnp.mean(x, axis=self.axes, keepdims=True)
        kept = self.kept.get_value().astype(jnp.float32)
        count = jnp.maximum(jnp.sum(kept, axis=self.axes, keepdims=True), 1.0)
        return jnp.sum(x * kept, axis=self.axes, keepdims=True) / count

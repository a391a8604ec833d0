"""The selective scan of Mamba as one loop of the program.

transformers' reference for CPUs is a Python loop over the tokens, which would be traced token by token. Here it is a
`jax.lax.scan` of the same recurrence (Gu and Dao, arXiv:2312.00752, section 3.2):

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,      y_t = C_t h_t + D u_t
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import torch

from jprune.bridge.environment import Tensor, environment, tensor

NAME = "mamba_selective_scan"
"""What modules of transformers call it."""


def replace_in(module: Any) -> None:
    """Modules of this kind of model call the loop below on tensors of ours, and their own on others."""
    for name in {type(child).__module__ for child in module.modules()}:
        source = sys.modules[name]
        original = getattr(source, NAME, None)
        if original is not None and not hasattr(original, "of_jprune"):
            setattr(source, NAME, _chosen(original))


def _chosen(original: Any) -> Any:
    @functools.wraps(original)
    def chosen(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not environment().enabled:
            return original(hidden_states, *args, **kwargs)
        return _on_tensors(hidden_states, *args, **kwargs)

    chosen.of_jprune = True  # type: ignore[attr-defined]
    return chosen


def _on_tensors(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """Arguments are those of `selective_scan_fn` of the package mamba_ssm."""
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = torch.nn.functional.softplus(dt)
    outputs, state = selective_scan(*(_array(x) for x in (hidden_states, dt, A, B, C)))
    found = tensor(outputs)
    if D is not None:
        found = found + hidden_states * D[None, :, None]
    if z is not None:
        found = found * torch.nn.functional.silu(z)
    return (found, tensor(state)) if return_last_state else found


def selective_scan(
    u: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The recurrence of u and dt [B, D, T], a [D, N], b and c [B, N, T]: y [B, D, T] without its last term, and h."""

    def step(state: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        u, dt, b, c = now
        state = jnp.exp(dt[..., None] * a) * state + (dt * u)[..., None] * b[:, None]
        return state.astype(u.dtype), jnp.sum(state * c[:, None], axis=-1)

    first = jnp.zeros((*u.shape[:2], a.shape[1]), u.dtype)
    state, outputs = jax.lax.scan(step, first, tuple(jnp.moveaxis(x, -1, 0) for x in (u, dt, b, c)))
    return jnp.moveaxis(outputs, 0, -1).astype(u.dtype), state


def _array(value: torch.Tensor) -> Any:
    return value.jax() if isinstance(value, Tensor) else environment().v2t_iso(value).jax()

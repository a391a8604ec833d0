"""Each rule that freezes, by a function in which pruning would be wrong; and its neighbour in which it is right."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smaller import agree, smaller, zeroed

from jprune.trace import coupled_axes

N = 6  # the hidden size; no other axis has it


def two_layers(middle):
    """f(params, x) with `middle` between two kernels; the hidden axis is neither argument nor output."""

    def f(p, x):
        return middle(x @ p["up"]) @ p["down"]

    return f


def arrays(n=N, seed=0):
    rng = np.random.default_rng(seed)
    params = {"up": rng.normal(size=(3, n)), "down": rng.normal(size=(n, 5))}
    return {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}, jnp.asarray(
        rng.normal(size=(4, 3)), jnp.float32
    )


KEEP = np.array([True, False, True, True, False, True])

TABLE = np.linspace(1, 2, N, dtype=np.float32)


def softmax_over(h):
    return jax.nn.softmax(h, -1)


def hard_coded(h):
    return (h * h).sum(-1, keepdims=True) / 7.0 * h


WRONG = {
    "softmax over the axis": (softmax_over, "changed by reduce_max"),
    "sum of exp": (lambda h: h / jnp.exp(h).sum(-1, keepdims=True), "not zero in reduce_sum"),
    "logsumexp": (lambda h: h - jax.nn.logsumexp(h, -1, keepdims=True), "changed by reduce_max"),
    "maximum": (lambda h: h + h.max(-1, keepdims=True), "changed by reduce_max"),
    "product": (lambda h: h + h.prod(-1, keepdims=True), "changed by reduce_prod"),
    "argmax": (lambda h: h * jnp.argmax(h, -1, keepdims=True).astype(jnp.float32), "positions are values of argmax"),
    "iota as a value": (lambda h: h * jnp.arange(float(h.shape[-1])), "positions are values of iota"),
    "one-hot": (lambda h: h + jax.nn.one_hot(jnp.arange(4), h.shape[-1]), "positions are values of iota"),
    "a table": (lambda h: h * TABLE, r"a constant array of shape \[6\]"),
    "sort": (lambda h: jnp.sort(h, -1), "order is changed by sort"),
    "top-k": (lambda h: h * jax.lax.top_k(h, 3)[0].sum(-1, keepdims=True), "order is changed by"),
    "reversed": (lambda h: h * h[:, ::-1], "order is reversed by rev"),
    "every other": (lambda h: h * h[:, ::2].sum(-1, keepdims=True), "every n-th index is taken by slice"),
    "running product": (lambda h: jnp.cumprod(h, -1), "changed by cumprod"),
    "running sum of exp": (lambda h: jnp.cumsum(jnp.exp(h), -1), "changed by cumsum"),
    "positions by a running sum": (lambda h: h * jnp.cumsum(jnp.ones_like(h), -1), "positions are values of cumsum"),
    "variance with ddof": (lambda h: h * jnp.var(h, -1, keepdims=True, ddof=1), "not zero in reduce_sum"),
    "sum of what is not zero": (lambda h: h * (1 + h * h).sum(-1, keepdims=True), "not zero in reduce_sum"),
    "0 / 0": (lambda h: h / jnp.abs(h), "neither operand is zero for it in dot_general"),
    "log of 0": (lambda h: h * jnp.log(h * h), "neither operand is zero for it in dot_general"),
    "a number of its length": (lambda h: h * (h * h).sum(-1, keepdims=True) ** 0.5 * h.shape[-1] ** -0.5, "number"),
    "any number of its length": (lambda h: jnp.sin(h + 0.1 * h.shape[-1]), "number"),
    "an exponent": (lambda h: h ** h.shape[-1], "number"),
    "a hard-coded divisor": (lambda h: h - h.sum(-1, keepdims=True) / 6, "number"),
    "a length from positions": (lambda h: h * jnp.arange(float(h.shape[-1])).max(), "number"),
    "a table of its length": (lambda h: h * np.full((4, 1), np.sqrt(h.shape[-1]), np.float32), "number"),
    "a length by counting": (lambda h: h * (h * h).sum(-1, keepdims=True) / jnp.ones(h.shape[-1]).sum() ** 2, "number"),
    "random numbers": (lambda h: h * jax.random.normal(jax.random.key(0), h.shape), "not followed through"),
    "indexed": (lambda h: h + h[:, jnp.array([0, 3])].sum(-1, keepdims=True), "indexed by gather"),
    "indexed by a value": (
        lambda h: h * jax.lax.dynamic_slice_in_dim(h, h[0, 0].astype(int), 2, 1).sum(-1, keepdims=True),
        "indexed by dynamic_slice",
    ),
    "set at an index": (lambda h: h.at[:, 1].set(1.0), "scatter"),
    "updated in part": (
        lambda h: h * jax.lax.dynamic_update_slice(h, jnp.ones((4, 2)), (0, 1)).sum(-1, keepdims=True),
        "indexed by dynamic_update_slice",
    ),
    "a while loop": (
        lambda h: jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: c + 1.0, h),
        "not followed through while",
    ),
    "a condition": (lambda h: jax.lax.cond(h[0].sum() > 0, jnp.sin, jnp.exp, h), "not followed through cond"),
    "fft": (lambda h: jnp.real(jnp.fft.fft(h)), "not followed through fft"),
    "scanned over": (
        lambda h: h * jax.lax.scan(lambda c, row: (0.5 * c + jnp.cos(row), None), jnp.zeros(4), h.T)[0][:, None],
        "scanned over by scan",
    ),
    "divided across": (
        lambda h: (h.reshape(4, 2, 3) * h.reshape(4, 3, 2).swapaxes(1, 2)).reshape(4, 6),
        "divided across",
    ),
    "padded to a width": (lambda h: h * jnp.pad(h, ((0, 0), (1, 0)))[:, :-1], ""),
    "windows": (
        lambda h: jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 3), (1, 1), "SAME"),
        "an axis of the image or the window",
    ),
    "a matmul of what is not zero": (lambda h: h + (1 + h * h) @ jnp.exp(h).T @ h, "neither operand is zero"),
}


@pytest.mark.parametrize("what", WRONG)
def test_frozen(what):
    middle, reason = WRONG[what]
    found = coupled_axes(two_layers(middle), *arrays())
    groups = [*found.at("down", 0), *found.at("up", 1)]
    assert all(g.frozen is not None for g in groups), [g.frozen for g in groups]
    if reason and groups:
        assert any(re.search(reason, g.frozen) for g in groups), [g.frozen for g in groups]


RIGHT = {
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "sum of zeros": lambda h: h / (1e-3 + jnp.abs(h).sum(-1, keepdims=True)),
    "normalised": lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True),
    "running sum": lambda h: jnp.cumsum(h, -1),
    "reversed running sum": lambda h: jax.lax.cumsum(h, 1, reverse=True),
    "mean": lambda h: h - h.mean(-1, keepdims=True),
    "mean by a reciprocal": lambda h: h * (jnp.exp(h).sum(-1, keepdims=True) * (1 / h.shape[-1])),
    "mean of exp": lambda h: h * jnp.exp(h).mean(-1, keepdims=True),
    "mean by counting": lambda h: h * ((h * h).sum(-1, keepdims=True) / jnp.ones(h.shape[-1]).sum()),
    "variance": lambda h: h * jnp.var(h, -1, keepdims=True),
    "mean in float64 style": lambda h: h * (h.astype(jnp.float32).sum(-1) / np.float32(h.shape[-1]))[:, None],
    "elements with a number": lambda h: h * 0.3 + 1.7,
    "another number in a norm": hard_coded,
    "gram": lambda h: h @ (h.T @ h),
    "batched": lambda h: jax.vmap(lambda row: jnp.tanh(row))(h),
    "a matmul with itself": lambda h: h @ (jax.nn.relu(h.T @ h) + 1.0),
    "two halves": lambda h: jnp.concatenate([2 * part for part in jnp.split(h, 2, -1)], -1),
    "halves swapped": lambda h: h * jnp.concatenate(jnp.split(h, 2, -1)[::-1], -1),
    "interleaved halves": lambda h: jnp.stack(jnp.split(h, 2, -1), -1).reshape(h.shape),
    "added to its neighbours": lambda h: h + sum(jnp.unstack(jnp.stack([h, jnp.sin(h)], 1), axis=1)),
    "halves as an axis": lambda h: h * jnp.tile(h.reshape(4, 2, -1)[:, 0], 2),
    "a hard-coded number": lambda h: h * (h * h).sum(-1, keepdims=True) ** 0.5 * 6**-0.5,
    "a table of something else": lambda h: h * np.arange(4, dtype=np.float32)[:, None],
    "zeros to start with": lambda h: jnp.zeros(h.shape) + h,
    "scan over something else": lambda h: jax.lax.scan(lambda c, row: (c + row, c * row), jnp.zeros(h.shape[1]), h)[1],
    "maximum over something else": lambda h: h - h.max(0),
    "updated as a whole": lambda h: jax.lax.dynamic_update_slice(jnp.zeros_like(h), h[:2], (1, 0)),
    "sorted along another axis": lambda h: jnp.sort(h, 0),
}


@pytest.mark.parametrize("what", RIGHT)
def test_not_frozen(what):
    f = two_layers(RIGHT[what])
    params, x = arrays()
    groups = coupled_axes(f, params, x)
    chosen = groups.at("down", 0)
    assert [g.frozen for g in chosen] == [None] * len(chosen)
    assert chosen
    keep = {g.name: KEEP[: g.size] for g in chosen}
    agree(f, params, (x,), groups, keep)
    if "halves" not in what:
        assert chosen[0].renormalised == ("mean" in what or "variance" in what)


def test_masking_would_be_wrong_where_it_is_frozen():
    """The functions above that can be given smaller arrays at all do differ from the masked ones."""
    params, x = arrays()
    same = []
    for what in ("softmax over the axis", "sum of exp", "maximum", "iota as a value", "a length by counting", "0 / 0"):
        f = two_layers(WRONG[what][0])
        groups = coupled_axes(f, params, x)
        keep = {"down[0]": KEEP}
        a, b = f(zeroed(params, groups, keep), x), f(smaller(params, groups, keep), x)
        same += [what] if np.allclose(a, b, rtol=1e-3) else []
    assert same == []

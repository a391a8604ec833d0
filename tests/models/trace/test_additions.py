"""What the outputs of a kernel are added to, against what the function says it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.trace import stages

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 3, 4))
P = {name: jax.random.normal(jax.random.fold_in(KEY, i), (4, 4)) for i, name in enumerate("abc")} | {"d": jnp.ones(4)}


def residual(p, x):
    """Two additions, of which the second one's stream is what came of the first."""
    x = x + jnp.tanh(x @ p["a"]) @ p["b"]
    return x + jnp.tanh(x) @ p["c"]


def scaled(p, x):
    """By way of a cast, a bias and a number."""
    y = ((x @ p["a"]).astype(jnp.float16).astype(jnp.float32) + p["d"]) * 0.5
    return x.astype(jnp.float32) + y


def side_by_side(p, x):
    """The halves of the block are added to each other first."""
    return x + (jnp.tanh(x @ p["a"]) @ p["b"] + jnp.flip(x) @ p["c"])


def several_axes(p, x):
    """Heads are split and joined on the way in."""
    heads = x.reshape(2, 3, 2, 2)
    return jnp.einsum("bthd,hde->bte", heads, p["a"].reshape(2, 2, 4)) + jnp.flip(x)


FOUND = [
    (residual, {"b": lambda p, x: x, "c": lambda p, x: x + jnp.tanh(x @ p["a"]) @ p["b"]}),
    (scaled, {"a": lambda p, x: 2 * x}),
    (side_by_side, {"b": lambda p, x: x + jnp.flip(x) @ p["c"], "c": lambda p, x: x}),
    (several_axes, {"a": lambda p, x: jnp.flip(x)}),
]


@pytest.mark.parametrize(("f", "wanted"), FOUND, ids=lambda f: getattr(f, "__name__", ""))
def test_the_rows_of_what_outputs_are_added_to(f, wanted):
    staged = stages(f, P, X, added=True)
    carry, found = staged.start(X), {}
    for stage, segment in enumerate(staged.segments):
        carry = segment(P, carry)
        if stage < len(staged.matmuls):
            paths = {m.input_id: m.path for m in staged.matmuls[stage]}
            found |= {paths[i]: rows for i, rows in staged.residuals(stage, carry).items()}
    assert found.keys() == wanted.keys()
    for path, rows in found.items():
        np.testing.assert_allclose(rows, wanted[path](P, X).reshape(-1, 4), rtol=1e-5, atol=1e-6, err_msg=path)
    np.testing.assert_allclose(staged.finish(carry), f(P, X), rtol=1e-5, atol=1e-6)


NONE = {
    "normalised before": lambda p, x: x + jnp.tanh(x @ p["a"]),
    "two kernels read one input": lambda p, x: x + x @ p["a"] + jnp.tanh(x @ p["b"]),
    "used twice": lambda p, x: x + (y := x @ p["a"]) + jnp.flip(y),
    "returned too": lambda p, x: ((y := x @ p["a"]), x + y),
    "added to itself": lambda p, x: (y := x @ p["a"]) + y,
    "multiplied by a value": lambda p, x: x + (x @ p["a"]) * x,
    "nothing but a bias": lambda p, x: x @ p["a"] + p["d"],
    "outputs first": lambda p, x: (p["a"].T @ x.reshape(-1, 4).T)[:, :4] + jnp.ones((4, 4)) * x[0, 0],
    "tokens the other way": lambda p, x: jnp.einsum("tbi,io->tbo", x.swapaxes(0, 1), p["a"]) + x.swapaxes(0, 1),
    "repeated": lambda p, x: x[:1] + x @ p["a"],
}


@pytest.mark.parametrize("f", NONE.values(), ids=NONE)
def test_where_that_is_not_known(f):
    staged = stages(f, P, X, added=True)
    assert not any(staged.added(stage) for stage in range(len(staged.matmuls)))


def test_it_is_there_only_for_who_asks():
    assert stages(residual, P, X, added=True).added(1)
    assert not stages(residual, P, X).added(1)

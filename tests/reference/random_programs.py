"""Random programs, of all that kernels are used in, and the tracer's contract on them."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from noting import is_noting, noting, see

from jprune.statistics import Gram
from jprune.trace import observe, report


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape) / 2


SHAPES = {"square": (4, 4), "other": (4, 4), "stack": (3, 4, 4), "wide": (4, 12), "table": (9, 4), "filter": (3, 4, 4)}
PARAMS = {f"{n}{i}": normal(7 * i + j, *s) for i in range(2) for j, (n, s) in enumerate(SHAPES.items())}
PARAMS |= {"bias": normal(20, 4), "gain": normal(21, 4)}


def plain(p, n, x):
    return see(n, x) @ p[n]


def transposed(p, n, x):
    return see(n, x) @ p[n].T


def cast(p, n, x):
    return see(n, x) @ p[n].astype(jnp.bfloat16).astype(jnp.float32)


def scaled(p, n, x):
    return see(n, x) @ (p[n] * 0.5)


def dropped(p, n, x):
    return see(n, x) @ jnp.where(x[:4] > 0, p[n], 0)


def branch_of_kernels(p, n, x):
    return see(n, x) @ jax.lax.cond(jnp.sum(x) > 0, lambda: p[n], lambda: 2 * p[n])


def written_out(p, n, x):
    return jnp.sum(see(n, x)[:, :, None] * p[n], axis=1)


def heads(p, n, x):
    return jnp.einsum("tnk,nkd->td", see(n, x).reshape(-1, 2, 2), p[n].reshape(2, 2, 4))


def rowwise(p, n, x):
    return jax.lax.map(lambda x: see(n, x[None])[0] @ p[n], x)


def repeated(p, n, x):
    return jax.lax.fori_loop(0, 2, lambda _, x: jnp.tanh(see(n, x) @ p[n]), x)


def sometimes(p, n, x):
    return jax.lax.cond(jnp.sum(x) > 0, lambda x: see(n, x) @ p[n], lambda x: x, x)


def while_small(p, n, x):
    step = lambda s: (s[0] + 1, jnp.tanh(see(n, s[1]) @ p[n]))  # noqa: E731
    return jax.lax.while_loop(lambda s: (s[0] < 3) & (jnp.max(s[1]) < 50), step, (0, x))[1]


def rematerialised(p, n, x):
    return jax.remat(lambda w, x: jax.jit(jnp.matmul)(x, w))(p[n], see(n, x))


def biased(p, n, x):
    return x + p["bias"] * p["gain"]


def mixed(p, n, x):
    return jax.nn.softmax(x @ x.T / 4) @ x


SQUARE = [plain, transposed, cast, scaled, dropped, branch_of_kernels, written_out, heads, rowwise, repeated]
SQUARE += [sometimes, while_small, rematerialised, biased, mixed]


def layers(p, n, x):
    return jax.lax.scan(lambda x, iw: (jnp.tanh(see(n, x, iw[0]) @ iw[1]), None), x, (jnp.arange(3), p[n]))[0]


def layers_with_remat(p, n, x):
    step = jax.remat(lambda x, w: jnp.tanh(x @ w))
    return jax.lax.scan(lambda x, iw: (step(see(n, x, iw[0]), iw[1]), None), x, (jnp.arange(3), p[n]), reverse=True)[0]


def one_layer(p, n, x):
    i = jnp.argmax(x[0, :3])
    return see(n, x, i) @ p[n][i]


def experts(p, n, x):
    i = jnp.argmax(x[:, :3], axis=-1)
    if is_noting():
        for row, e in zip(x, i):
            see(n, row[None], e)
    return jnp.einsum("td,tdf->tf", x, p[n][i])


def unrolled(p, n, x):
    for i in range(3):
        x = jnp.tanh(see(n, x, i) @ p[n][i])
    return x


STACK = [layers, layers_with_remat, one_layer, experts, unrolled]


def thirds(p, n, x):
    a, b, c = jnp.split(see(n, x) @ p[n], 3, axis=-1)
    return a * b + c


def two_thirds(p, n, x):
    x = see(n, x)  # both parts read it
    return x @ p[n][:, :4] + jnp.tanh(x @ p[n][:, 8:])


def fused_by_reshape(p, n, x):
    return jnp.einsum("td,dkf->tf", see(n, x), p[n].reshape(4, 3, 4))


def lookup(p, n, x):
    return x + p[n][jnp.arange(len(x)) % 9]


def tied(p, n, x):
    return jnp.tanh(see(n, x) @ p[n].T) @ jnp.ones((9, 4))


def convolved(p, n, x):
    padded = jnp.pad(x, ((1, 1), (0, 0)))
    if is_noting():
        see(n, jnp.concatenate([padded[i : i + len(x)] for i in range(3)], axis=1))
    return jax.lax.conv_general_dilated(x[None], p[n], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))[0]


OPERATIONS = [(f, n) for f in SQUARE for n in ("square", "other")] + [(f, "stack") for f in STACK]
OPERATIONS += [(f, "wide") for f in (thirds, two_thirds, fused_by_reshape)]
OPERATIONS += [(f, "table") for f in (lookup, tied)] + [(convolved, "filter")]

PROGRAMS = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 1), st.booleans()), min_size=1, max_size=6)
"""Operations with the number of their parameter, and whether their result is added to what they read."""


def right_or_refused(program):
    """Every leaf is accounted for, and what is observed is what an eager run notes."""
    used = {f"{name}{i}" for (f, name), i, _ in program if f not in (biased, mixed)}
    multiplied = {f"{name}{i}" for (f, name), i, _ in program if f not in (biased, mixed, lookup)}

    def f(p, x):
        for (step, name), i, residual in program:
            y = step(p, f"{name}{i}", x)
            x = (x + y) / 2 if residual else y
        return x

    x = normal(30, 6, 4)
    with noting() as seen:
        expected = f(PARAMS, x)
    account = {leaf.path: leaf for leaf in report(f, PARAMS, x).leaves}
    assert account.keys() == PARAMS.keys()
    for path, leaf in account.items():
        if path in multiplied:
            assert leaf.state in ("prunable", "skipped"), leaf
        elif path in used:
            assert leaf.state == "other", leaf
        else:
            assert leaf.state == ("other" if path in ("bias", "gain") and leaf.others else "never read"), leaf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is left out
        output, observed = observe(f, Gram)(PARAMS, x)
    np.testing.assert_allclose(output, expected, atol=1e-4, rtol=1e-4)
    places = observed.places
    assert {place.path for place in places.values()} == {p for p, leaf in account.items() if leaf.state == "prunable"}
    for key, statistic in observed.items():
        check(key, places[key], statistic, seen.get(places[key].path, []))


def check(key, place, statistic, seen):
    """The statistic is that of the rows that were noted for its kernel, or for each of a stack."""
    if place.part is not None and place.path.startswith("stack"):  # a layer by its number
        seen = [(None, x) for i, x in seen if i in range(*place.part[0])]
    for i in range(3) if place.batch_axes else [None]:
        rows = np.concatenate([np.zeros((0, statistic.d_in)), *[x for j, x in seen if i is None or j == i]])
        own = statistic if i is None else statistic.of(i)
        np.testing.assert_allclose(own.total, rows.T @ rows, atol=2e-3, rtol=2e-3, err_msg=f"{key} {i}")
        assert own.tokens == len(rows)

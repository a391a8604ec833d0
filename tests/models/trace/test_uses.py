"""Kernels in loops, stacks, slices and convolutions: what `observe` gathers is what an eager run sees.

The truth is what a program notes itself in an eager run, see `noting` in tests/reference.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noting import is_noting, noting, see

from jprune.statistics import Gram, SquaredNorm
from jprune.trace import matmuls, observe
from jprune.trace.jaxpr import trace
from jprune.trace.matmuls import find


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


def scanned(p, x):
    def layer(state, xs):
        i, w = xs
        h = jax.nn.gelu(see("up", state, i) @ w["up"])
        return state + see("down", h, i) @ w["down"] + w["bias"], jnp.sum(h)

    x, _ = jax.lax.scan(layer, x, (jnp.arange(3), {k: p[k] for k in ("up", "down", "bias")}))
    return see("head", x) @ p["head"]


def scanned_with_remat(p, x):
    layer = jax.remat(lambda w, x: jnp.tanh(x @ w))
    return jax.lax.scan(lambda x, xs: (layer(xs[1], see("square", x, xs[0])), None), x, (jnp.arange(3), p["square"]))[0]


def backwards(p, x):
    def layer(x, xs):
        return jnp.tanh(see("square", x, xs[0]) @ xs[1]), x

    return jax.lax.scan(layer, x, (jnp.arange(3), p["square"]), reverse=True)


def nested(p, x):
    def outer(x, xs):
        i, w = xs  # [2, 4, 4]

        def inner(x, ys):
            j, w = ys
            x = jnp.tanh(see("nested", x, 2 * i + j) @ w)
            return see("shared", x) @ p["shared"], None

        return jax.lax.scan(inner, x, (jnp.arange(2), w))[0], None

    return jax.lax.scan(outer, x, (jnp.arange(3), p["nested"]))[0]


def layers_last(p, x):
    """The axis of layers is the last of the leaf, as `nn.scan` may be told."""
    w = jnp.moveaxis(p["last"], -1, 0)
    return jax.lax.scan(lambda x, xs: (see("last", x, xs[0]) @ xs[1], None), x, (jnp.arange(3), w))[0]


def recurrent(p, x):
    def step(h, x):
        h = jnp.tanh(see("shared", h[None]) @ p["shared"])[0] + x
        return h, h

    return jax.lax.scan(step, jnp.ones(4), x)[1]


def looped(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(see("square", x, i) @ p["square"][i]), x)


def while_true(p, x):
    def body(state):
        i, x = state
        return i + 1, jnp.tanh(see("shared", x) @ p["shared"])

    return jax.lax.while_loop(lambda s: (s[0] < 5) & (jnp.sum(s[1]) < 1e3), body, (0, x))[1]


def branched(p, x):
    def one(x):
        return see("shared", x) @ p["shared"]

    def two(x):
        return see("other", 2 * x) @ p["other"].T

    y = jax.lax.cond(x[0, 0] > 0, one, two, x)
    return jax.lax.scan(lambda y, i: (jax.lax.switch(i % 3, [one, two, jnp.tanh], y), None), y, jnp.arange(4))[0]


def mapped(p, x):
    return jax.lax.map(lambda x: see("shared", x[None]) @ p["shared"], x)


def gathered_experts(p, x):
    i = jnp.argsort(x[:, :3], axis=-1)[:, :2]  # [tokens, 2]
    if is_noting():
        for t in range(len(x)):
            for e in i[t]:
                see("experts", x[t : t + 1], e)
    h = jnp.einsum("td,tkdf->tkf", x, p["experts"][i])
    if is_noting():
        for t in range(len(x)):
            for k, e in enumerate(i[t]):
                see("back", jnp.tanh(h[t, k : k + 1]), e)  # the experts of a token differ
    return jnp.einsum("tkf,tkfd->td", jnp.tanh(h), p["back"][i])


def experts_twice_the_same(p, x):
    """A token that is sent to one expert twice gives it the sum of two inputs."""
    i = jnp.array([[0, 0], [1, 2], [2, 1], [1, 1], [0, 2], [2, 2]])
    h = jnp.stack([x, jnp.tanh(x)], axis=1)
    if is_noting():
        for t in range(len(x)):
            for e in sorted({int(e) for e in i[t]}):
                see("experts", jnp.sum(h[t][i[t] == e], axis=0)[None], e)
    return jnp.einsum("tkd,tkdf->tf", h, p["experts"][i])


def adapters_by_user(p, x):
    x = x.reshape(2, 3, 4)
    users = jnp.array([2, 0])
    for b in range(2):
        see("experts", x[b], users[b])
    return jnp.einsum("btd,bdf->btf", x, p["experts"][users])


def ragged(p, x):
    sizes = jnp.array([2, 1, 3])
    for e, (a, b) in enumerate([(0, 2), (2, 3), (3, 6)]):
        see("experts", x[a:b], e)
    return jax.lax.ragged_dot(x, p["experts"], sizes)


def layer_by_number(p, x, number):
    return see("square", x, number) @ p["square"][number]


def experts_side_by_side(p, x):
    x = jnp.stack([x, 2 * x, jnp.tanh(x)])
    for e in range(3):
        see("experts", x[e], e)
    return jnp.einsum("etd,edf->etf", x, p["experts"])


def copies(p, x):
    x = x.reshape(2, 3, 4)
    return jnp.matmul(see("shared", x), jnp.broadcast_to(p["shared"], (2, 4, 4)))


PARAMS = {
    "up": normal(0, 3, 4, 6),
    "down": normal(1, 3, 6, 4),
    "bias": normal(2, 3, 4),
    "head": normal(3, 4, 5),
    "square": normal(4, 3, 4, 4),
    "nested": normal(5, 3, 2, 4, 4),
    "shared": normal(6, 4, 4),
    "other": normal(7, 4, 4),
    "last": normal(8, 4, 4, 3),
    "experts": normal(9, 3, 4, 6),
    "back": normal(10, 3, 6, 4),
}
STACKS = {"up": 3, "down": 3, "square": 3, "nested": 6, "last": 3, "experts": 3, "back": 3}


@pytest.mark.parametrize("kind", [Gram, SquaredNorm])
@pytest.mark.parametrize(
    "f",
    [
        *(scanned, scanned_with_remat, backwards, nested, layers_last, recurrent, looped, while_true, branched, mapped),
        *(
            gathered_experts,
            experts_twice_the_same,
            adapters_by_user,
            ragged,
            layer_by_number,
            experts_side_by_side,
            copies,
        ),
    ],
)
def test_what_is_gathered_is_what_is_read(f, kind):
    x = normal(11, 6, 4)
    more = (jnp.int32(1),) if f is layer_by_number else ()
    with noting() as seen:
        expected = f(PARAMS, x, *more)
    output, observed = jax.jit(observe(f, kind))(PARAMS, x, *more)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), output, expected)
    assert observed.keys() == seen.keys()
    for path, rows in seen.items():
        statistic, place = observed[path], observed.places[path]
        assert place.matrices(PARAMS[path]).shape[1] == rows[0][1].shape[1]
        for i in range(STACKS.get(path, 1)):
            own = [x for index, x in rows if index in (None, i)]
            x = np.concatenate([np.zeros((0, rows[0][1].shape[1])), *own])
            of = statistic.of(i) if path in STACKS else statistic
            total = x.T @ x if kind is Gram else np.sum(x * x, axis=0)
            np.testing.assert_allclose(of.total, total, atol=1e-4, rtol=1e-4, err_msg=f"{path} {i}")
            assert of.tokens == len(x)


@pytest.mark.parametrize("number", [-9, -1, 0, 7])
def test_an_index_beyond_the_stack_picks_what_jax_picks(number):
    def f(p, x, i):
        sliced = jax.lax.dynamic_slice(p["square"], (i, 0, 0), (1, 4, 4))[0]
        return x @ sliced, x @ jnp.take(p["experts"], i, axis=0, mode="clip")

    x = normal(11, 6, 4)
    _, observed = observe(f, Gram)(PARAMS, x, jnp.int32(number))
    taken = {"square": -1 if number == -1 else 0 if number < 0 else min(number, 2), "experts": min(max(number, 0), 2)}
    for path, i in taken.items():  # a slice counts -1 from the end; what is further out is moved inside
        np.testing.assert_allclose(observed[path].of(i).total, x.T @ x, rtol=1e-4, atol=1e-5)
        assert int(jnp.sum(observed[path].tokens)) == len(x)


def with_slices(p, x):
    gate, up = p["gating"][0], p["gating"][1]
    q, k, v = jnp.split(p["fused"], 3, axis=1)
    return jax.nn.gelu(x @ gate) * (x @ up), x @ q, jnp.tanh(x) @ k, x @ v


def test_slices_of_a_leaf_are_kernels_of_their_own():
    p = {"gating": normal(0, 2, 4, 6), "fused": normal(1, 4, 15), "half": normal(2, 4, 6)}
    x = normal(3, 5, 4)
    _, observed = observe(with_slices, Gram)(p, x)
    gram, bent = x.T @ x, jnp.tanh(x).T @ jnp.tanh(x)
    expected = {
        "gating[0:1, 0:4, 0:6]": (gram, p["gating"][0]),
        "gating[1:2, 0:4, 0:6]": (gram, p["gating"][1]),
        "fused[0:4, 0:5]": (gram, p["fused"][:, :5]),
        "fused[0:4, 5:10]": (bent, p["fused"][:, 5:10]),
        "fused[0:4, 10:15]": (gram, p["fused"][:, 10:]),
    }
    assert observed.keys() == expected.keys()
    for key, (total, kernel) in expected.items():
        np.testing.assert_allclose(observed[key].total, total, rtol=1e-4, atol=1e-5)
        place = observed.places[key]
        np.testing.assert_array_equal(place.matrices(p[place.path])[0], kernel)


PADDED = {"padding": [(1, 1), (0, 2)]}


@pytest.mark.parametrize(
    ("shape", "image", "options"),
    [
        ((3, 3, 2, 5), (2, 6, 6, 2), {}),
        ((3, 2, 2, 6), (2, 5, 6, 4), {"feature_group_count": 2, "window_strides": (2, 1), "rhs_dilation": (1, 2)}),
        ((3, 3, 1, 4), (2, 6, 6, 4), {"feature_group_count": 4, "padding": "VALID"}),
        ((1, 1, 3, 5), (1, 4, 4, 3), {}),
        ((4, 1, 6), (2, 9, 6), {"feature_group_count": 6, "padding": [(3, 0)]}),
        (
            (5, 2, 3, 3),
            (1, 2, 6, 6),
            {"dimension_numbers": ("NCHW", "OIHW", "NCHW"), "lhs_dilation": (2, 1), "padding": [(1, 1), (0, 2)]},
        ),
    ],
)
def test_a_convolution_reads_patches(shape, image, options):
    """The matrix view applied to the rows of the Gram's own input gives what the convolution gives."""
    numbers = ("NHWC", "HWIO", "NHWC") if len(shape) == 4 else ("NHC", "HIO", "NHC")
    options = {"window_strides": (1,) * (len(shape) - 2), "padding": "SAME", "dimension_numbers": numbers, **options}
    channels = options["dimension_numbers"][2].index("C")

    def f(p, x):
        return jax.lax.conv_general_dilated(x, p["w"], **options)

    p, x = {"w": normal(0, *shape)}, normal(1, *image)
    (matmul,) = matmuls(f, p, x)
    expected = np.moveaxis(np.asarray(f(p, x)), channels, -1)
    kernels = np.asarray(matmul.place.matrices(p["w"]))  # [groups, d_in, d_out]
    (site,) = find(trace(f, p, x)).sites
    rows = np.asarray(site.product.input.matrix(x)).reshape(len(kernels), -1, kernels.shape[1])
    given = np.concatenate([r @ k for r, k in zip(rows, kernels)], axis=-1)
    np.testing.assert_allclose(given.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)
    _, observed = observe(f, Gram)(p, x)
    total = observed["w"].each.total if len(kernels) > 1 else observed["w"].total[None]
    np.testing.assert_allclose(total, rows.swapaxes(1, 2) @ rows, rtol=1e-4, atol=1e-3)


def test_part_of_an_axis_may_be_summed_over():
    """x [3, 2] times w [4, 6] reshaped to [2, 12]: the inputs are halves of the first axis."""

    def f(p, x):
        return x @ p["w"].reshape(2, 12)

    p, x = {"w": normal(0, 4, 6)}, normal(1, 3, 2)
    _, observed = observe(f, Gram)(p, x)
    place = observed.places["w"]
    np.testing.assert_allclose(x @ place.matrices(p["w"])[0], f(p, x), rtol=1e-5)
    np.testing.assert_array_equal(place.put(p["w"], place.matrices(p["w"])), p["w"])

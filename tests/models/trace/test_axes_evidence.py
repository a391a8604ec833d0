"""Numbers that come from a length: proven, believed or frozen; the truth is the function built with a smaller size."""

import functools
import math
import re
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smaller import agree, random_keep, smaller, zeroed

import jprune
from jprune.errors import JpruneError
from jprune.trace import coupled_axes
from jprune.trace.coupling.forms import form

W, LESS = 12, 5


def build(middle, w):
    """f with its width written in; `middle` knows the width too."""

    def f(p, x):
        h = x @ p["up"]
        assert h.shape == (4, w)
        return middle(h, w) @ p["down"]

    return f


def arrays(w=W, seed=0):
    rng = np.random.default_rng(seed)
    params = {"up": rng.normal(size=(3, w)), "down": rng.normal(size=(w, 5))}
    return {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}, jnp.asarray(
        rng.normal(size=(4, 3)), jnp.float32
    )


def channels(f, params, x, **options):
    (group,) = coupled_axes(f, params, x, **options).at("down", 0)
    return group


UNSAFE = {
    "4 / w": lambda h, w: h * (4 / w),
    "sqrt(2 / w)": lambda h, w: h * math.sqrt(2 / w),
    "a power": lambda h, w: h * w**-0.75,
    "a root": lambda h, w: h * w**-0.5,
    "its logarithm": lambda h, w: h / math.log(w),
    "an addend": lambda h, w: h * (jnp.tanh(h) + w),
    "a bound": lambda h, w: jnp.minimum(h, w / 16),
    "a smaller bound": lambda h, w: jnp.clip(h, -6 / w, 6 / w),
    "an exponent": lambda h, w: jnp.abs(h) ** (1 + 1 / w),
    "less one": lambda h, w: h / (w - 1),
    "a threshold": lambda h, w: jnp.where(h > w / 24, h, 0),
    "in a scan": lambda h, w: jax.lax.scan(lambda c, row: (c, row * (3 / w)), 0.0, h)[1],
}
SAFE = {
    "a number of its own": lambda h, w: h * 0.37 + 1.7,
    "gelu": lambda h, w: jax.nn.gelu(h),
    "a mean": lambda h, w: h * jax.lax.rsqrt((h * h).sum(-1, keepdims=True) / w + 1e-5),
    "a number equal to it": lambda h, w: h * 12.0,
    "a number with a form in it": lambda h, w: h * (1 / 3),
    "a mean of something else": lambda h, w: h - h.sum(0) / 4.0,
}


@pytest.mark.parametrize("what", UNSAFE)
def test_a_number_from_a_length_freezes(what):
    f, small = build(UNSAFE[what], W), build(UNSAFE[what], LESS)
    params, x = arrays()
    found = channels(f, params, x)
    assert found.frozen is not None
    assert "comes from its length" in found.frozen
    assert "(of f with another w)" in found.frozen
    assert not found.proven
    keep = {found.name: np.arange(W) < LESS}
    groups = coupled_axes(f, params, x)
    apart = np.abs(small(smaller(params, groups, keep), x) - f(zeroed(params, groups, keep), x)).max()
    assert apart > 1e-3  # it would have been wrong


@pytest.mark.parametrize("what", SAFE)
def test_other_numbers_do_not(what):
    f, small = build(SAFE[what], W), build(SAFE[what], LESS)
    params, x = arrays()
    groups = coupled_axes(f, params, x)
    (found,) = groups.at("down", 0)
    assert found.frozen is None
    assert found.proven, found.evidence
    assert found.renormalised == (what == "a mean")
    agree(f, params, (x,), groups, {found.name: np.arange(W) < LESS}, small)


WRITTEN = """
def f(p, x):
    h = {x} @ p["up"]
    assert h.shape == (4, {w})
    return ({middle}) @ p["down"]
"""


def written(middle, w=W, x="x"):
    """f with all numbers in its code."""
    scope = {"jnp": jnp, "jax": jax}
    exec(WRITTEN.format(w=w, middle=middle, x=x), scope)
    return scope["f"]


@pytest.mark.parametrize(
    ("middle", "w"),
    [
        (f"h * {4 / 12}", 12),
        (f"h * {4 / 20}", 20),
        (f"h * {math.sqrt(2 / 12)}", 12),
        (f"h * {12**-0.75}", 12),
        (f"h / {math.log(12)}", 12),
        ("jnp.tanh(h) + 12", 12),
        ("jnp.minimum(h, 48.0)", 12),
        (f"jax.nn.relu(h - {1 / 20})", 20),
        (f"h * {1 / 7}", 8),
        (f"h / {math.sqrt(2 * 20)}", 20),
        (f"h * {64**-0.5}", 64),
    ],
)
def test_in_code_what_may_come_from_a_length_freezes(middle, w):
    found = channels(written(middle, w), *arrays(w))
    assert "seems to come from its length" in found.frozen
    assert "numbers={" in found.frozen


def test_in_code_other_numbers_leave_belief():
    for middle in ("h * 0.37 + 1.7", "jnp.tanh(h)", "jax.nn.silu(h)"):
        found = channels(written(middle), *arrays())
        assert (found.frozen, found.proven) == (None, False)
        assert found.evidence.startswith("sizes are written into f")
    common = channels(written("0.5 * h", 8), *arrays(8))  # 4 / 8, but halves are everywhere
    assert (common.frozen, common.proven) == (None, False)
    assert re_found("the number 0.5 in mul at .* for a length w, may come from its length", common)
    scaled = channels(written("jnp.tanh(h)", x=f"(x * {4 / 12})"), *arrays())
    assert re_found("which is 4 / w for a length w, may come from its length", scaled)
    mean = channels(written("h - h.sum(-1, keepdims=True) / 12.0"), *arrays())
    assert (mean.frozen, mean.proven, mean.renormalised) == (None, False, True)
    assert re_found("the number 12 in div at .* divides its mean and is taken for its length", mean)


def re_found(pattern, group):
    return re.search(pattern, group.evidence)


def test_a_mean_over_a_number_in_the_code():
    """A mean as long as the axis is none if another width has the same divisor."""
    middle = lambda h, w: h - h.sum(-1, keepdims=True) / 12.0  # noqa: E731
    assert "divides a mean and does not go with its length" in channels(build(middle, W), *arrays()).frozen
    f = written("h - h.sum(-1, keepdims=True) / 12.0")
    said = channels(f, *arrays(), numbers={12: None})
    assert "as `numbers` says, its mean is not over its length" in said.frozen
    assert channels(f, *arrays(), numbers={12: ("up", 1)}).frozen is None


def test_f_of_any_size_with_a_number_of_its_own():
    """f(smaller) is the masked f, but f built with another width is not; what f holds says that this may happen."""

    def build_any(w):
        scale = w**-0.5
        return (lambda p, x: (x @ p["up"]) * (4 / w) @ p["down"]), (lambda p, x: x @ p["up"] * scale @ p["down"])

    one, other = build_any(W)
    params, x = arrays()
    for f, words in (
        (one, r"if w = 12, which f holds, is its length, the number 0\.333333"),
        (other, "scale = 0.2886"),
    ):
        found = channels(f, params, x)
        assert (found.frozen, found.proven) == (None, False)
        assert re_found(words, found)
    agree(one, params, (x,), coupled_axes(one, params, x), {"down[0]": np.arange(W) < LESS})
    assert channels(lambda p, x: (x @ p["up"]) * 12**-0.5 @ p["down"], params, x).proven


def test_a_number_that_was_computed_before():
    """f built anew may hold another one, whatever its form; one of few digits was written by hand."""

    def build(w, scale):
        def f(p, x):
            h = x @ p["up"]
            assert h.shape == (4, w)
            return h * scale @ p["down"]

        return f

    found = channels(build(W, 0.83 * W**0.3), *arrays())
    assert (found.frozen, found.proven) == (None, False)
    assert re_found(r"scale = 1\.749.*, which f holds, may have been computed from its length", found)
    assert "seems to come from its length" in channels(build(W, W**-0.5), *arrays()).frozen
    assert channels(build(W, 0.37), *arrays()).proven
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), arrays())
    assert "seems to come from its length" in channels(build(W, W**-0.5), *half).frozen


GLOBAL = 12


class Config:
    def __init__(self, width):
        self.width = width


def test_whole_numbers_among_the_arguments():
    """They are constants of f, as sizes are."""

    def f(p, x, w, scale):
        h = x @ p["up"]
        assert h.shape == (4, w)
        return h / scale @ p["down"]

    params, x = arrays()
    (found,) = coupled_axes(f, params, x, 12, jnp.float32(2)).at("down", 0)
    assert found.proven
    assert "(of f with another argument)" in found.evidence
    f_of_w = lambda p, x, w: f(p, x, w, w)  # noqa: E731
    assert "the number 12 in div" in coupled_axes(f_of_w, params, x, 12).at("down", 0)[0].frozen


@pytest.mark.parametrize("how", ["global", "default", "object", "partial", "method", "jit", "dictionary"])
def test_where_f_may_hold_its_sizes(how):
    def scaled(p, x, w):
        h = x @ p["up"]
        assert h.shape == (4, w)
        return h * w**-0.5 @ p["down"]

    def of_global(p, x):
        return scaled(p, x, GLOBAL)

    def of_default(p, x, w=12):
        return scaled(p, x, w)

    class Module:
        w = 12

        def __init__(self):
            self.w = 12

        def __call__(self, p, x):
            return scaled(p, x, self.w)

    config, table = Config(12), {"width": 12}
    f = {
        "global": of_global,
        "default": of_default,
        "object": lambda p, x: scaled(p, x, config.width),
        "partial": functools.partial(scaled, w=12),
        "method": Module().__call__,
        "jit": jax.jit(lambda p, x: scaled(p, x, config.width)),
        "dictionary": lambda p, x: scaled(p, x, table["width"]),
    }[how]
    assert "0.288675 in mul" in channels(f, *arrays()).frozen
    assert (config.width, table, GLOBAL) == (12, {"width": 12}, 12)


def rotary(d):
    """The head dimension of Qwen3: halves, and the square root of the whole."""
    half = d // 2

    def turned(t, speed):
        angle = jnp.arange(6.0)[:, None] * speed
        angle = jnp.concatenate([angle, angle], -1)
        assert t.shape == (6, d)
        return t * jnp.cos(angle) + jnp.concatenate([-t[:, half:], t[:, :half]], -1) * jnp.sin(angle)

    def f(p, x):
        q, k = (turned(x @ p[n], p["speed"]) for n in "qk")
        return jax.nn.softmax(q @ k.T * d**-0.5) @ (x @ p["o"])

    return f


@pytest.mark.parametrize("d", [16, 20, 64])
def test_a_head_dimension_in_halves(d):
    params = {"q": jnp.ones((8, d)), "k": jnp.ones((8, d)), "o": jnp.ones((8, 8)), "speed": jnp.ones(d // 2)}
    (half,) = coupled_axes(rotary(d), params, jnp.ones((6, 8))).at("q", 1)
    assert half.size == d // 2
    assert re_found(r"the number .* in mul .* comes from its length: .* \(of f with another d, another half\)", half)


def attention(heads, features):
    return nn.MultiHeadDotProductAttention(num_heads=heads, qkv_features=features, out_features=6)


def test_eight_heads_of_sixty_four(rng):
    """sqrt(64) is 8: a module with fewer heads shows that it is not their number."""
    model, x = attention(8, 512), jnp.asarray(rng.normal(size=(1, 3, 6)), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 4, jnp.float32), shapes)
    groups = coupled_axes(lambda v, x: model.apply(v, x), params, x)
    heads, dim = groups.at("params/query/kernel", 1)[0], groups.at("params/query/kernel", 2)[0]
    assert (heads.size, heads.frozen, heads.proven) == (8, None, True)
    assert re_found(r"\(of f with another num_heads, another qkv_features\)", heads)
    # Queries and values have one head_dim in this module, so only both can change.
    assert re_found(r"the number 8 in div .* comes from its length: .* \(of f with another qkv_features\)", dim)
    assert groups.at("params/value/kernel", 2)[0].frozen == dim.frozen
    keep = {heads.name: np.array([1, 0, 0, 1, 1, 0, 0, 0], bool)}
    agree(model.apply, params, (x,), groups, keep, attention(3, 192).apply)


def heads_in_code(p, x):
    q, k = ((x @ p[n]).reshape(3, 8, 64) for n in "qk")
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k) / 8.0)
    return jnp.einsum("hts,shd->thd", weights, (x @ p["v"]).reshape(3, 8, 64)).reshape(3, 512) @ p["o"]


def test_what_the_user_says_of_numbers():
    shapes = {n: (5, 512) for n in "qkv"} | {"o": (512, 5)}
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    x = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    found = functools.partial(coupled_axes, heads_in_code, params, x)
    heads, dim = found().at("q", 1)
    # A root of a length explains a number better than a length.
    assert heads.frozen is None
    assert re_found("the number 8 in div .* which is w for a length w, may come from its length", heads)
    assert "sqrt(w) for a length w, seems to come from its length" in dim.frozen
    for numbers in ({8.0: None}, {8: ()}):
        assert [g.frozen for g in found(numbers=numbers).at("q", 1)] == [None, None]
        assert not found(numbers=numbers).at("q", 1)[0].proven
    (dim_of_v,) = [g for g in found().at("v", 1) if g.size == 64]
    heads, dim = found(numbers={8.0: ("q", 1)}).at("q", 1)
    assert re_found("as `numbers` says, the number 8 comes from its length", heads)
    assert dim.frozen == heads.frozen
    assert dim_of_v.frozen is None
    with pytest.raises(JpruneError, match="numbers: 7 is not among the numbers in f that meet a value: 8"):
        found(numbers={7.0: None})
    with pytest.raises(JpruneError, match="numbers: there is no parameter 'w' with an axis 1"):
        found(numbers={8.0: ("w", 1)})
    with pytest.raises(JpruneError, match=r"numbers: expected \(path, axis\) or None for 8.0, got 'q'"):
        found(numbers={8.0: ["q"]})
    with pytest.raises(JpruneError, match="numbers: f holds no number named 'heads'; near misses: none"):
        found(numbers={"heads": ("q", 1)})
    with pytest.raises(JpruneError, match="numbers: expected a number in f or the name"):
        found(numbers={None: ("q", 1)})


def test_what_the_user_says_of_numbers_that_f_holds():
    """Sixteen numbers that could be the width are too many to try; the name says which is."""
    params, x = arrays()

    def f(p, x, a=12, b=12, c=12, d=12, e=12, g=12, width=12):
        h = x @ p["up"]
        assert h.shape == (4, width)
        return h * (a + b + c + d + e + g) @ p["down"]

    assert not channels(f, params, x, numbers={"width": ("up", 1)}).proven  # a = 12 may be the width as well
    cleared = {**dict.fromkeys("abcdeg"), "width": ("up", 1)}
    assert channels(f, params, x, numbers=cleared).proven


def test_control_flow_and_slices_have_numbers_too():
    """At another length f is the same, equation by equation, but for a number inside, or where a slice begins."""
    params, x = arrays()

    def inside(p, x):
        w = p["up"].shape[1]
        h = jax.lax.cond(x[0, 0] > 0, lambda v: v * (4 / w), lambda v: v, x)
        return jnp.tanh(h @ p["up"]) @ p["down"]

    def begins(p, x):
        w = p["up"].shape[1]
        return jnp.tanh(x[:, w % 3 : w % 3 + 1] + x @ p["up"]) @ p["down"]

    assert "the number 0.333333 in mul" in channels(inside, params, x).frozen
    assert not channels(begins, params, x).proven

    def part(p, x):
        return jnp.tanh(x @ p["up"])[:, 2:5] @ p["down"]

    before, taken, after = coupled_axes(part, params | {"down": params["down"][:3]}, x).at("up", 1)
    assert [before.proven, taken.proven, after.proven] == [False, False, True]


def test_a_branch_at_small_lengths_only():
    """f may do something else at lengths that only pruning leads to."""
    params, x = arrays()

    def f(p, x):
        w = p["up"].shape[1]
        return (x @ p["up"]) * min(0.3, w / 20) @ p["down"]

    assert "comes from its length: it is 0.3, and " in channels(f, params, x).frozen

    def at_least(p, x):
        assert p["up"].shape[1] >= 8
        return (x @ p["up"]) @ p["down"]

    found = channels(at_least, params, x)
    assert (found.frozen, found.proven) == (None, False)
    assert "f is not the same program at smaller lengths" in found.evidence


def test_forms():
    for w in (5, 12, 64, 768):
        numbers = (4 / w, (2 / w) ** 0.5, w**-0.75, math.log(w), 3 * w, (2 * w) ** 0.25, 1 / (w - 1), w**2, -1 / w)
        for number in numbers:
            known = form(number, w, 1e-6)
            assert known is not None, (w, number)
            python = re.sub(r"(\d) (w|log)", r"\1 * \2", known.words).replace("sqrt", "math.sqrt")
            python = re.sub(r"\blog", "math.log", python)
            np.testing.assert_allclose(eval(python, {"math": math, "w": w}), abs(number), rtol=1e-3)
    rng = np.random.default_rng(0)
    assert sum(form(float(x), 12, 1e-6) is not None for x in rng.uniform(0, 20, 300)) <= 3
    assert all(form(x, 12, 1e-6) is None for x in (0.0, 1.0, -1.0, math.inf, 0.37, 1e-5, 0.044715))
    assert form(12.0, 12, 0.02).rank == 1
    assert form(4 / 12, 12, 0.02) is None  # in bfloat16 every number has a form


def mamba(inner):
    """x and z fused in one projection, as Mamba has them, and split at a number."""

    def f(p, x):
        both = x @ p["in_proj"]
        a, z = both[:, :inner], both[:, inner:]
        return (jax.nn.silu(a * p["skip"]) * jax.nn.silu(z)) @ p["out_proj"]

    return f


def test_keep_where_a_group_lies_twice_on_an_axis(rng):
    shapes = {"in_proj": (6, 16), "skip": (8,), "out_proj": (8, 6)}
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    groups = coupled_axes(mamba(8), params, x)
    (inner,) = groups.prunable
    assert inner.proven
    units = [1, 2, 6]
    keep = inner.keep(units)
    assert jax.tree.map(np.ndarray.tolist, keep) == {
        "in_proj": {1: [1, 2, 6, 9, 10, 14]},
        "skip": {0: units},
        "out_proj": {0: units},
    }
    small = jprune.shrink(params, keep)
    assert small["in_proj"].shape == (6, 6)
    masked = groups.masked({inner.name: np.isin(np.arange(8), units)})(params, x)
    np.testing.assert_allclose(mamba(3)(small, x), masked, rtol=1e-5, atol=1e-5)


POSITIONS = {
    "factor": lambda h, n: h * n,
    "addend": lambda h, n: h * (jnp.tanh(h) + n),
    "bound": lambda h, n: jnp.minimum(h, n),
    "divisor": lambda h, n: h / n,
    "inside": lambda h, n: jnp.sin(h * n),
}


@pytest.mark.parametrize("seed", range(8))
def test_random_numbers(seed):
    """What is proven holds for the function built with the smaller size, whatever the number follows from."""
    rng = np.random.default_rng(seed)
    c, p = rng.choice([0.5, 1, 2, 3, 0.75]), rng.choice([-1, -0.5, -0.75, 0.5, 1, 0])
    where, asks, w = rng.choice(list(POSITIONS)), rng.random() < 0.5, int(rng.integers(6, 30))

    def build(w):
        def f(params, x):
            h = x @ params["up"]
            if asks:
                assert h.shape[1] == w
            return POSITIONS[where](h, c * (w if asks else h.shape[1]) ** p) @ params["down"]

        return f

    params, x = arrays(w, seed)
    groups = coupled_axes(build(w), params, x)
    (found,) = groups.at("down", 0)
    assert (found.frozen is not None) or p == 0
    assert found.proven or p != 0 or re_found("c = .*, which f holds, may have been computed from its length", found)
    if found.proven:
        keep = random_keep(groups, rng, [found.name])
        agree(build(w), params, (x,), groups, keep, build(int(keep[found.name].sum())))


class Opened:
    """Something that cannot be copied, as what reads files in a background thread."""

    def __init__(self):
        self.size, self.lock, self.limit = 6, threading.Lock(), float("inf")

    def __copy__(self):
        raise TypeError("cannot pickle a lock")


def test_a_function_may_hold_what_cannot_be_copied():
    """A key of random numbers, which is no number, and an open file."""
    key, opened = jax.random.key(0), Opened()

    def f(p, x):
        assert opened.size == 6
        return jax.nn.relu(x @ p["up"] + 0 * jax.random.normal(key, ())) @ p["down"]

    groups = jprune.coupled_axes(f, {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 4))}, jnp.ones((3, 4)))
    assert any(group.size == 6 and not group.frozen for group in groups)

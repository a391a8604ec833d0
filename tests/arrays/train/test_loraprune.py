"""LoRAPrune's criterion against loops, and its transformation: what goes, when, and what is never computed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_loraprune as slow
import optax
import pytest
from jax.extend import core as jex

from jprune.errors import JpruneError
from jprune.structured import block_units
from jprune.trace import coupled_axes, matmuls
from jprune.train import lora
from jprune.train.keep_masked import pack, unpack
from jprune.train.loraprune import Kernel, Part, UnitCriterion, WeightCriterion, loraprune, salience
from jprune.train.quantise import quantise
from jprune.train.schedules import cubic

D, HEADS, KV, HEAD_DIM, FF, RANK, LAYERS, ALPHA = 6, 4, 2, 3, 10, 2, 3, 5.0
SHAPES = {
    "q": (D, HEADS, HEAD_DIM), "k": (D, KV, HEAD_DIM), "v": (D, KV, HEAD_DIM), "o": (HEADS, HEAD_DIM, D),
    "gate": (D, FF), "up": (D, FF), "down": (FF, D),
}  # fmt: skip


def block(p, x):
    """Grouped-query attention and a gated feed-forward layer."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    q = q.reshape(*q.shape[:2], KV, HEADS // KV, HEAD_DIM)
    scores = jax.nn.softmax(jnp.einsum("bthqk,bshk->bhqts", q, k))
    y = jnp.einsum("bhqts,bshk->bthqk", scores, v).reshape(*x.shape[:2], HEADS, HEAD_DIM)
    x = x + jnp.einsum("bthk,hkd->btd", y, p["o"])
    return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


ABSTRACT = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
X = jax.ShapeDtypeStruct((1, 5, D), jnp.float32)
IN_AXES = {m.path: m.in_axes for m in matmuls(block, ABSTRACT, X)}
UNITS = {
    u.name: u
    for u in block_units(coupled_axes(block, ABSTRACT, X), ABSTRACT, matmuls(block, ABSTRACT, X))
}  # fmt: skip


def unit_criterion(*, prunable=(True,) * LAYERS, stacked=True):
    parts = {
        name: tuple(
            Part(kernel=Kernel(path=m.path, in_axes=IN_AXES[m.path], stacked=stacked), side=m.side, channels=m.channels)
            for m in u.members
        )
        for name, u in UNITS.items()
    }
    return UnitCriterion(parts=parts, prunable={name: np.array(prunable) for name in parts}, alpha=ALPHA)


def weight_criterion(prunable=(True,) * LAYERS):
    return WeightCriterion(
        kernels={name: Kernel(path=name, in_axes=IN_AXES[name], stacked=True) for name in SHAPES},
        shapes=SHAPES,
        prunable={name: np.array(prunable) for name in SHAPES},
        alpha=ALPHA,
    )


def random_model(rng, layers=(LAYERS,)):
    """Kernels, adapters, and gradients of these."""

    def draw(shape):
        return jnp.asarray(rng.standard_normal((*layers, *shape)), jnp.float32)

    def pair(shape, axes):
        d_in, d_out = [shape[i] for i in axes], [n for i, n in enumerate(shape) if i not in axes]
        return {"a": draw((*d_in, RANK)), "b": draw((RANK, *d_out))}

    kernels = {name: draw(shape) for name, shape in SHAPES.items()}
    return kernels, *({name: pair(shape, IN_AXES[name]) for name, shape in SHAPES.items()} for _ in range(2))


def matrices(kernels, adapters, gradients, layer):
    """The saliences of one layer by loops, as matrices [d_in, d_out]."""
    found = {}
    for name, shape in SHAPES.items():
        d_in = int(np.prod([shape[i] for i in IN_AXES[name]]))

        def matrix(x, d_in=d_in):
            return np.asarray(x[layer], np.float64).reshape(d_in, -1)

        def factors(tree, name=name, matrix=matrix):
            return matrix(tree[name]["a"]), np.asarray(tree[name]["b"][layer], np.float64).reshape(RANK, -1)

        found[name] = slow.salience(
            matrix(kernels[name]), *factors(adapters), *factors(gradients), scaling=ALPHA / RANK
        )
    return found


def test_by_hand():
    """W = [[1, 2], [3, 4]], A = (1, 2)', B = (3, 4), dA = (.5, 0)', dB = (1, -1), s = 2:
    A B = [[3, 4], [6, 8]],  G = dA B + A dB - dA dB = [[1.5, 2], [0, 0]] + [[1, -1], [2, -2]] - [[.5, -.5], [0, 0]]."""
    s = salience(
        jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        (jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 4.0]])),
        (jnp.array([[0.5], [0.0]]), jnp.array([[1.0, -1.0]])),
        alpha=2.0,
        in_axes=(0,),
    )
    np.testing.assert_allclose(s, [[2.0 * 7, 1.5 * 10], [2.0 * 15, 2.0 * 20]])


def test_gradient_is_the_change_of_the_product(rng):
    """With W = 1 and s = 0, S is |A B - (A - dA) (B - dB)|; also for a kernel whose inputs come last."""
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    a, da, b, db = draw(5, 2), draw(5, 2), draw(2, 3, 4), draw(2, 3, 4)
    change = np.einsum("ir,rhk->hki", a, b) - np.einsum("ir,rhk->hki", a - da, b - db)
    got = salience(jnp.ones((3, 4, 5)), (a, b), (da, db), alpha=0.0, in_axes=(2,))
    np.testing.assert_allclose(got, np.abs(change), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["float32", "int8"])
def test_unit_scores_are_those_of_loops(rng, base):
    kernels, adapters, gradients = random_model(rng)
    frozen = kernels
    if base == "int8":
        frozen = {name: quantise(x, tuple(i + 1 for i in IN_AXES[name])) for name, x in kernels.items()}
        kernels = {name: x.dequantise(jnp.float32) for name, x in frozen.items()}
    criterion = unit_criterion()
    before = jnp.asarray(rng.random((LAYERS, KV)), jnp.float32)
    follow = jax.jit(criterion.follow, static_argnums=0)
    attention = follow("attention", before, frozen, adapters, gradients)
    mlp = follow("mlp", jnp.zeros((LAYERS, FF)), frozen, adapters, gradients)
    for layer in range(LAYERS):
        s = matrices(kernels, adapters, gradients, layer)
        want = slow.attention_scores(*(s[name] for name in "qkvo"), KV, HEAD_DIM)
        np.testing.assert_allclose(attention[layer], 0.9 * before[layer] + 0.1 * want, rtol=1e-4)
        np.testing.assert_allclose(mlp[layer], 0.1 * slow.mlp_scores(s["gate"], s["up"], s["down"]), rtol=1e-4)


def test_a_single_layer_is_not_stacked(rng):
    kernels, adapters, gradients = random_model(rng, layers=())
    follow = jax.jit(unit_criterion(stacked=False, prunable=(True,)).follow, static_argnums=0)
    got = follow("mlp", jnp.zeros(FF), kernels, adapters, gradients)
    s = matrices(*jax.tree.map(lambda x: x[None], (kernels, adapters, gradients)), 0)
    np.testing.assert_allclose(got, 0.1 * slow.mlp_scores(s["gate"], s["up"], s["down"]), rtol=1e-4)


def test_weight_scores_are_those_of_loops(rng):
    kernels, adapters, gradients = random_model(rng)
    for name in ("q", "o", "down"):
        criterion = weight_criterion()
        follow = jax.jit(criterion.follow, static_argnums=0)
        got = follow(name, criterion.start(name, keep_all()[name]), kernels, adapters, gradients)
        for layer in range(LAYERS):
            s = matrices(kernels, adapters, gradients, layer)[name]
            want = 0.1 * s / (np.linalg.norm(s) + 1e-8)
            np.testing.assert_allclose(np.asarray(got[layer]).reshape(s.shape), want, rtol=1e-4, atol=1e-7)


def test_what_is_not_finite_is_skipped(rng):
    """In the layer where it is."""
    kernels, adapters, gradients = random_model(rng)
    bad = {**gradients, "up": {**gradients["up"], "a": gradients["up"]["a"].at[1, 0, 0].set(jnp.nan)}}
    before = jnp.asarray(rng.random((LAYERS, FF)), jnp.float32)
    follow = jax.jit(unit_criterion().follow, static_argnums=0)
    got = follow("mlp", before, kernels, adapters, bad)
    want = follow("mlp", before, kernels, adapters, gradients)
    np.testing.assert_array_equal(got[1], before[1])
    np.testing.assert_allclose(got[::2], want[::2], rtol=1e-5)


def keep_all():
    return {name: pack(jnp.ones((LAYERS, *shape), bool)) for name, shape in SHAPES.items()}


def walk(criterion, keep, schedule, every, steps, rng):
    """The masks after every step of random gradients; what else is updated."""
    kernels, adapters, _ = random_model(rng)
    tx = optax.chain(
        loraprune(criterion, schedule, every=every), optax.masked(optax.sgd(0.1), {"adapters": True, "keep": False})
    )
    params = {"adapters": adapters, "keep": keep}
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, gradients):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update({"adapters": gradients, "keep": None}, state, params, frozen=kernels)
            return optax.apply_updates(params, updates), state

    seen = []
    for _ in range(steps):
        _, _, gradients = random_model(rng)
        before = params
        params, state = step(params, state, gradients)
        np.testing.assert_allclose(
            params["adapters"]["q"]["a"], before["adapters"]["q"]["a"] - 0.1 * gradients["q"]["a"], rtol=1e-5, atol=1e-6
        )
        seen.append(jax.tree.map(np.asarray, params["keep"]))
    return seen, state[0]


def test_units_go_on_time_and_stay_gone(rng):
    """Counted from 1: after the warm-up every second step, and the last time at the schedule's end."""
    keep = {"attention": jnp.ones((LAYERS, KV), jnp.uint8), "mlp": jnp.ones((LAYERS, FF), jnp.uint8)}
    criterion = unit_criterion(prunable=(False, True, True))
    seen, state = walk(criterion, keep, cubic(0.55, begin=1, end=8), 2, 10, rng)
    # floor(10 * .55) = 5 units in the end; before, 5 * (1 - ((8 - t) / 7)^3), rounded; due are 1, 3, 5, 7 and 8.
    share = [1 - ((8 - t) / 7) ** 3 for t in (1, 3, 5, 7)]
    of_mlp = [round(5 * s) for s in share] + [5]
    assert of_mlp[:4] == [0, 3, 5, 5]
    want = [of_mlp[0], of_mlp[0], of_mlp[1], of_mlp[1], of_mlp[2], of_mlp[2], of_mlp[3], 5, 5, 5]
    for masks, gone in zip(seen, want, strict=True):
        assert (masks["mlp"][1:] == 0).sum(1).tolist() == [gone, gone]
        assert masks["mlp"][0].all()
    for name in keep:
        for before, after in itertools.pairwise(seen):
            assert (after[name] <= before[name]).all()  # 0 stays 0
    assert (seen[-1]["attention"] == 0).sum(1).tolist() == [0, 1, 1]
    assert int(state.step) == 10


def test_the_lowest_go(rng):
    """By the importance of that moment: one step, then the masks."""
    keep = {"mlp": jnp.ones((LAYERS, FF), jnp.uint8)}
    criterion = unit_criterion()
    criterion = UnitCriterion(parts={"mlp": criterion.parts["mlp"]}, prunable=criterion.prunable, alpha=ALPHA)
    (masks,), state = walk(criterion, keep, cubic(0.4, end=1), 1, 1, rng)
    for mask, importance in zip(masks["mlp"], np.asarray(state.importance["mlp"])):
        np.testing.assert_array_equal(np.flatnonzero(mask == 0), np.sort(np.argsort(importance)[:4]))


def test_weights_go_output_by_output(rng):
    seen, state = walk(weight_criterion((True, False, True)), keep_all(), cubic(0.5, end=4), 2, 5, rng)
    for name, shape in SHAPES.items():
        masks = [np.asarray(unpack(jnp.asarray(keep[name]), (LAYERS, *shape))) for keep in seen]
        d_in = int(np.prod([shape[i] for i in IN_AXES[name]]))
        gone = [(~m).reshape(LAYERS, d_in, -1).sum(1) for m in masks]
        for before, after in itertools.pairwise(masks):
            assert not (after & ~before).any()
        assert (gone[0] == 0).all()  # not due
        assert (gone[1][::2] == round(d_in // 2 * (1 - 0.5**3))).all()
        assert (gone[-1][::2] == d_in // 2).all()
        assert (gone[-1][1] == 0).all()
        importance = np.asarray(state.importance[name][0]).reshape(d_in, -1)
        assert (importance > 0).all()


def sizes(jaxpr, primitive=None):
    """How many elements every result has, of loops and branches inside as well."""
    for equation in jaxpr.eqns:
        for inner in jex.jaxprs_in_params(equation.params):
            yield from sizes(getattr(inner, "jaxpr", inner), primitive)
        if primitive in (None, equation.primitive.name):
            yield from (v.aval.size for v in equation.outvars)


def test_no_gradient_of_a_kernel(rng):
    """No product of the training step is as large as a kernel; asked for the kernels' gradients, seven are."""
    kernels, adapters, _ = random_model(rng, layers=())
    x = jnp.ones((1, 7, D))  # 7 tokens, with which nothing else has the size of a kernel
    large = {int(np.prod(shape)) for shape in SHAPES.values()}
    adapted = lora.adapt(block, alpha=ALPHA)

    def loss(adapters, kernels):
        return jnp.sum(adapted(kernels, adapters, None, x) ** 2)

    def products(argument):
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=argument))(adapters, kernels).jaxpr
        return sum(size in large for size in sizes(jaxpr, "dot_general"))

    assert products(0) == 0
    assert products(1) == 7


def test_one_matrix_at_a_time(rng):
    """What importance is read from is never larger than a kernel of one layer."""
    kernels, adapters, gradients = random_model(rng)
    largest = max(int(np.prod(shape)) for shape in SHAPES.values())
    for name, n in (("mlp", FF), ("attention", KV)):

        def follow(importance, name=name):
            return unit_criterion().follow(name, importance, kernels, adapters, gradients)

        assert max(sizes(jax.make_jaxpr(follow)(jnp.zeros((LAYERS, n))).jaxpr)) <= largest


def test_bad_input(rng):
    with pytest.raises(JpruneError, match="every 1 or more steps, got 0"):
        loraprune(unit_criterion(), cubic(0.5, end=2), every=0)
    tx = loraprune(unit_criterion(), cubic(0.5, end=2))
    params = {"adapters": {}, "keep": {"mlp": jnp.ones((LAYERS, FF), jnp.uint8)}}
    with pytest.raises(JpruneError, match="frozen="):
        tx.update(params, tx.init(params), params)

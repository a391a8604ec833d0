"""Gradual pruning against a slow NumPy loop: which weights go at which step, and that they never come back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune.errors import JpruneError
from jprune.train import schedules
from jprune.train.keep_masked import unpack

STEPS = 14


def setup(rng, dtype=jnp.float32):
    params = {
        "up": {"kernel": jnp.asarray(rng.standard_normal((12, 21)), dtype), "bias": jnp.zeros(21, dtype)},
        "down": {"kernel": jnp.asarray(rng.standard_normal((24, 8)), dtype)},
    }
    return params, jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), dtype), params)


def numpy_adamw(p, g, moments, t, *, rate=0.05, decay=0.3, b1=0.9, b2=0.999):
    """One update of Loshchilov and Hutter's, in float64."""
    m, v = moments
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    change = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + 1e-8)
    return p - rate * (change + decay * p), (m, v)


def numpy_gradual(kernel, gradient, due, count, importance, *, per_output, steps=STEPS):
    """The kernel after every step: sorts, loops and copies."""
    p = kernel.astype(np.float64)
    mask, moments, seen = np.ones(p.shape, bool), (np.zeros_like(p), np.zeros_like(p)), []
    for t in range(steps):
        if due(t):
            score = importance(p.astype(np.float32), t)
            for column in range(p.shape[1]) if per_output else [slice(None)]:
                score[:, column][~mask[:, column]] = -1  # below all others: stays pruned
                lowest = np.argsort(score[:, column], axis=None, kind="stable")[: count(t)]
                new = np.ones(score[:, column].shape, bool)
                new.flat[lowest] = False
                mask[:, column] = new
        p, moments = numpy_adamw(p, gradient * np.cos(t), moments, t)
        p[~mask] = 0
        seen.append(p.copy())
    return seen


def train(transformation, params, gradient, steps=STEPS, **extra):
    """The parameters after every step; the same compiled step for all of them, the step number traced."""
    optimizer = optax.chain(optax.adamw(0.05, weight_decay=0.3), transformation)

    @jax.jit
    def step(params, state, t):
        scaled = jax.tree.map(lambda g: g * jnp.cos(t.astype(g.dtype)), gradient)
        given = {name: jax.tree.map(lambda x: x * (1 + t.astype(jnp.float32)), value) for name, value in extra.items()}
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole numbers
            updates, state = optimizer.update(scaled, state, params, **given)
            return optax.apply_updates(params, updates), state

    state, seen = jax.jit(optimizer.init)(params), []
    for t in range(steps):
        params, state = step(params, state, jnp.int32(t))
        seen.append(params)
    assert step._cache_size() == 1
    return seen, state[-1]


@pytest.mark.parametrize("per", ["kernel", "output"])
def test_magnitude_along_a_cubic_schedule_is_the_slow_loop(rng, per):
    """begin 2, end 11, every 4: due at 2, 6, 10 and 11; progress 1 - (1 - (t - 2) / 9)^3 is 0, 604/729, 728/729, 1."""
    params, gradient = setup(rng)
    schedule = schedules.cubic(0.7, begin=2, end=11)
    axes = {"up/kernel": (0,), "down/kernel": (0,)}
    seen, _ = train(jprune.gradual(schedule, every=4, per=per, in_axes=axes), params, gradient)
    for name in ("up", "down"):
        kernel = np.asarray(params[name]["kernel"])
        size = len(kernel) if per == "output" else kernel.size
        progress = {2: 0, 6: 604 / 729, 10: 728 / 729, 11: 1}
        counts = {t: round(int(0.7 * size) * x) for t, x in progress.items()}
        truth = numpy_gradual(
            kernel, np.asarray(gradient[name]["kernel"], np.float64), counts.__contains__, counts.get,
            lambda p, t: np.abs(p), per_output=per == "output",
        )  # fmt: skip
        for t, (got, want) in enumerate(zip(seen, truth, strict=True)):
            got = np.asarray(got[name]["kernel"])
            np.testing.assert_array_equal(got == 0, want == 0, err_msg=f"{name} after step {t}")
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
        zeros = [int((np.asarray(p[name]["kernel"]) == 0).sum()) for p in seen]
        columns = kernel.shape[1] if per == "output" else 1
        reached = [max((c for due, c in counts.items() if due <= t), default=0) * columns for t in range(STEPS)]
        assert zeros == reached
    assert (np.asarray(seen[-1]["up"]["bias"]) != 0).all()


def test_a_statistic_that_changes_from_step_to_step(rng):
    """Wanda's score by the norms that are given at the steps that are due, here different ones at each."""
    params, gradient = setup(rng)
    params, gradient = {"w": {"kernel": params["down"]["kernel"]}}, {"w": {"kernel": gradient["down"]["kernel"]}}
    norms = jnp.asarray(rng.random(24) ** 4 * 100, jnp.float32)
    transformation = jprune.gradual(schedules.linear(0.5, end=6), jprune.scores.wanda, every=2, per="output")
    seen, _ = train(transformation, params, gradient, statistics={"w/kernel": norms})
    counts = {0: 0, 2: 4, 4: 8, 6: 12}
    kernel, slope = np.asarray(params["w"]["kernel"]), np.asarray(gradient["w"]["kernel"], np.float64)
    root = np.sqrt(np.asarray(norms))
    truth = numpy_gradual(
        kernel, slope, counts.__contains__, counts.get, lambda p, t: np.abs(p) * root[:, None], per_output=True
    )
    plain = numpy_gradual(kernel, slope, counts.__contains__, counts.get, lambda p, t: np.abs(p), per_output=True)
    assert ((truth[-1] == 0) != (plain[-1] == 0)).any()  # the statistic matters
    for got, want in zip(seen, truth, strict=True):
        np.testing.assert_array_equal(np.asarray(got["w"]["kernel"]) == 0, want == 0)


def test_what_is_pruned_never_comes_back_whatever_the_score_says(rng):
    """A score that turns around: it would prune the other half next time."""
    params = {"kernel": jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)}
    turning = {"kernel": jnp.arange(8, dtype=jnp.float32) - 3.5}

    def score(kernel, statistic):
        return jnp.broadcast_to(statistic[:, None], kernel.shape)

    transformation = jprune.gradual(schedules.linear(0.75, initial=0.5, end=1), score, every=1, per="output")
    state = transformation.init(params)
    for sign, gone in ((1, [0, 1, 2, 3]), (-1, [0, 1, 2, 3, 6, 7])):
        statistics = jax.tree.map(lambda x, s=sign: s * x, turning)
        updates, state = transformation.update(params, state, params, statistics=statistics)
        params = optax.apply_updates(params, updates)
        mask = np.ones((8, 6), bool)
        mask[gone] = False
        np.testing.assert_array_equal(np.asarray(params["kernel"]) != 0, mask)
        np.testing.assert_array_equal(unpack(state.masks["kernel"], (8, 6)), mask)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_bit_a_weight_and_the_rest_is_trained_as_without(rng, dtype):
    params, gradient = setup(rng, dtype)
    seen, state = train(jprune.gradual(schedules.constant(0.5, begin=1), every=1), params, gradient, steps=3)
    free, _ = train(optax.identity(), params, gradient, steps=3)
    assert sum(x.nbytes for x in state.masks.values()) == 12 * 3 + 24
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == jnp.float32 else {"rtol": 0.02, "atol": 0.02}
    for step, share in enumerate([0, 2, 2]):
        for name in ("up", "down"):
            got, plain = (np.asarray(p[step][name]["kernel"], np.float32) for p in (seen, free))
            assert (got == 0).sum() == (got.size // share if share else 0)
            np.testing.assert_allclose(got[got != 0], plain[got != 0], **close)


def test_axes_of_kernels_with_heads(rng):
    """Among the inputs of each output of [heads, head_dim, d_model], with the input axes said or read off the norms."""
    params = {"o": {"kernel": jnp.asarray(rng.standard_normal((3, 4, 10)), jnp.float32)}}
    norms = {"o/kernel": jnp.ones(12)}
    said = jprune.gradual(schedules.constant(0.5), per="output", in_axes={"o/kernel": (0, 1)})
    read = jprune.gradual(schedules.constant(0.5), jprune.scores.wanda, per="output")
    smallest = np.argsort(np.abs(np.asarray(params["o"]["kernel"]).reshape(12, 10)), axis=0)[:6]
    for transformation, extra in ((said, {}), (read, {"statistics": norms})):
        updates, _ = transformation.update(params, transformation.init(params), params, **extra)
        new = np.asarray(optax.apply_updates(params, updates)["o"]["kernel"]).reshape(12, 10)
        for column in range(10):
            assert set(np.flatnonzero(new[:, column] == 0)) == set(smallest[:, column])
    with pytest.raises(JpruneError, match="which axes of shape"):
        jprune.gradual(schedules.constant(0.5), per="output").init(params)


def test_cut_over_devices_the_masks_are_the_same(rng):
    params, gradient = setup(rng)
    transformation = jprune.gradual(schedules.cubic(0.6, end=8), every=3)
    optimizer = optax.chain(optax.adamw(0.05, weight_decay=0.3), transformation)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, cut = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("fsdp"))

    def place(leaf):
        return cut if leaf.ndim == 2 and leaf.shape[0] % 4 == 0 else whole

    def run(shardings):
        state = jax.eval_shape(optimizer.init, params)
        out = None if shardings is None else (jax.tree.map(place, params), jax.tree.map(place, state))
        begin = jax.jit(optimizer.init, out_shardings=None if out is None else out[1])

        @jax.jit
        def step(p, s):
            with jax.numpy_dtype_promotion("standard"):
                updates, s = optimizer.update(gradient, s, p)
                return optax.apply_updates(p, updates), s

        step = jax.jit(step, out_shardings=out)
        p = params if out is None else jax.device_put(params, out[0])
        s = begin(p)
        for _ in range(10):
            p, s = step(p, s)
        return p, s[-1]

    (one, _), (four, state) = run(None), run("cut")
    assert len(state.masks["down/kernel"].sharding.device_set) == 4
    assert state.masks["down/kernel"].addressable_shards[0].data.shape == (6, 1)
    for name in ("up", "down"):
        a, b = np.asarray(one[name]["kernel"]), np.asarray(four[name]["kernel"])
        np.testing.assert_array_equal(a == 0, b == 0)
        assert (b == 0).sum() == int(0.6 * b.size)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_bad_input(rng):
    params, _ = setup(rng)
    schedule = schedules.constant(0.5)
    with pytest.raises(JpruneError, match="every 1 or more"):
        jprune.gradual(schedule, every=0)
    with pytest.raises(JpruneError, match='use "output" or "kernel"'):
        jprune.gradual(schedule, per="block")
    with pytest.raises(JpruneError, match="matches none"):
        jprune.gradual(schedule, where="nothing").init(params)
    by_norm = jprune.gradual(schedule, jprune.scores.wanda)
    with pytest.raises(JpruneError, match="down/kernel: the score reads a statistic"):
        by_norm.update(params, by_norm.init(params), params, statistics={"up/kernel": jnp.ones(12)})
    plain = jprune.gradual(schedule)
    with pytest.raises(JpruneError, match="needs the parameters"):
        plain.update(params, plain.init(params))


def test_layers_in_a_stack_are_kept_apart(rng):
    """[layers, d_in, d_out] with its second axis as inputs: each output of each layer loses its own half."""
    params = {
        "kernel": jnp.asarray(rng.standard_normal((3, 8, 5)) * np.array([1, 10, 100])[:, None, None], jnp.float32)
    }
    transformation = jprune.gradual(schedules.constant(0.5), per="output", in_axes={"kernel": (1,)})
    updates, _ = transformation.update(params, transformation.init(params), params)
    new = np.asarray(optax.apply_updates(params, updates)["kernel"])
    for layer in range(3):
        for output in range(5):
            smallest = np.argsort(np.abs(np.asarray(params["kernel"])[layer, :, output]))[:4]
            assert set(np.flatnonzero(new[layer, :, output] == 0)) == set(smallest)

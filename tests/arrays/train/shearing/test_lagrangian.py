"""The Lagrangian against finite differences, numbers computed by hand, and a run that reaches its targets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jprune.errors import JpruneError
from jprune.train.optimizer import AdamW
from jprune.train.shearing import hard_concrete, lagrangian

SHAPES = {"layer": (8,), "mlp": (8, 40), "attention": (8, 6)}
TARGETS = {"layer": 6, "mlp": 10, "attention": 3}


def parameters(log_alpha=None):
    masks = {kind: hard_concrete.initial(shape) for kind, shape in SHAPES.items()}
    return {
        "model": jnp.zeros(3),
        "log_alpha": masks if log_alpha is None else log_alpha,
        "multipliers": lagrangian.initial_multipliers(SHAPES),
    }


def promoting(update):
    """Optax raises floats to whole numbers."""

    def promoted(*args):
        with jax.numpy_dtype_promotion("standard"):
            return update(*args)

    return promoted


def random_masks(seed=0):
    rng = np.random.default_rng(seed)
    return {kind: jnp.asarray(rng.normal(1, 2, shape), jnp.float32) for kind, shape in SHAPES.items()}


def numpy_penalty(log_alpha, multipliers, gone):
    total = 0.0
    for kind, a in log_alpha.items():
        rows = np.asarray(a, np.float64).reshape(-1, a.shape[-1])
        stay = 1 - 1 / (1 + 11 ** (2 / 3) * np.exp(rows))
        excess = [1 - row.mean() - gone[kind] for row in stay]
        m = np.asarray(multipliers[kind], np.float64)
        total += np.mean([m[0] * e + m[1] * e * e for e in excess])
    return total


def test_penalty_and_its_gradients():
    """One row of heads a layer, each with its own excess; central differences in float64."""
    masks = random_masks()
    multipliers = {kind: jnp.asarray([0.7, 3.0]) * (i + 1) for i, kind in enumerate(SHAPES)}
    gone = {"layer": 0.25, "mlp": 0.75, "attention": 0.5}
    value = jax.jit(lagrangian.penalty)(masks, multipliers, gone)
    np.testing.assert_allclose(value, numpy_penalty(masks, multipliers, gone), rtol=1e-5)
    by_mask, by_multiplier = jax.jit(jax.grad(lagrangian.penalty, (0, 1)))(masks, multipliers, gone)
    for kind, at in (("layer", (3,)), ("mlp", (2, 7)), ("attention", (7, 5))):
        ends = []
        for sign in (1, -1):
            moved = np.asarray(masks[kind], np.float64).copy()
            moved[at] += sign * 1e-4
            ends.append(numpy_penalty({**masks, kind: moved}, multipliers, gone))
        np.testing.assert_allclose(by_mask[kind][at], (ends[0] - ends[1]) / 2e-4, rtol=1e-3, atol=1e-7)
        ends = [numpy_penalty(masks, {**multipliers, kind: multipliers[kind].at[1].add(s)}, gone) for s in (0.0, 1.0)]
        np.testing.assert_allclose(by_multiplier[kind][1], ends[1] - ends[0], rtol=1e-4)


def test_gradients_are_added_and_the_target_rises():
    tx = lagrangian.lagrangian(TARGETS, warmup=4)
    params = parameters(random_masks())
    state = tx.init(params)
    updates = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(tx.update)
    shares = []
    for _ in range(6):
        out, state = update(updates, state, params)
        # The multipliers are zero, so their own gradient alone tells the target: mean of s - t.
        kept = hard_concrete.expected(params["log_alpha"]["layer"]).mean()
        shares.append(float(1 - kept - (out["multipliers"]["layer"][0] - 1)))
        np.testing.assert_array_equal(out["model"], 1)
        np.testing.assert_array_equal(out["log_alpha"]["mlp"], 1)
    np.testing.assert_allclose(shares, [0.25 * min(1, i / 4) for i in range(6)], atol=1e-6)
    assert int(state.step) == 6


def test_dual_ascent_reaches_its_targets():
    """With nothing but the Lagrangian, and with a loss that wants everything kept."""
    steps = 1000
    masks = AdamW(learning_rate=1.0, schedule="cosine", floor=0.1, warmup=100, b2=0.95)
    tx = lagrangian.optimizer(AdamW(), masks, masks, targets=TARGETS, steps=steps, warmup=200)
    tx = optax.GradientTransformation(tx.init, promoting(tx.update))
    wish = {kind: jnp.linspace(0, 0.01, np.prod(shape)).reshape(shape) for kind, shape in SHAPES.items()}

    @jax.jit
    def step(params, state):
        zero = jax.tree.map(jnp.zeros_like, params)
        pull = jax.grad(lambda a: -sum(jnp.sum(wish[k] * hard_concrete.expected(x)) for k, x in a.items()))
        updates, state = tx.update({**zero, "log_alpha": pull(params["log_alpha"])}, state, params)
        return optax.apply_updates(params, updates), state

    params = parameters()
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    got = lagrangian.sizes(params["log_alpha"])
    for kind, target in TARGETS.items():
        assert abs(float(got[kind]) - target) <= 0.01 * target, kind
        kept = hard_concrete.deterministic(params["log_alpha"][kind], target)
        assert np.all(np.count_nonzero(kept, axis=-1) == target)
    assert all(float(jnp.abs(x).max()) <= 4.6052 for x in params["log_alpha"].values())
    # What the loss wants kept most is what stays.
    np.testing.assert_array_equal(
        np.flatnonzero(hard_concrete.deterministic(params["log_alpha"]["layer"], 6)), range(2, 8)
    )


def test_multipliers_ascend_and_rates_are_their_own():
    """Adam's first step is its learning rate, whatever the gradient."""
    plain = {"schedule": "constant", "warmup": 0, "clip": 0.0}
    each = [AdamW(learning_rate=rate, **plain) for rate in (1e-3, 0.5, 0.25)]
    tx = lagrangian.optimizer(*each, targets=TARGETS, steps=5, warmup=1)
    tx = optax.GradientTransformation(tx.init, promoting(tx.update))
    params = parameters({kind: jnp.zeros(shape) for kind, shape in SHAPES.items()})
    state = tx.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(tx.update)(ones, state, params)
    np.testing.assert_allclose(updates["model"], -1e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["log_alpha"]["mlp"], -0.5, rtol=1e-4)
    # At step 0 nothing is to go yet, and 17 % are expected to: the excess is positive, and the multipliers rise.
    np.testing.assert_allclose(updates["multipliers"]["layer"], [0.25, 0.25], rtol=1e-4)


def test_a_mask_without_a_target():
    with pytest.raises(JpruneError, match="'mlp'"):
        lagrangian.lagrangian({"layer": 6, "attention": 3}, warmup=4).init(parameters())

"""Statistics against NumPy in float64: batches, merging, dtypes, jit, and four devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_scores
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jprune.errors import JpruneError
from jprune.statistics import Gram, Moments, SquaredNorm, Stacked, Statistic, gram, update

KINDS = [SquaredNorm, Gram, Moments]


def check(statistic, x, rtol=2e-5):
    """Compares a statistic with its definition, in float64, of the tokens it should have seen."""
    x = np.asarray(x, np.float64)
    assert int(statistic.tokens) == len(x)
    assert statistic.d_in == x.shape[1]
    match statistic:
        case SquaredNorm():
            np.testing.assert_allclose(statistic.total, numpy_scores.squared_norm(x), rtol=rtol)
        case Gram():
            expected = numpy_scores.gram(x)
            assert statistic.total.dtype == jnp.float32
            np.testing.assert_allclose(statistic.total, expected, rtol=rtol, atol=rtol * np.abs(expected).max())
        case Moments():
            np.testing.assert_allclose(statistic.mean, x.mean(0), rtol=rtol, atol=rtol * np.abs(x).max())
            np.testing.assert_allclose(statistic.variance, x.var(0), rtol=rtol)


def tokens(rng, n=40, d_in=10):
    """Inputs with correlations, means and very different sizes."""
    x = rng.normal(size=(n, d_in)) @ rng.normal(size=(d_in, d_in)) + rng.normal(size=d_in)
    return jnp.asarray(x * np.geomspace(0.01, 10, d_in), jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch(rng, kind):
    x = tokens(rng)
    assert isinstance(kind.zeros(10), Statistic)
    check(kind.zeros(10).update(x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_in_any_grouping(rng, kind):
    x = tokens(rng)
    a, b, c = (kind.zeros(10).update(part) for part in (x[:7], x[7:8], x[8:]))
    one_by_one = kind.zeros(10).update(x[:7]).update(x[7:8]).update(x[8:])
    for statistic in (one_by_one, a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        check(statistic, x)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_seen_is_neutral(rng, kind):
    seen = kind.zeros(10).update(tokens(rng))
    nothing = kind.zeros(10)
    for merged in (seen.merge(nothing), nothing.merge(seen)):
        jax.tree.map(np.testing.assert_array_equal, merged, seen)
    jax.tree.map(np.testing.assert_array_equal, nothing.merge(nothing), nothing)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_inputs_are_summed_in_float32(rng, kind, dtype):
    x = tokens(rng, n=3000, d_in=5).astype(dtype)
    statistic = kind.zeros(5).update(x[:2000]).update(x[2000:])
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(statistic))
    check(statistic, x, rtol=1e-4)


def test_variance_of_inputs_far_from_zero(rng):
    """The difference of mean squares would lose everything here."""
    x = jnp.asarray(1000 + rng.normal(size=(500, 4)), jnp.float32)
    statistic = functools.reduce(lambda s, part: s.update(part), jnp.split(x, 10), Moments.zeros(4))
    np.testing.assert_allclose(statistic.variance, np.asarray(x, np.float64).var(0), rtol=1e-3)


@pytest.mark.parametrize("d_in", [1, 2, 3, 4, 5, 7, 12, 64, 100])
def test_gram_of_any_width(rng, d_in):
    """It is put together from three block rows; it must be complete, and symmetric as far as products are."""
    x = rng.normal(size=(20, d_in)).astype(np.float32)
    result = np.asarray(jax.jit(gram)(jnp.asarray(x)))
    np.testing.assert_allclose(result, result.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result, numpy_scores.gram(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_jit_and_scan(rng, kind):
    x = tokens(rng)
    batches = x.reshape(4, 10, 10)
    statistic, _ = jax.jit(lambda b: jax.lax.scan(lambda s, x: (s.update(x), None), kind.zeros(10), b))(batches)
    check(statistic, x)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_tokens(rng, kind):
    """Tokens spread over four devices, without a word about it to the statistic."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = tokens(rng)
    spread = jax.device_put(x, NamedSharding(mesh, P("data")))
    assert len(spread.sharding.device_set) == 4
    check(jax.jit(lambda x: kind.zeros(10).update(x))(spread), x)


@pytest.mark.parametrize("kind", [SquaredNorm, Gram])
def test_shard_map(rng, kind):
    """One statistic a device, summed: what `merge` does for sums."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = tokens(rng)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def everywhere(x):
        return jax.lax.psum(kind.zeros(10).update(x), "data")

    check(jax.jit(everywhere)(x), x)


def test_merging_what_devices_have_seen(rng):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = tokens(rng)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    def each(x):
        return jax.tree.map(lambda leaf: leaf[None], Moments.zeros(10).update(x))

    parts = each(x)
    check(functools.reduce(Moments.merge, [jax.tree.map(lambda leaf, i=i: leaf[i], parts) for i in range(4)]), x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_weight_w_counts_w_times(rng, kind):
    """Whole weights are the same token w times over; padding may be anything, even NaN."""
    x, times = np.asarray(tokens(rng, n=12)), np.array([0, 1, 2, 3] * 3)
    padded = np.where(times[:, None] > 0, x, np.nan)
    repeated = np.repeat(x, times, axis=0)
    seen = jax.jit(update)
    statistic = seen(seen(kind.zeros(10), padded[:6], times[:6]), padded[6:], times[6:])
    assert int(statistic.tokens) == (times > 0).sum()
    check(dataclasses.replace(statistic, tokens=jnp.int32(times.sum())), repeated)

    plain = seen(kind.zeros(10), x[times > 0])
    by_bool = seen(kind.zeros(10), padded, times > 0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), by_bool, plain)
    nothing = seen(kind.zeros(10), padded, times > 9)
    jax.tree.map(np.testing.assert_array_equal, nothing, kind.zeros(10))


def test_weights_that_are_no_whole_numbers(rng):
    x, weights = np.asarray(tokens(rng)), rng.uniform(0, 0.01, size=40).astype(np.float32)
    seen = jax.jit(update)
    moments = seen(seen(Moments.zeros(10), x[:20], weights[:20]), x[20:], weights[20:])
    mean = np.average(np.asarray(x, np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.variance, np.average((x - mean) ** 2, axis=0, weights=weights), rtol=1e-4)
    expected = np.einsum("t,ti,tj->ij", weights, x, x)
    total = seen(Gram.zeros(10), x, weights).total
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_stack_whose_tokens_are_picked_by_number(rng):
    """Experts by their number: weights are the one-hot form of the picks, and padding is picked by none."""
    x, picks = np.asarray(tokens(rng, n=20, d_in=4)), np.arange(20) % 3
    padding = np.arange(20) < 15
    one_hot = (picks == np.arange(3)[:, None]) & padding
    gathered = jax.jit(lambda x, w: Stacked.zeros(Gram, 4, 3).update(x, w))
    shared = gathered(x, one_hot)
    own = gathered(np.where(one_hot[..., None], x, np.float32(0)), padding)
    for e in range(3):
        expected = numpy_scores.gram(x[one_hot[e]])
        for stacked in (shared, own):
            assert stacked.tokens.tolist() == [5, 5, 5]
            np.testing.assert_allclose(stacked.each.total[e], expected, rtol=1e-5, atol=1e-4)
    assert shared.d_in == 4


def test_a_stack_of_any_statistic_is_merged_one_by_one(rng):
    x = tokens(rng, n=30).reshape(3, 10, 10)
    first, second = (Stacked(jax.jit(jax.vmap(Moments.zeros(10).update))(part)) for part in (x[:, :5], x[:, 5:]))
    merged = jax.jit(Stacked.merge)(first, second)
    assert merged.d_in == 10
    for e in range(3):
        check(merged.of(e), x[e])


def test_weights_that_do_not_fit(rng):
    @dataclasses.dataclass(frozen=True)
    class Largest:
        most: object

        def update(self, x):
            return Largest(jnp.maximum(self.most, jnp.max(jnp.abs(x), axis=0)))

    x = tokens(rng, n=4)
    np.testing.assert_array_equal(update(Largest(jnp.zeros(10)), x).most, np.abs(x).max(0))
    with pytest.raises(JpruneError, match=r"Largest\.update has no parameter `weights`"):
        update(Largest(jnp.zeros(10)), x, jnp.ones(4))
    for weights, words in (
        (-np.ones(4), "at least 0"),
        (np.full(4, np.nan), "at least 0"),
        (np.ones(3), r"shape \(4,\)"),
    ):
        for statistic in (kind.zeros(10) for kind in KINDS):
            with pytest.raises(JpruneError, match=words):
                update(statistic, x, weights)
    with pytest.raises(JpruneError, match=r"shape \(3, 4\)"):
        Stacked.zeros(Gram, 10, 3).update(x, jnp.ones((2, 4)))

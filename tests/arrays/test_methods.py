"""Methods and `prune` over trees: every container, kernels with head axes, filters, errors, a method of one's own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_scores
import numpy_sparsegpt
import pytest
from flax import linen, nnx

import jprune
from jprune import masks, trees
from jprune.errors import JpruneError
from jprune.methods import Admm, Alps, ByScore, Magnitude, Method, SparseGPT, Wanda, masked
from jprune.patterns import NM, Unstructured
from jprune.pipeline.registry import ONE_SHOT
from jprune.places import Observed, Place
from jprune.statistics import Gram, Moments, SquaredNorm

D, HEADS, HEAD_DIM, FF = 24, 4, 6, 24  # one matrix shape, so that solvers compile once


def attention_params(rng):
    """A block in plain nested dicts, with head axes, biases and a norm."""

    def kernel(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "attn": {
            "q": {"kernel": kernel(D, HEADS, HEAD_DIM), "bias": kernel(HEADS, HEAD_DIM)},
            "o": {"kernel": kernel(HEADS, HEAD_DIM, D)},
        },
        "mlp": {"up": {"kernel": kernel(D, FF)}},
        "norm": {"scale": jnp.ones(D)},
    }


def inputs(rng, n=80):
    """Tokens that each kernel of `attention_params` sees, as matrices."""
    x = rng.normal(size=(3, n, 24)) @ rng.normal(size=(24, 24))
    return dict(zip(("attn/q/kernel", "attn/o/kernel", "mlp/up/kernel"), x.astype(np.float32), strict=True))


AXES = {"attn/q/kernel": (0,), "attn/o/kernel": (0, 1), "mlp/up/kernel": (0,)}
"""Input axes. All kernels have 24 inputs and 24 outputs, so no size tells them."""


def gathered(tokens, kind):
    """Statistics as `observe` gives them, which know their axes."""
    seen = {path: kind.zeros(x.shape[1]).update(jnp.asarray(x)) for path, x in tokens.items()}
    return Observed(seen, {path: Place(path=path, in_axes=AXES[path]) for path in seen})


def matrix(kernel):
    """The matrix view of a kernel with 24 inputs, written out."""
    return np.asarray(kernel).reshape(24, -1)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_magnitude(rng, pattern):
    """No data; unstructured scores compete in the whole kernel, as the authors of SparseGPT and Wanda have it."""
    params = attention_params(rng)
    new, by_path = jprune.prune(params, None, Magnitude(), pattern, in_axes=AXES)
    words = {"nm": (2, 4)} if isinstance(pattern, NM) else {"sparsity": 0.5, "per": "kernel"}
    assert sorted(by_path) == ["attn/o/kernel", "attn/q/kernel", "mlp/up/kernel"]
    for path in by_path:
        old = np.asarray(trees.flatten(params)[path])
        d_in = 24  # of every kernel
        expected = numpy_scores.select(np.abs(old.reshape(d_in, -1)), **words).reshape(old.shape)
        np.testing.assert_array_equal(by_path[path], expected)
        np.testing.assert_array_equal(trees.flatten(new)[path], np.where(expected, old, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(ByScore):
    """Magnitude, among the inputs of each output if the pattern does not say."""

    def score(self, kernel, statistic):
        return jnp.abs(kernel)


def test_inputs_must_be_known_where_they_matter(rng):
    """A matrix may be [d_in, d_out] or [d_out, d_in], and only one of both is right."""
    params, norms = attention_params(rng), gathered(inputs(rng), SquaredNorm)
    cases = [(Magnitude(), NM(2, 4)), (Magnitude(), Unstructured(0.5, "output")), (Sizes(), Unstructured(0.5))]
    for method, pattern in cases:
        for where in ("attn/o", "mlp/up"):
            with pytest.raises(JpruneError, match=r"which axes of shape .*in_axes=.*jprune\.matmuls.*jprune\.observe"):
                jprune.prune(params, None, method, pattern, where=where)
    for path, axes in (("attn/o/kernel", r"\(2,\) or \(0, 1\)"), ("mlp/up/kernel", r"\(0,\) or \(1,\)")):
        with pytest.raises(JpruneError, match=rf"{path}: its statistic has 24 inputs, and .* axes {axes} may be"):
            jprune.prune(params, dict(norms), Wanda(), Unstructured(0.5), where=path)
    matmuls = [jprune.trace.ParamMatmul(path=p, in_axes=a, out_axes=(), stage=0, input_id=0) for p, a in AXES.items()]
    expected = jprune.prune(params, norms, Wanda(), NM(2, 4))
    for in_axes in (AXES, matmuls):
        result = jprune.prune(params, dict(norms), Wanda(), NM(2, 4), in_axes=in_axes)
        jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_a_kernel_alone_with_what_is_not_its_statistic(rng):
    """Called without `jprune.prune`, which looks at what it is given by path."""
    kernel, x = jnp.ones((8, 4)), jnp.asarray(rng.standard_normal((5, 8)), jnp.float32)
    gram, norms = Gram.zeros(8).update(x), SquaredNorm.zeros(8).update(x)
    wrong = [(Wanda(), gram, "Wanda needs a SquaredNorm of its inputs, got Gram"), (Wanda(), None, "got NoneType")]
    wrong += [(Wanda(refit=1), norms, "Wanda needs a Gram"), (SparseGPT(), x, "SparseGPT needs a Gram")]
    wrong += [(SparseGPT(dense_targets=0.5), gram, "needs a CrossGram of its inputs, got Gram")]
    wrong += [
        (Wanda(), SquaredNorm.zeros(6).update(x[:, :6]), "kernel: expected a statistic of 8 inputs, got one of 6")
    ]
    for method, statistic, message in wrong:
        with pytest.raises(JpruneError, match=message):
            method(kernel, statistic, Unstructured(0.5))


def test_a_mask_to_keep_must_be_of_a_chosen_kernel(rng):
    params = attention_params(rng)
    keep = {"attn/o/kernel": jnp.ones((4, 6, 24), bool)}
    with pytest.raises(JpruneError, match="attn/o/kernel"):
        jprune.prune(params, None, Magnitude(), Unstructured(0.5), skip="attn/o", keep=keep)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_wanda(rng, pattern):
    """The inputs of o are heads x head_dim: its place says so, and groups of four run along head_dim."""
    params, tokens = attention_params(rng), inputs(rng)
    new, by_path = jprune.prune(params, gathered(tokens, SquaredNorm), Wanda(), pattern)
    words = {"nm": (2, 4)} if isinstance(pattern, NM) else {"sparsity": 0.5, "per": "output"}
    for path, x in tokens.items():
        old = trees.flatten(params)[path]
        expected = numpy_scores.select(numpy_scores.wanda(matrix(old), x), **words)
        np.testing.assert_array_equal(matrix(by_path[path]), expected)
        assert by_path[path].shape == old.shape
        np.testing.assert_array_equal(matrix(trees.flatten(new)[path]), np.where(expected, matrix(old), 0))


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_sparsegpt(rng, pattern):
    params, tokens = attention_params(rng), inputs(rng)
    statistics = gathered(tokens, Gram)
    new, by_path = jprune.prune(params, statistics, SparseGPT(damping=0.05, block_size=8), pattern)
    words = {"nm": (2, 4)} if isinstance(pattern, NM) else {"sparsity": 0.5}
    for path in tokens:
        expected = numpy_sparsegpt.sparsegpt(
            matrix(trees.flatten(params)[path]), statistics[path].total, **words, damping=0.05, block_size=8
        )
        np.testing.assert_array_equal(matrix(by_path[path]), expected.mask)
        np.testing.assert_allclose(matrix(trees.flatten(new)[path]), expected.kernel, atol=1e-4)


def test_everything_else_is_untouched(rng):
    params = attention_params(rng)
    new, _ = jprune.prune(params, None, Magnitude(), Unstructured(0.5))
    assert jax.tree.structure(new) == jax.tree.structure(params)
    for path in ("attn/q/bias", "norm/scale"):
        assert trees.flatten(new)[path] is trees.flatten(params)[path]
    assert jprune.sparsity(params).zeros == 0, "the parameters given are not written to"
    assert jprune.sparsity(new).achieved == 0.5


class Network(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.DenseGeneral((HEADS, HEAD_DIM), name="q")(x)
        x = linen.DenseGeneral(D, axis=(-2, -1), name="o")(x)
        return linen.Dense(FF, name="up")(x)


class NNXNetwork(nnx.Module):
    def __init__(self, rngs):
        self.q = nnx.LinearGeneral(D, (HEADS, HEAD_DIM), rngs=rngs)
        self.o = nnx.LinearGeneral((HEADS, HEAD_DIM), D, axis=(-2, -1), rngs=rngs)
        self.up = nnx.Linear(D, FF, rngs=rngs)

    def __call__(self, x):
        return self.up(self.o(self.q(x)))


def test_linen(rng, getkey):
    """Parameters as `init` makes them, statistics as `observe` gathers them; no layout is told to anyone."""
    x = jnp.asarray(rng.normal(size=(50, D)), jnp.float32)
    network = Network()
    params = network.init(getkey(), x)
    _, statistics = jprune.observe(network.apply, Wanda.statistic)(params, x)
    new, by_path = jprune.prune(params, statistics, Wanda(), NM(2, 4))
    assert sorted(by_path) == ["params/o/kernel", "params/q/kernel", "params/up/kernel"]
    scores = numpy_scores.wanda(matrix(params["params"]["q"]["kernel"]), x)
    np.testing.assert_array_equal(matrix(by_path["params/q/kernel"]), numpy_scores.select(scores, nm=(2, 4)))
    assert jprune.sparsity(new).achieved == 0.5
    assert network.apply(new, x).shape == (50, FF)


def test_nnx(rng):
    x = jnp.asarray(rng.normal(size=(50, D)), jnp.float32)
    network = NNXNetwork(nnx.Rngs(0))
    graph, state = nnx.split(network)
    _, statistics = jprune.observe(lambda state, x: nnx.merge(graph, state)(x), Gram)(state, x)
    new, by_path = jprune.prune(state, statistics, SparseGPT(), Unstructured(0.5))
    assert isinstance(new, nnx.State)
    assert sorted(by_path) == ["o/kernel", "q/kernel", "up/kernel"]
    expected = numpy_sparsegpt.sparsegpt(matrix(network.q.kernel[...]), numpy_scores.gram(x), sparsity=0.5)
    nnx.update(network, new)
    np.testing.assert_allclose(matrix(network.q.kernel[...]), expected.kernel, atol=1e-4)
    assert network(x).shape == (50, FF)


def test_masks_of_a_result_can_be_applied(rng):
    """What `prune` returns is what `apply_masks` takes."""
    params = attention_params(rng)
    new, by_path = jprune.prune(params, None, Magnitude(), Unstructured(0.5))
    again = jprune.apply_masks(params, by_path)
    jax.tree.map(np.testing.assert_array_equal, again, new)


def test_filters(rng):
    params = attention_params(rng)
    _, by_path = jprune.prune(params, None, Magnitude(), Unstructured(0.5), where="attn/./kernel", skip="/o/")
    assert list(by_path) == ["attn/q/kernel"]
    _, by_path = jprune.prune(params, None, Magnitude(), Unstructured(0.5), where=["/o/", "up/kernel"])
    assert sorted(by_path) == ["attn/o/kernel", "mlp/up/kernel"]
    with pytest.raises(JpruneError, match=r"'attn/v/kernel' matches none.*near misses: attn/[qo]/kernel"):
        jprune.prune(params, None, Magnitude(), Unstructured(0.5), where="attn/v/kernel")
    with pytest.raises(JpruneError, match=r"norm/scale: a kernel has at least .* shape is \(24,\)"):
        jprune.prune(params, None, Magnitude(), Unstructured(0.5), where="scale")


def test_statistics_that_are_missing_or_wrong(rng):
    params, tokens = attention_params(rng), inputs(rng)
    with pytest.raises(JpruneError, match=r"attn/o/kernel: Wanda needs a SquaredNorm .* got NoneType; .*observe"):
        jprune.prune(params, None, Wanda(), Unstructured(0.5))
    statistics = dict(gathered(tokens, SquaredNorm))
    with pytest.raises(JpruneError, match="SparseGPT needs a Gram of its inputs, got SquaredNorm"):
        jprune.prune(params, statistics, SparseGPT(), Unstructured(0.5))
    del statistics["mlp/up/kernel"]
    with pytest.raises(JpruneError, match="mlp/up/kernel: Wanda needs"):
        jprune.prune(params, statistics, Wanda(), Unstructured(0.5), in_axes=AXES)
    statistics["mlp/up/kernel"] = SquaredNorm.zeros(20)
    with pytest.raises(JpruneError, match=r"mlp/up/kernel: no leading axes of shape \(24, 24\) make the 20 inputs"):
        jprune.prune(params, statistics, Wanda(), Unstructured(0.5), where="mlp")
    with pytest.raises(JpruneError, match="mlp/up/kernel: expected a statistic of 24 inputs, got one of 20"):
        jprune.prune(params, statistics, Wanda(), Unstructured(0.5), in_axes=AXES)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()])
def test_statistics_that_no_inputs_can_have(rng, method):
    """Not finite, negative, or of no token; what is zero for every token is dead, and no error."""
    params = {"kernel": jnp.asarray(rng.normal(size=(D, 8)), jnp.float32)}
    seen = method.statistic.zeros(D).update(jnp.asarray(rng.normal(size=(60, D)), jnp.float32))

    def prune(total, tokens=60):
        statistic = dataclasses.replace(seen, total=total, tokens=jnp.int32(tokens))
        return jprune.prune(params, {"kernel": statistic}, method, Unstructured(0.5))

    at = (5, 5) if isinstance(method, SparseGPT) else 5
    for value, words in ((np.nan, "NaN or inf in 1 of 24"), (np.inf, "NaN or inf in 1 of 24"), (-1.0, "in 1 of 24")):
        with pytest.raises(JpruneError, match=rf"^kernel: .*{words} inputs"):
            prune(seen.total.at[at].set(value))
    with pytest.raises(JpruneError, match="kernel: its statistic has seen no token"):
        prune(seen.total * 0, tokens=0)
    new, masks_by_path = prune(seen.total * 0)
    assert (np.asarray(masks_by_path["kernel"]).sum(0) == 12).all()
    assert (np.asarray(new["kernel"]) == 0).all() == isinstance(method, SparseGPT), "its dead inputs lose their weights"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Peaks:
    """A statistic of a user's own: the largest value of every input, of each sign."""

    both: Any
    seen: Any

    @classmethod
    def zeros(cls, d_in):
        return cls(jnp.zeros((d_in, 2)), jnp.int32(0))

    @property
    def d_in(self):
        return len(self.both)

    def update(self, x):
        return Peaks(jnp.stack([x.max(0), (-x).max(0)], 1), self.seen + len(x))

    def merge(self, other):
        return Peaks(jnp.maximum(self.both, other.both), self.seen + other.seen)


@pytest.mark.parametrize("kind", [SquaredNorm, Gram, Moments, Peaks])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_statistic_may_have_seen_what_is_not_finite(rng, kind, value):
    """Two of 24 inputs overflow; a method that takes whatever it gets is not asked."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Trusting(ByScore):
        statistic = kind

        def score(self, kernel, statistic):
            return jnp.abs(kernel)

    params, x = {"kernel": jnp.ones((D, 8))}, rng.normal(size=(60, D)).astype(np.float32)
    jprune.prune(params, {"kernel": kind.zeros(D).update(jnp.asarray(x))}, Trusting(), Unstructured(0.5))
    x[7, [3, 20]] = value
    with pytest.raises(JpruneError, match=r"kernel: .*NaN or inf in 2 of 24 inputs; .*wider dtype"):
        jprune.prune(params, {"kernel": kind.zeros(D).update(jnp.asarray(x))}, Trusting(), Unstructured(0.5))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, bool])
def test_weights_that_are_no_floats(rng, dtype):
    params = {"kernel": jnp.asarray(rng.integers(0, 2, size=(24, 8)), dtype)}
    gram = Gram.zeros(24).update(jnp.asarray(rng.normal(size=(60, 24)), jnp.float32))
    norm = SquaredNorm(jnp.diagonal(gram.total), gram.tokens)
    for method, statistic in ((Magnitude(), None), (Wanda(), norm), (SparseGPT(), gram)):
        with pytest.raises(JpruneError, match=r"kernel: expected weights in floating point, got (int|bool)"):
            jprune.prune(params, {"kernel": statistic} if statistic else None, method, Unstructured(0.5))
        with pytest.raises(JpruneError, match="expected weights in floating point"):
            method(params["kernel"], statistic, Unstructured(0.5))
    with pytest.raises(JpruneError, match="expected weights in floating point"):
        jprune.solvers.sparsegpt(params["kernel"], gram.total, NM(2, 4))
    with pytest.raises(JpruneError, match="expected weights in floating point"):
        jprune.gradual(jprune.schedules.constant(0.5)).init(params)


def test_errors_name_the_kernel(rng):
    params, tokens = attention_params(rng), inputs(rng)
    with pytest.raises(JpruneError, match=r"(attn|mlp)/.*/kernel: 5:16 needs"):
        jprune.prune(params, gathered(tokens, SquaredNorm), Wanda(), NM(5, 16))
    tokens["mlp/up/kernel"][3, 5] = np.nan
    with pytest.raises(JpruneError, match=r"mlp/up/kernel: .*NaN or inf"):
        jprune.prune(params, gathered(tokens, Gram), SparseGPT(), Unstructured(0.5))


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()])
def test_pruning_further(rng, method):
    """50 %, then 75 %: what the first masks pruned stays pruned, in kernels with head axes too."""
    params, tokens = attention_params(rng), inputs(rng)
    statistics = gathered(tokens, method.statistic) if method.statistic else None
    pattern = [Unstructured(s, "kernel" if isinstance(method, Magnitude) else None) for s in (0.5, 0.75)]
    half, first = jprune.prune(params, statistics, method, pattern[0])
    quarter, second = jprune.prune(half, statistics, method, pattern[1], keep=first)
    assert jprune.sparsity(quarter).achieved == 0.75
    for path, mask in second.items():
        assert not (np.asarray(mask) & ~np.asarray(first[path])).any()


def test_methods_are_configs():
    named = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT, "admm": Admm, "alps": Alps}
    assert named == dict(ONE_SHOT)
    assert [m.statistic for m in ONE_SHOT.values()] == [None, SquaredNorm, Gram, Gram, Gram]
    assert SparseGPT() == SparseGPT(damping=0.01, block_size=128)
    for method in ONE_SHOT.values():
        assert dataclasses.is_dataclass(method)
        hash(method())
    with pytest.raises(JpruneError, match="damping must be positive, got 0"):
        SparseGPT(damping=0.0)
    with pytest.raises(JpruneError, match="block_size must be at least 1, got 0"):
        SparseGPT(block_size=0)
    with pytest.raises(TypeError):
        SparseGPT(0.01)


def test_kernels_of_one_input_together(rng):
    """The shared factorisation and sweep of SparseGPT, and the default of all others: as one by one."""
    x = jnp.asarray(rng.normal(size=(60, D)), jnp.float32)
    kernels = {name: jnp.asarray(rng.normal(size=(D, n)), jnp.float32) for name, n in (("q", 24), ("k", 24), ("v", 24))}
    patterns = {"q": Unstructured(0.5), "k": Unstructured(0.25), "v": NM(2, 4)}
    keeps = {"k": jnp.asarray(rng.random((D, 24)) < 0.9)}
    for method in (Magnitude(), Wanda(), SparseGPT()):
        statistic = method.statistic.zeros(D).update(x) if method.statistic else None
        together = method.together(kernels, statistic, patterns, keeps)
        assert list(together) == list(kernels)
        for name, kernel in kernels.items():
            alone = method(kernel, statistic, patterns[name], keeps.get(name))
            np.testing.assert_array_equal(together[name].mask, alone.mask)
            np.testing.assert_allclose(together[name].kernel, alone.kernel, rtol=1e-4, atol=1e-5)
            assert (together[name].loss is None) == (not isinstance(method, SparseGPT))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationOnly(Method):
    """The example of jprune/methods.py."""

    statistic = SquaredNorm

    def __call__(self, kernel, statistic, pattern, keep=None):
        scores = jnp.broadcast_to(statistic.total[:, None], kernel.shape)
        return masked(kernel, masks.select(scores, pattern, keep=keep))


def test_a_method_of_ones_own(rng):
    params, tokens = attention_params(rng), inputs(rng)
    new, by_path = jprune.prune(params, gathered(tokens, SquaredNorm), ActivationOnly(), Unstructured(0.5))
    assert jprune.sparsity(new).achieved == 0.5
    norms = np.square(tokens["attn/o/kernel"].astype(np.float64)).sum(0)
    expected = np.broadcast_to((np.argsort(np.argsort(norms)) >= 12)[:, None], (24, 24))
    np.testing.assert_array_equal(matrix(by_path["attn/o/kernel"]), expected)
    with pytest.raises(JpruneError, match="ActivationOnly needs a SquaredNorm"):
        jprune.prune(params, None, ActivationOnly(), Unstructured(0.5))


def test_half_precision(rng):
    """Parameters keep their dtype; scores are compared in float32."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), attention_params(rng))
    tokens = inputs(rng)
    for method in (Magnitude(), Wanda(), SparseGPT()):
        statistics = gathered(tokens, method.statistic) if method.statistic else None
        new, _ = jprune.prune(params, statistics, method, Unstructured(0.5))
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(new))
        assert jprune.sparsity(new).achieved == 0.5


def test_docstring_example_is_the_one_tested_here():
    import inspect

    import jprune.methods

    body = inspect.getsource(ActivationOnly.__call__)
    assert body.replace(" ", "") in jprune.methods.__doc__.replace(" ", "")

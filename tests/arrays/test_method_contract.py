"""What every one-shot method keeps to. A line in the registry is all that a new one needs to be tested here."""

import importlib
import inspect

import jax.numpy as jnp
import numpy as np
import numpy_scores
import pytest

from jprune.errors import JpruneError
from jprune.patterns import NM, Unstructured
from jprune.pipeline import registry

D_IN, D_OUT = 24, 12
PATTERNS = [Unstructured(0.5), Unstructured(0.3, "output"), Unstructured(0.3, "kernel"), NM(2, 4)]
PER_OUTPUT = [Unstructured(0.5, "output"), NM(2, 4)]


@pytest.fixture(params=list(registry.ONE_SHOT))
def method(request):
    return registry.ONE_SHOT[request.param]()


@pytest.fixture
def problem(rng):
    """A kernel, and the inputs that it sees."""
    x = rng.normal(size=(90, D_IN)) @ rng.normal(size=(D_IN, D_IN))
    return jnp.asarray(rng.normal(size=(D_IN, D_OUT)), jnp.float32), jnp.asarray(x, jnp.float32)


def known(method, x):
    return method.statistic.zeros(x.shape[1]).update(x) if method.statistic else None


def words(method, pattern):
    """A pattern as the references take it, with the scope that the method's authors took where it is left open."""
    if isinstance(pattern, NM):
        return {"nm": (pattern.n, pattern.m)}
    per = pattern.per or {"wanda": "output", "sparsegpt": "block"}.get(registry.name_of(method), "kernel")
    return {"sparsity": pattern.sparsity, "per": per}


def expected_mask(method, kernel, x, pattern, mask):
    """The mask of the slow and obvious reference, which is found by the method's name."""
    name = registry.name_of(method)
    if score := getattr(numpy_scores, name, None):
        arguments = (kernel, x)[: len(inspect.signature(score).parameters)]
        return numpy_scores.select(score(*arguments), **words(method, pattern))
    reference = getattr(importlib.import_module(f"numpy_{name}"), name)
    found = reference(kernel, numpy_scores.gram(x), **words(method, pattern), follow=mask)
    assert found.inversion < 1 + 1e-3, "what it settles differently is equal up to rounding"
    return found.mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_is_the_reference_with_exact_counts(method, problem, pattern):
    kernel, x = problem
    result = method(kernel, known(method, x), pattern)
    mask = np.asarray(result.mask)
    scoped = pattern.among(words(method, pattern).get("per", "output"))
    assert (~mask).sum() == scoped.zeros(D_IN, D_OUT)
    assert not np.asarray(result.kernel)[~mask].any()
    np.testing.assert_array_equal(mask, expected_mask(method, np.asarray(kernel), np.asarray(x), pattern, mask))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_was_pruned_stays_pruned_and_counts(method, problem, pattern):
    kernel, x = problem
    statistic = known(method, x)
    first = method(kernel, statistic, pattern)
    again = method(first.kernel, statistic, pattern, first.mask)
    np.testing.assert_array_equal(again.mask, first.mask)
    np.testing.assert_allclose(again.kernel, first.kernel, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", PER_OUTPUT, ids=str)
def test_of_equal_ones_the_first_go(method, pattern):
    kernel, x = jnp.ones((D_IN, D_OUT)), jnp.eye(D_IN)
    mask = np.asarray(method(kernel, known(method, x), pattern).mask)
    m = getattr(pattern, "m", D_IN)
    assert (mask.reshape(-1, m, D_OUT) == (np.arange(m) >= m // 2)[:, None]).all()


@pytest.mark.parametrize("pattern", PER_OUTPUT, ids=str)
def test_outputs_are_independent(method, problem, pattern, rng):
    kernel, x = problem
    order = rng.permutation(D_OUT)
    statistic = known(method, x)
    one, other = method(kernel, statistic, pattern), method(kernel[:, order], statistic, pattern)
    np.testing.assert_array_equal(other.mask, np.asarray(one.mask)[:, order])
    np.testing.assert_allclose(other.kernel, np.asarray(one.kernel)[:, order], rtol=1e-4, atol=1e-5)


def test_half_precision_stays(method, problem):
    kernel, x = problem
    result = method(kernel.astype(jnp.bfloat16), known(method, x), NM(2, 4))
    assert result.kernel.dtype == jnp.bfloat16
    assert (~np.asarray(result.mask)).sum() == D_IN * D_OUT // 2


def test_side_by_side_is_one_by_one(method, problem):
    kernel, x = problem
    statistic = known(method, x)
    kernels = {"a": kernel, "b": kernel[:, ::-1] * 2, "c": kernel + 1}
    patterns = {"a": Unstructured(0.5), "b": NM(2, 4), "c": Unstructured(0.25, "output")}
    for name, result in method.together(kernels, statistic, patterns, {}).items():
        alone = method(kernels[name], statistic, patterns[name])
        np.testing.assert_array_equal(result.mask, alone.mask)
        np.testing.assert_allclose(result.kernel, alone.kernel, rtol=1e-4, atol=1e-5)


def test_costs_grow_with_the_kernel(method):
    for cost in (method.flops, method.nbytes):
        assert 0 < cost(64, 64) < cost(64, 128) < cost(128, 128)
    apart, shared = 2 * method.flops(64, 64), method.flops(64, 128)
    assert shared <= apart


@pytest.mark.parametrize("wrong", [0.5, "2:4", None, object()], ids=["number", "text", "none", "object"])
def test_what_is_no_pattern_is_said_so(method, problem, wrong):
    kernel, x = problem
    with pytest.raises(JpruneError, match=r"a pattern is Unstructured\(0\.5\)"):
        method(kernel, known(method, x), wrong)

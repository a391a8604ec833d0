"""The flat view: calls are gone, equal values are computed once, dead ones not at all, and it still is the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.errors import JpruneError
from jprune.trace.jaxpr import trace, where_written


def names(flat):
    return [e.primitive.name for e in flat.equations]


def evaluate(flat, params, *args):
    run = flat.runner("all", flat.equations, flat.args, flat.outputs)
    return jax.tree.unflatten(flat.output_tree, run(jax.tree.leaves(params), jax.tree.leaves(args)))


def test_calls_are_replaced_by_their_bodies_each_with_its_own_variables():
    @jax.jit
    def twice(x):
        return jax.remat(jnp.sin)(x) + 1

    flat = trace(lambda p, x: twice(twice(x)) * p, 2.0, jnp.ones(3))
    assert names(flat) == ["sin", "add", "sin", "add", "convert_element_type", "mul"]
    results = [x for e in flat.equations for x in e.outvars]
    assert len(set(results)) == len(results)
    np.testing.assert_allclose(evaluate(flat, 2.0, jnp.zeros(3)), 2 * (np.sin(1) + 1) * np.ones(3), rtol=1e-6)


def test_equal_values_are_computed_once_but_matmuls_as_written():
    def f(p, x):
        return jnp.exp(x) + jax.jit(jnp.exp)(x), x @ p, x @ p

    assert names(trace(f, jnp.ones((2, 2)), jnp.ones((2, 2)))) == ["exp", "add", "dot_general", "dot_general"]


def test_zeros_of_either_sign_differ():
    flat = trace(lambda p, x: (jax.lax.max(x, 0.0), jax.lax.max(x, -0.0)), {}, 1.0)
    assert names(flat).count("max") == 2


def test_constants_and_what_is_unused():
    table = np.arange(3, dtype=np.float32)

    def f(p, x):
        jnp.tan(x)
        return x * jnp.asarray(table), 7, p["a"]["b"]

    flat = trace(f, {"a": {"b": 1.0}}, jnp.ones(3))
    assert names(flat) == ["mul"]
    assert list(flat.params) == ["a/b"]
    assert [len(v) for v in flat.constants.values()] == [3]
    y, seven, b = evaluate(flat, {"a": {"b": 1.0}}, jnp.full(3, 2.0))
    np.testing.assert_array_equal(y, [0, 2, 4])
    assert (seven, b) == (7, 1)


def test_source_of_an_equation():
    (equation,) = trace(lambda p, x: jnp.sin(x), {}, 1.0).equations
    assert "test_jaxpr.py" in where_written(equation)


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(JpruneError, match="two leaves at a/b"):
        trace(lambda p, x: x, {"a": {"b": 1.0}, "a/b": 2.0}, 1.0)

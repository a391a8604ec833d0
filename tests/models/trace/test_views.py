"""Digits of an index: checked against arrays that hold their own index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune.trace import views
from jprune.trace.jaxpr import trace


def flat_index(axes, shape):
    """For each element of a view with these axes, its index in the flattened root."""
    strides = np.array([int(np.prod(shape[i + 1 :])) for i in range(len(shape))], int)
    index = np.zeros((), int)
    for digits in axes:
        here = np.zeros((), int)
        for d in digits:
            here = (here[..., None] + np.arange(d.size) * d.stride * strides[d.axis]).reshape(-1)
        index = index[..., None] + here.reshape(-1)
    return index


def factorisations(n):
    return [(n,), *((k, *rest) for k in range(2, n) if n % k == 0 for rest in factorisations(n // k))]


@st.composite
def chains(draw):
    """A shape, and a chain of transposes, reshapes and axes of size one."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    steps, now = [], shape
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            order = tuple(draw(st.permutations(range(len(now)))))
            steps.append(("transpose", order))
            now = tuple(now[i] for i in order)
        else:
            size = int(np.prod(now))
            now = draw(st.sampled_from(factorisations(size))) if size > 1 else (1,)
            if draw(st.booleans()):
                now = (1, *now)
            steps.append(("reshape", now))
    return shape, steps


def apply(x, steps):
    for name, argument in steps:
        x = x.transpose(argument) if name == "transpose" else x.reshape(argument)
    return x


def axes_of(shape, steps):
    """The axes of the view, or None where it has no such form."""
    flat = trace(lambda p, x: apply(x, steps), {}, jax.ShapeDtypeStruct(shape, jnp.int32))
    axes = views.whole(shape)
    for equation in flat.equations:
        axes = None if axes is None else views.follow(equation, axes)
    return axes


@settings(deadline=None, max_examples=200)
@given(chains())
def test_a_view_is_made_of_the_digits_that_it_is_said_to_be_made_of(chain):
    shape, steps = chain
    axes = axes_of(shape, steps)
    if axes is not None:
        view = apply(np.arange(int(np.prod(shape))).reshape(shape), steps)
        assert tuple(int(np.prod([d.size for d in digits])) for digits in axes) == view.shape
        np.testing.assert_array_equal(flat_index(axes, shape), view)


@settings(deadline=None, max_examples=200)
@given(chains(), st.data())
def test_matrix_has_the_columns_asked_for(chain, data):
    shape, steps = chain
    axes = axes_of(shape, steps)
    if axes is not None:
        chosen = data.draw(st.permutations(range(len(axes)))) if axes else []
        chosen = chosen[: data.draw(st.integers(0, len(chosen)))]
        columns = views.join(d for i in chosen for d in axes[i])
        root = np.arange(int(np.prod(shape))).reshape(shape)
        rest = [i for i in range(len(axes)) if i not in chosen]
        d_in = int(np.prod([apply(root, steps).shape[i] for i in chosen]))
        expected = apply(root, steps).transpose(*rest, *chosen).reshape(-1, d_in)
        got = views.matrix(root, columns)
        assert sorted(map(tuple, got)) == sorted(map(tuple, expected))  # in any order of the rows


def test_known_forms():
    D = views.Digit
    assert axes_of((6, 4), [("reshape", (2, 3, 4))]) == ((D(0, 2, 3),), (D(0, 3, 1),), (D(1, 4, 1),))
    assert axes_of((2, 3, 4), [("reshape", (6, 4))]) == ((D(0, 2, 1), D(1, 3, 1)), (D(2, 4, 1),))
    assert axes_of((4, 6), [("reshape", (8, 3))]) == ((D(0, 4, 1), D(1, 2, 3)), (D(1, 3, 1),))


@pytest.mark.parametrize(("shape", "to"), [((4, 6), (3, 8)), ((2, 3), (3, 2))])
def test_a_reshape_across_axes_has_no_digits(shape, to):
    assert axes_of(shape, [("reshape", to)]) is None


def test_repeating_is_no_view():
    flat = trace(lambda p, x: jnp.broadcast_to(x, (5, 3)), {}, jnp.zeros((1, 3)))
    assert views.follow(flat.equations[-1], views.whole((1, 3))) is None

"""The weights of domains, by hand and by the paper's properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune.errors import JpruneError
from jprune.train.shearing.dynamic_loading import Reweighing, reweigh

LN2 = math.log(2)


def reweighed(weights, losses, references, **options):
    return reweigh(*(np.array(x, np.float64) for x in (weights, losses, references)), **options)


def test_by_hand():
    """exp(ln 2) = 2: a = (0.5 * 2, 0.25, 0.25 / 2) / (1 + 0.25 + 0.125) = (8, 2, 1) / 11."""
    got = reweighed([0.5, 0.25, 0.25], [1 + LN2, 2.0, 3 - LN2], [1.0, 2.0, 3.0], smoothing=0.0)
    np.testing.assert_allclose(got, np.array([8, 2, 1]) / 11, rtol=1e-15)
    # Clipped, the last counts as equal to its reference: (0.5 * 2, 0.25, 0.25) / 1.5.
    got = reweighed([0.5, 0.25, 0.25], [1 + LN2, 2.0, 3 - LN2], [1.0, 2.0, 3.0], smoothing=0.0, clip=True)
    np.testing.assert_allclose(got, np.array([4, 1, 1]) / 6, rtol=1e-15)
    # A step of 2: (0.5 * 4, 0.25, 0.25 / 4); a tenth dealt out equally among three.
    got = reweighed([0.5, 0.25, 0.25], [1 + LN2, 2.0, 3 - LN2], [1.0, 2.0, 3.0], step_size=2.0, smoothing=0.1)
    np.testing.assert_allclose(got, 0.9 * np.array([32, 4, 1]) / 37 + 0.1 / 3, rtol=1e-15)


@pytest.mark.parametrize("clip", [False, True])
def test_losses_equal_to_the_references_change_nothing_but_by_the_smoothing(clip):
    weights = np.array([0.67, 0.18, 0.15])
    losses = np.array([1.9643, 0.7459, 2.1393])
    np.testing.assert_allclose(reweigh(weights, losses, losses, smoothing=0.0, clip=clip), weights, rtol=1e-14)
    want = (1 - 1e-4) * weights + 1e-4 / 3
    np.testing.assert_allclose(reweigh(weights, losses, losses, clip=clip), want, rtol=1e-14)


def test_clipping_protects_what_is_better_than_its_reference():
    weights, references = [0.5, 0.5], [1.0, 1.0]
    np.testing.assert_allclose(reweighed(weights, [0.2, 1.0], references, clip=True), weights)
    assert reweighed(weights, [0.2, 1.0], references)[0] < 0.4


numbers = st.floats(0, 800)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(0, 1), numbers, numbers), min_size=1, max_size=6).filter(
        lambda rows: sum(r[0] for r in rows) > 1e-3
    ),
    smoothing=st.floats(0, 1),
    clip=st.booleans(),
)
def test_weights_are_weights(rows, smoothing, clip):
    weights, losses, references = np.array(rows, np.float64).T
    got = reweigh(weights, losses, references, smoothing=smoothing, clip=clip)
    assert abs(got.sum() - 1) < 1e-12
    assert (got >= smoothing / len(rows) * (1 - 1e-9)).all()


def test_by_name():
    new = Reweighing(smoothing=0.0)({"a": 0.5, "b": 0.5}, {"b": 1.0, "a": 1.0 + LN2}, {"b": 1.0, "a": 1.0})
    assert list(new) == ["a", "b"]
    np.testing.assert_allclose(list(new.values()), [2 / 3, 1 / 3])
    with pytest.raises(JpruneError, match="held-out loss of domain 'a' is nan"):
        Reweighing()({"a": 1.0}, {"a": math.nan}, {"a": 1.0})
    with pytest.raises(JpruneError, match="step size of dynamic loading must not be negative"):
        Reweighing(step_size=-1.0)
    with pytest.raises(JpruneError, match=r"smoothing of dynamic loading must be in \[0, 1\]"):
        Reweighing(smoothing=2.0)

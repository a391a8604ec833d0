"""Fits of laws that are known."""

import itertools
import math

import numpy as np
import pytest

from jprune.errors import JpruneError
from jprune.train.shearing.scaling_law import ScalingLaw, fit

# Hoffmann et al., equation 10.
CHINCHILLA = {"e": 1.69, "a": 406.4, "alpha": 0.34, "b": 410.7, "beta": 0.28}


def loss(n, d, e, a, alpha, b, beta):
    return e + a / n**alpha + b / d**beta


POINTS = list(itertools.product([7e7, 4e8, 1.4e9, 7e9, 7e10], [2e9, 2e10, 3e11, 1.4e12]))


def test_recovers_what_made_the_points():
    n, d = map(list, zip(*POINTS))
    law = fit(n, [loss(*point, **CHINCHILLA) for point in POINTS], d)
    for name, value in CHINCHILLA.items():
        assert math.isclose(getattr(law, name), value, rel_tol=1e-3), name
    assert math.isclose(law.predict(2.7e9, 5e10), loss(2.7e9, 5e10, **CHINCHILLA), rel_tol=1e-6)


def test_an_outlier_counts_little():
    """Of twenty losses one is a tenth too high; the others decide."""
    n, d = map(list, zip(*POINTS))
    losses = [loss(*point, **CHINCHILLA) for point in POINTS]
    losses[9] *= 1.1
    law = fit(n, losses, d)
    assert math.isclose(law.predict(2.7e9, 5e10), loss(2.7e9, 5e10, **CHINCHILLA), rel_tol=2e-3)


def test_three_sizes_determine_three_constants():
    """As LLM-Shearing fits them; for alpha = 1/2 they follow by hand from the losses at 1, 4 and 16 billion."""
    law = fit([1e9, 4e9, 16e9], [3.0, 2.5, 2.25])  # 2 + 1 / sqrt(N / 1e9)
    assert math.isclose(law.alpha, 0.5, rel_tol=1e-4)
    assert math.isclose(law.e, 2.0, rel_tol=1e-4)
    assert math.isclose(law.a, math.sqrt(1e9), rel_tol=2e-3)
    assert (law.b, law.beta) == (0.0, 0.0)
    assert math.isclose(law.predict(0.25e9), 4.0, rel_tol=1e-4)


def test_predictions_fall_with_size_and_tokens():
    law = ScalingLaw(**CHINCHILLA)
    losses = [law.predict(n, d) for n, d in [(1e8, 1e9), (1e9, 1e9), (1e9, 1e10), (1e30, 1e30)]]
    assert losses == sorted(losses, reverse=True)
    assert np.isclose(losses[-1], 1.69)


def test_bad_input():
    def refused(match, *columns):
        with pytest.raises(JpruneError, match=match):
            fit(*columns)

    refused("at least 3 models, of at least 3 sizes; there are 2 of 2 sizes", [1e9, 2e9], [3.0, 2.0])
    refused("there are 3 of 2 sizes", [1e9, 2e9, 2e9], [3.0, 2.0, 2.0])
    refused("at least 5 models", [1e9, 2e9, 3e9], [3.0, 2.0, 1.9], [1e9, 2e9, 3e9])
    refused("as many parameters as losses; there are 2 and 3", [1e9, 2e9], [3.0, 2.0, 1.9])
    refused("needs losses above 0", [1e9, 2e9, 3e9], [3.0, 0.0, 1.9])
    refused("equally many tokens", [1e9, 2e9, 3e9, 4e9, 5e9], [3.0, 2.0, 1.9, 1.8, 1.7], [1e9] * 5)
    with pytest.raises(JpruneError, match="depends on the number of tokens"):
        ScalingLaw(**CHINCHILLA).predict(1e9)

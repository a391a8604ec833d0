"""Scores of experts and which of them stay, against loops over tokens and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jprune.errors import JpruneError
from jprune.structured.experts import RemoveExperts, Use, keep_best, score, use


def test_scores_are_means_over_an_experts_own_tokens(rng):
    """Against a loop over tokens, for all scores and an expert that no token is sent to; two texts are one."""
    count, tokens, k = 5, 40, 2
    experts = np.stack([rng.permutation(count - 1)[:k] for _ in range(tokens)])  # the last gets none
    gates, norms = rng.uniform(0, 1, (2, tokens, k))
    mine = {name: [[] for _ in range(count)] for name in ("reap", "ean")}
    for t in range(tokens):
        for e, gate, norm in zip(experts[t], gates[t], norms[t]):
            mine["reap"][e].append(gate * norm)
            mine["ean"][e].append(norm)
    given = [jnp.asarray(x, jnp.float32) for x in (gates, norms)]
    halves = [
        use(jnp.asarray(experts[part]), *(x[part] for x in given), count) for part in (slice(25), slice(25, None))
    ]
    seen = halves[0].merge(halves[1])
    for by, lists in mine.items():
        np.testing.assert_allclose(score(seen, by), [np.mean(own) if own else 0 for own in lists], rtol=1e-5)
    np.testing.assert_array_equal(score(seen, "frequency"), [len(own) for own in mine["ean"]])
    assert not np.array_equal(score(seen, "random", seed=1), score(seen, "random", seed=2))


def test_the_best_of_every_group_stay():
    scores = np.array([5.0, 1, 1, 4, 9, 8, 7, 6])
    np.testing.assert_array_equal(keep_best(scores, 4), [4, 5, 6, 7])
    np.testing.assert_array_equal(keep_best(scores, 4, groups=2), [0, 3, 4, 5])
    np.testing.assert_array_equal(keep_best(scores, 7), [0, 2, 3, 4, 5, 6, 7])  # of equal ones the first goes
    with pytest.raises(JpruneError, match="5 cannot be equally many of each"):
        keep_best(scores, 5, groups=2)
    with pytest.raises(JpruneError, match="finite"):
        keep_best(np.array([1, np.nan]), 1)


def seen(*scores):
    """Uses that give these scores."""
    ones = [np.ones(len(own)) for own in scores]
    return {i: Use(one, np.asarray(own), np.asarray(own)) for i, (one, own) in enumerate(zip(ones, scores))}


def test_ranked_together_layers_share_out_what_goes():
    """By shares of the layer's mean: the second layer's outputs are all larger, and yet it loses more."""
    method = RemoveExperts(remove=2, globally=True)
    uses = seen([4.0, 4, 5, 3], [10.0, 10, 10, 90])
    left = method.experts_left({0: 4, 1: 4}, 1, 1, uses)
    assert {i: kept.tolist() for i, kept in left.items()} == {0: [0, 1, 2], 1: [3]}
    assert [len(kept) for kept in method.experts_left({0: 4, 1: 4}, 2, 1, uses).values()] == [2, 2]
    groups = method.experts_left({0: 4, 1: 4}, 2, 2, uses)
    assert [sorted(e // 2 for e in kept) for kept in groups.values()] == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("options", "counts", "message"),
    [
        ({}, {0: 4}, "`remove`"),
        ({"remove": 1, "keep": 1}, {0: 4}, "`remove`"),
        ({"remove": 0}, {0: 4}, "remove must be at least 1"),
        ({"remove": 3}, {0: 4}, r"1 of 4 experts would stay, but the router needs 2 .* remove 2 at most"),
        ({"remove": 9}, {0: 4}, "0 of 4"),
        ({"keep": 4}, {2: 4}, "layer 2 has 4 experts, no more than the 4 to keep"),
        ({"keep": 3}, {}, "no experts"),
    ],
)
def test_what_cannot_go_is_refused(options, counts, message):
    with pytest.raises(JpruneError, match=message):
        RemoveExperts(**options).experts_left(counts, 2, 1)

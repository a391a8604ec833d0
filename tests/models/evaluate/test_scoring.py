"""Log-likelihoods of the ends of sequences of many lengths, from whole models' logits in NumPy."""

import jax
import numpy as np
import pytest
from in_memory import CONFIG, Model

from jprune.errors import JpruneError
from jprune.evaluate import scoring
from jprune.models import decoder


@pytest.fixture
def model(getkey):
    params = decoder.init_params(CONFIG, getkey())
    return Model(jax.tree.map(lambda x: x * 20 if x.ndim > 1 else x, params))


@pytest.mark.parametrize("few", [False, True])
def test_each_sequence_alone(model, rng, monkeypatch, few):
    """Filled up, side by side with others, in chunks of rows; the last token of the longest is beyond the context."""
    if few:
        monkeypatch.setattr(scoring, "LOGITS_BYTES", 4 * 37 * 7)
        scoring._jit_scores.cache_clear()
    sequences = [rng.integers(0, 37, n).tolist() for n in (2, 9, 12, 33, 34, 12, 65)]
    # In one the likeliest token follows: that is seen.
    sequences[1] = [*sequences[1], int(model.logits(np.array([[*sequences[1], 0]]))[0, -1].argmax())]
    counts = [1, 1, 5, 2, 33, 11, 4]
    sums, likeliest = scoring.scores(model, sequences, counts)
    scoring._jit_scores.cache_clear()
    for sequence, count, found, top in zip(sequences, counts, sums, likeliest, strict=True):
        logits = model.logits(np.array([[*sequence[:-1], 0]]))[0]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        last = np.arange(len(sequence) - 1)[-count:]
        targets = np.array(sequence[1:])[-count:]
        np.testing.assert_allclose(found, logs[last, targets].sum(), rtol=1e-5)
        assert top == (logs[last].argmax(-1) == targets).all()
    assert likeliest[1]


def test_nothing_is_asked(model):
    assert [len(x) for x in scoring.scores(model, [], [])] == [0, 0]


@pytest.mark.parametrize(("sequence", "count"), [([1], 1), ([1, 2], 0), ([1, 2], 2), ([1] * 66, 1)])
def test_what_has_no_likelihood(model, sequence, count):
    with pytest.raises(JpruneError, match="expected sequences of 2 to 65 tokens of which some are predicted"):
        scoring.scores(model, [sequence], [count])


def test_ids_outside_the_vocabulary(model):
    with pytest.raises(JpruneError, match=r"Token ids lie in \[3, 37\], outside the model's \[0, 37\)"):
        scoring.scores(model, [[3, 37]], [1])

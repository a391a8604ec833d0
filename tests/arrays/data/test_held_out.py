import numpy as np
import pytest

from jprune import data
from jprune.data import held_out

RUN = held_out.RUN


def batches(tokens):
    return data.token_batches(np.array(tokens), None, batch_size=1, epochs=1)


def runs(tokens):
    """The truth: every run as a tuple."""
    return [{tuple(row[i : i + RUN]) for i in range(len(row) - RUN + 1)} for row in np.asarray(tokens).tolist()]


def test_against_sets_of_runs(rng, monkeypatch):
    monkeypatch.setattr(held_out, "WINDOWS_AT_ONCE", 3)
    training = rng.integers(0, 4, (8, 80))
    evaluation = rng.integers(0, 4, (10, 64))
    evaluation[2, 5 : 5 + RUN] = training[7, 40 : 40 + RUN]
    evaluation[6, : RUN - 1] = training[0, : RUN - 1]  # one token too few
    evaluation[6, RUN - 1] = training[0, RUN - 1] + 1
    seen = set().union(*runs(training))
    expected = np.mean([bool(r & seen) for r in runs(evaluation)])
    assert expected == 0.1
    assert data.overlap(batches(training), evaluation) == pytest.approx(expected)
    assert data.overlap(batches(training), batches(evaluation)) == pytest.approx(expected)
    assert data.overlap(batches(training), training) == 1


def test_padding_and_short_windows_do_not_count():
    zeros = np.zeros((2, 50), np.int32)
    assert data.overlap(batches(zeros), zeros) == 0
    short = np.arange(20)[None]
    assert data.overlap(batches(short), short) == 0


def test_the_halves_of_pydoc_share_nothing(tmp_path):
    class Tokenizer:
        def encode(self, text, add_special_tokens):
            return [sum(map(ord, word)) for word in text.split()]

    training = data.token_batches("pydoc", Tokenizer(), batch_size=1, length=128)
    kept = data.evaluation("pydoc", Tokenizer(), length=128)
    assert data.overlap(training, kept.tokens) < 0.05
    assert data.overlap(training, training.examples.take(np.arange(5))["tokens"]) == 1

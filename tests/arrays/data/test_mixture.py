"""Batches from several domains: what is drawn, in which order, and that nothing is lost when a run stops."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune import data
from jprune.data.mixture import Mixture, hold_out
from jprune.errors import JpruneError


def domain(number, n, length=3):
    """Row i holds 1000 number + i everywhere."""
    rows = 1000 * number + np.arange(n)[:, None] + np.zeros((1, length), int)
    return data.token_batches(rows, None, batch_size=1)


def mixture(*sizes, **options):
    return Mixture(domains={"abcd"[i]: domain(i, n) for i, n in enumerate(sizes)}, **{"batch_size": 8} | options)


def taken(stream, batches):
    """(number of the domain, number of the window) of every row."""
    rows = np.concatenate([next(stream)["tokens"][:, 0] for _ in range(batches)])
    return np.stack([rows // 1000, rows % 1000], axis=1)


def test_a_batch():
    mix = mixture(5, 3, proportions={"a": 1, "b": 3})
    batch = next(iter(mix))
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "tokens": ((8, 3), np.int32), "weights": ((8, 3), np.float32),
    }  # fmt: skip
    np.testing.assert_array_equal(batch["weights"], [[0, 1, 1]] * 8)
    assert (mix.windows, mix.length, mix.per_epoch, mix.initial) == (8, 3, 1, {"a": 0.25, "b": 0.75})
    assert mixture(5, 3).initial == {"a": 5 / 8, "b": 3 / 8}


def test_rows_come_by_the_weights():
    """2000 draws: the counts lie within four standard deviations of what the weights promise, before and after."""
    # Of a few rows grain makes permutations slowly.
    stream = iter(mixture(700, 800, 900, proportions={"a": 0.7, "b": 0.2, "c": 0.1}, batch_size=20))
    for weights in ([0.7, 0.2, 0.1], [0.05, 0.05, 0.9], [0.0, 0.5, 0.5]):
        stream.weights = dict(zip("abc", weights))
        counts = np.bincount(taken(stream, 100)[:, 0], minlength=3)
        expected = 2000 * np.array(weights)
        assert (abs(counts - expected) <= 4 * np.sqrt(expected * (1 - np.array(weights)))).all()


@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_no_window_twice_within_an_epoch_of_its_domain(sizes, seed):
    mix = mixture(*sizes, seed=seed)
    stream = iter(mix)
    rows = taken(stream, 10)
    for number, n in enumerate(sizes):
        order = rows[rows[:, 0] == number, 1]
        for start in range(0, len(order), n):
            epoch = order[start : start + n]
            assert len(set(epoch.tolist())) == len(epoch)
        assert stream.taken["abcd"[number]] == len(order)
        assert stream.epochs["abcd"[number]] == len(order) / n


def test_epochs_are_different_permutations():
    order = taken(iter(mixture(16)), 4).reshape(2, 16, 2)[..., 1]
    assert sorted(order[0]) == sorted(order[1]) == list(range(16))
    assert (order[0] != order[1]).any()
    assert (order[0] != taken(iter(mixture(16, seed=1)), 2)[:, 1]).any()


def test_goes_on_where_it_was():
    mix = mixture(7, 20, 5)
    stream = iter(mix)
    taken(stream, 3)
    stream.weights = {"a": 1 / 3, "b": 0.6, "c": 0.1}
    state = json.loads(json.dumps(stream.get_state()))
    weights, want = stream.weights, taken(stream, 6)
    again = iter(mix)
    again.set_state(state)
    assert again.weights == weights
    np.testing.assert_array_equal(taken(again, 6), want)
    assert again.get_state() == stream.get_state()


def test_a_place_in_other_data_is_refused():
    state = iter(mixture(7, 9)).get_state()
    for other in (mixture(7, 8), mixture(7, 9, seed=1), mixture(7, 9, batch_size=4)):
        with pytest.raises(JpruneError, match="saved place in the data belongs to other data"):
            iter(other).set_state(state)


def test_processes_share_every_batch():
    whole = iter(mixture(5, 9, 4))
    parts = [iter(mixture(5, 9, 4, process_index=i, process_count=4)) for i in range(4)]
    for _ in range(5):
        want, got = next(whole), [next(part) for part in parts]
        for name, rows in want.items():
            np.testing.assert_array_equal(np.concatenate([batch[name] for batch in got]), rows)
    assert all(part.get_state() == whole.get_state() for part in parts)


def test_domains_of_instructions_and_text(tmp_path):
    """Each domain keeps the loss weights of its own kind."""

    class Letters:
        def encode(self, text, add_special_tokens):
            return [1] * add_special_tokens + [ord(c) for c in text]

    from jprune.data.batches import Batches
    from jprune.data.instructions import Conversations, Format

    record = ("record 1", {"instruction": "Q", "output": "A"})
    talk = Conversations([record], "talk", Format(tokenizer=Letters(), length=200, eos_id=2))
    text = data.token_batches(np.full((4, 200), 7), None, batch_size=1)
    mix = Mixture(domains={"talk": Batches(examples=talk, source="talk", batch_size=1), "text": text}, batch_size=16)
    batch = next(iter(mix))
    is_text = batch["tokens"][:, 1] == 7
    assert 0 < is_text.sum() < 16
    assert set(batch["weights"][is_text].sum(axis=1)) == {199}
    assert set(batch["weights"][~is_text].sum(axis=1)) == {2}  # the answer and its end


@pytest.mark.parametrize(
    ("n", "count", "held"), [(10, 3, [1, 5, 8]), (10, None, [5]), (45, None, [11, 33]), (2, 1, [1])]
)
def test_held_out(n, count, held):
    rest, evaluation = hold_out(domain(1, n), count, batch_size=2)
    rows = np.concatenate([batch["tokens"][:, 0] for batch in evaluation])
    assert [row - 1000 for row in rows if row] == held
    left = sorted(row for _, row in taken(iter(Mixture(domains={"a": rest}, batch_size=n - len(held))), 1))
    assert left == sorted(set(range(n)) - set(held))
    assert len({rest.sha256, evaluation.sha256, domain(1, n).sha256}) == 3


def test_bad_input():
    def refused(match, *sizes, **options):
        with pytest.raises(JpruneError, match=match):
            mixture(*sizes, **options)

    refused("at least one domain")
    refused("'x' is no domain of the data; there are a, b", 3, 3, proportions={"a": 1, "b": 1, "x": 1})
    refused("none is given for 'b'; every domain needs one", 3, 3, proportions={"a": 1})
    refused("proportion of domain 'b' must be a number of 0 or more; it is -1", 3, 3, proportions={"a": 1, "b": -1})
    refused("proportions of all domains are 0", 3, 3, proportions={"a": 0, "b": 0})
    refused("batch size must be at least 1", 3, batch_size=0)
    refused("cannot be shared equally by 3", 3, process_count=3)
    refused("Process 2 of 2", 3, process_count=2, process_index=2)
    refused("seed of the data must be", 3, seed=-1)
    with pytest.raises(JpruneError, match=r"have 3 \(a\), 4 \(b\) tokens; give `sequence_length`"):
        Mixture(domains={"a": domain(0, 2), "b": domain(1, 2, length=4)}, batch_size=1)
    stream = iter(mixture(3, 3))
    with pytest.raises(JpruneError, match="must be a number"):
        stream.weights = {"a": float("nan"), "b": 1.0}
    with pytest.raises(JpruneError, match="it has 2 windows, and 2 held out to evaluate on leave none"):
        hold_out(domain(0, 2), 2)
    with pytest.raises(JpruneError, match="windows held out must be at least 1"):
        hold_out(domain(0, 2), 0)


def test_never_ends():
    assert len(list(itertools.islice(mixture(1), 50))) == 50

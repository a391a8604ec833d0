import gzip
import hashlib
import json
import logging
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune import data
from jprune.data import sources, windows
from jprune.data.batches import Batches, Rows, encode_documents
from jprune.errors import JpruneError

BOS, EOS = 1, 2


class Tokenizer:
    """One token a character, after a BOS."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [BOS] * add_special_tokens + [ord(c) for c in text]


TOKENIZER = Tokenizer()


def rows(n, length=4):
    """Row i holds 100 i, 100 i + 1, ..."""
    return np.arange(n)[:, None] * 100 + np.arange(length)


def numbers(batch):
    return (batch["tokens"][:, 0] // 100).tolist()


def all_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


# --- the windows ------------------------------------------------------------------------------------------------------


def test_documents_follow_each_other_between_bos_and_eos(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("abc", "", "d", "efghij")))
    got = data.token_batches(path, TOKENIZER, batch_size=3, length=5, epochs=1, eos_id=EOS)
    [batch] = list(got)
    a, b, c, d, e, f, g, h, i, j = (ord(x) for x in "abcdefghij")
    expected = [[BOS, a, b, c, EOS], [BOS, d, EOS, BOS, e], [f, g, h, i, j]]  # the last EOS fills no window
    assert sorted(batch["tokens"].tolist()) == sorted(expected)
    assert batch["tokens"].dtype == np.int32
    np.testing.assert_array_equal(batch["weights"], np.float32([[0, 1, 1, 1, 1]] * 3))
    assert batch["weights"].dtype == np.float32
    assert (got.windows, got.length, got.per_epoch, got.source, got.notices) == (3, 5, 1, str(path), ())
    assert got.sha256 == windows.sha256(np.array(expected, np.int32))


def test_an_eos_is_not_doubled_and_may_be_unknown(tmp_path, caplog):
    class Ending(Tokenizer):
        def encode(self, text, add_special_tokens):
            return [*super().encode(text, add_special_tokens), EOS]

    assert encode_documents(["a"], Ending(), eos_id=EOS).tolist() == [BOS, 97, EOS]
    assert encode_documents([], TOKENIZER, eos_id=EOS).tolist() == []
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n')
    with caplog.at_level(logging.INFO, logger="jprune"):
        got = data.token_batches(path, TOKENIZER, batch_size=1, length=4)
    assert "no end-of-text token" in got.notices[0]
    assert got.notices[0] in caplog.text


def test_every_kind_of_source(tmp_path):
    text = "abcdefg"
    record = json.dumps({"text": text}) + "\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(record)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(record)
    names = ["a.txt", "a.jsonl", "a.jsonl.gz"]
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
    for name in [*names, "a.parquet"]:
        got = data.token_batches(tmp_path / name, TOKENIZER, batch_size=2, length=4, eos_id=EOS)
        assert got.sha256 == windows.sha256(np.array([[BOS, 97, 98, 99], [100, 101, 102, 103]], np.int32))


def test_rows_of_ids_stay_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("jprune.data.batches.ROWS_AT_ONCE", 3)
    ids = rows(7).astype(np.uint16)
    np.save(tmp_path / "a.npy", ids)
    got = data.token_batches(tmp_path / "a.npy", None, batch_size=7, epochs=1)
    assert isinstance(got.examples._rows, np.memmap)
    assert got.sha256 == windows.sha256(ids.astype(np.int32))
    assert sorted(numbers(next(iter(got)))) == list(range(7))
    shorter = data.token_batches(ids, None, batch_size=2, length=3, windows_at_most=5)
    assert (shorter.windows, shorter.length) == (5, 3)
    assert "the first 3 are used" in shorter.notices[0]
    assert shorter.sha256 == windows.sha256(ids[:5, :3].astype(np.int32))


def test_no_more_is_tokenised_than_is_wanted(tmp_path):
    seen = []

    class Counting(Tokenizer):
        def encode(self, text, add_special_tokens):
            seen.append(text)
            return super().encode(text, add_special_tokens)

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abcdef"}\n' * 20)
    few = data.token_batches(path, Counting(), batch_size=1, length=4, windows_at_most=3, eos_id=EOS)
    assert len(seen) == 2
    assert few.windows == 3
    everything = data.token_batches(path, TOKENIZER, batch_size=1, length=4, eos_id=EOS)
    np.testing.assert_array_equal(everything.examples._rows[:3], few.examples._rows)


def test_pydoc_trains_on_its_calibration_part():
    got = data.token_batches("pydoc", TOKENIZER, batch_size=2, length=64, epochs=1)
    tokens = encode_documents([sources.read("pydoc", "calibration").text], TOKENIZER, eos_id=None)
    assert got.windows == len(tokens) // 64
    assert got.sha256 == windows.sha256(tokens[: got.windows * 64].reshape(-1, 64))


# --- the order --------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 30), batch_size=st.integers(1, 8), epochs=st.integers(1, 2), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_is_a_permutation(n, batch_size, epochs, seed):
    if n < batch_size:
        return
    batches = data.token_batches(rows(n), None, batch_size=batch_size, epochs=epochs, seed=seed)
    order = [numbers(batch) for batch in batches]
    assert len(order) == epochs * batches.per_epoch == epochs * (n // batch_size)
    for epoch in range(epochs):
        taken = list(chain.from_iterable(order[epoch * batches.per_epoch : (epoch + 1) * batches.per_epoch]))
        assert len(set(taken)) == len(taken) == n // batch_size * batch_size
    assert order == [numbers(batch) for batch in batches]


def test_the_order_is_fixed_by_the_seed_and_the_epoch():
    def order(seed):
        return [numbers(b) for b in data.token_batches(rows(10), None, batch_size=5, epochs=2, seed=seed)]

    # Golden: a later grain that shuffles otherwise would break the resuming of earlier runs.
    assert order(5) == [[4, 0, 5, 3, 7], [9, 8, 1, 2, 6], [2, 7, 0, 3, 8], [9, 6, 5, 1, 4]]
    assert order(5) != order(6)


def test_without_an_end():
    stream = iter(data.token_batches(rows(40), None, batch_size=20))
    counts = np.bincount(list(chain.from_iterable(numbers(next(stream)) for _ in range(40))))
    assert counts.tolist() == [20] * 40


@settings(max_examples=15, deadline=None)
@given(n=st.integers(4, 20), taken=st.integers(0, 12), seed=st.integers(0, 99))
def test_resumed_in_the_middle_the_rest_comes(n, taken, seed):
    def make():
        return data.token_batches(rows(n), None, batch_size=4, epochs=3, seed=seed)

    stream = iter(make())
    taken = min(taken, 3 * make().per_epoch)
    for _ in range(taken):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    rest = list(stream)
    again = iter(make())
    again.set_state(state)
    assert again.get_state() == state
    all_equal(list(again), rest)
    stream.set_state(state)  # also back from the end
    all_equal(list(stream), rest)
    with pytest.raises(StopIteration):
        next(stream)


def test_more_epochs_go_on_where_fewer_ended():
    options = {"batch_size": 2, "seed": 3}
    long = list(data.token_batches(rows(6), None, epochs=3, **options))
    short = iter(data.token_batches(rows(6), None, epochs=1, **options))
    all_equal(list(short), long[:3])
    more = iter(data.token_batches(rows(6), None, epochs=3, **options))
    more.set_state(short.get_state())
    all_equal(list(more), long[3:])


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 3}, {"length": 3}, {"windows_at_most": 8}])
def test_a_place_in_other_data_is_refused(change):
    options = {"batch_size": 2, "seed": 0}
    state = iter(data.token_batches(rows(9), None, **options)).get_state()
    other = iter(data.token_batches(rows(9), None, **{**options, **change}))
    with pytest.raises(JpruneError, match=r"an array of token ids: the saved place .* other data.*go on with the same"):
        other.set_state(state)


@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_each_batch(shuffle):
    def make(**process):
        examples = Rows(rows(10), "x", None)
        return Batches(examples=examples, source="x", batch_size=4, epochs=2, shuffle=shuffle, **process)

    whole = list(make())
    assert len(whole) == 2 * (2 if shuffle else 3)
    parts = [list(make(process_index=i, process_count=2)) for i in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts)]
    all_equal(joined, whole)
    # A place is the same for all processes, and for other numbers of them.
    stream = iter(make(process_index=1, process_count=2))
    next(stream)
    one = iter(make())
    one.set_state(stream.get_state())
    all_equal(list(one), whole[1:])


def test_evaluation_goes_through_all_windows_in_their_order():
    batches = Batches(examples=Rows(rows(5), "x", None), source="x", batch_size=2, epochs=1, shuffle=False)
    got = list(batches)
    assert batches.per_epoch == len(got) == 3
    np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in got])[:5], rows(5))
    assert [b["weights"].sum() for b in got] == [6, 6, 3]
    assert got[-1]["tokens"].shape == got[-1]["weights"].shape == (2, 4)
    assert not got[-1]["weights"][1].any()
    # Fewer windows than a batch can be evaluated too.
    assert Batches(examples=Rows(rows(5), "x", None), source="x", batch_size=8, shuffle=False).per_epoch == 1


# --- bad input --------------------------------------------------------------------------------------------------------


def test_less_than_a_batch(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij")
    with pytest.raises(JpruneError, match=r"a.txt: too little .* has 11 tokens, .* 2 windows of 8 tokens needs 16"):
        data.token_batches(path, TOKENIZER, batch_size=2, length=8)
    with pytest.raises(JpruneError, match=r"has 3 windows of 4 tokens \(12 tokens\), and one batch needs 4 \(16"):
        data.token_batches(rows(3), None, batch_size=4)
    path.write_text("")
    with pytest.raises(JpruneError, match="it has 0 tokens"):
        data.token_batches(path, TOKENIZER, batch_size=1, length=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 302}, r"token id 302 at window 3, position 2 is outside \[0, 302\)"),
        ({"context": 3, "length": 4}, "Sequence length 4 is more than the model's context of 3"),
        ({"length": 5}, "rows have 4 token ids; 5 were asked for"),
        ({"length": 1}, "1 token hold nothing to predict"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"epochs": 0}, "number of epochs must be at least 1"),
        ({"windows_at_most": 0}, "number of windows must be at least 1"),
        ({"seed": -1}, "seed of the data must be from 0 to 4294967295; it is -1"),
        ({"process_count": 3}, "A batch of 4 windows cannot be shared equally by 3"),
        ({"process_index": 2, "process_count": 2}, "Process 2 of 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(JpruneError, match=message):
        data.token_batches(rows(4), None, **{"batch_size": 4, **options})


def test_text_needs_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(JpruneError, match="comes without a tokenizer"):
        data.token_batches(tmp_path / "a.txt", None, batch_size=1)


def test_the_window_with_a_bad_id_is_named_in_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr("jprune.data.batches.ROWS_AT_ONCE", 2)
    ids = rows(7)
    ids[5, 1] = -1
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(JpruneError, match=r"a.npy: token id -1 at window 5, position 1"):
        data.token_batches(tmp_path / "a.npy", None, batch_size=1)


def test_the_hash_is_of_the_shape_too():
    assert (
        Rows(rows(2, 4), "x", None).sha256
        == hashlib.sha256(b"int32[2,4]" + rows(2, 4).astype("<i4").tobytes()).hexdigest()
    )

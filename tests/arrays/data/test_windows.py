import collections
import hashlib
import json
import logging
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune import data
from jprune.data import draws, windows
from jprune.errors import JpruneError

BOS = 1


class Tokenizer:
    """One token a character, after a BOS."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [BOS] * add_special_tokens + [ord(c) for c in text]


TOKENIZER = Tokenizer()


@pytest.fixture
def text_file(tmp_path):
    def write(length, name="a.txt"):
        path = tmp_path / name
        path.write_text("".join(chr(97 + i * i % 26) for i in range(length)))
        return path

    return write


@pytest.fixture
def documents(tmp_path):
    def write(*texts):
        path = tmp_path / "docs.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture
def npy(tmp_path):
    def write(array):
        path = tmp_path / "ids.npy"
        np.save(path, array)
        return path

    return write


# --- calibration: golden against the procedure of the originals, restated ---------------------------------------------


def test_documents_are_drawn_as_c4_in_the_originals(documents):
    texts = ["short", "x" * 7 + "y" * 9, "abcdefgh", "0123456789" * 3, "abcdefg", "z"]
    random.seed(3)
    expected = []
    for _ in range(20):
        while True:
            i = random.randint(0, len(texts) - 1)
            ids = TOKENIZER.encode(texts[i], add_special_tokens=True)
            if len(ids) > 8:  # strictly: "abcdefg" has 8 with its BOS
                break
        i = random.randint(0, len(ids) - 8 - 1)
        expected.append(ids[i : i + 8])
    got = data.calibration(documents(*texts), TOKENIZER, samples=20, length=8, seed=3)
    np.testing.assert_array_equal(got.tokens, expected)
    assert (got.tokens[:, 0] == BOS).any()
    assert not (got.tokens[:, 1:] == BOS).any()
    assert got.notices == ()


def test_streams_are_drawn_as_wikitext_in_the_originals(text_file):
    path = text_file(200)
    random.seed(5)
    ids = TOKENIZER.encode(path.read_text(), add_special_tokens=True)
    expected = []
    for _ in range(30):
        i = random.randint(0, len(ids) - 16 - 1)
        expected.append(ids[i : i + 16])
    got = data.calibration(path, TOKENIZER, samples=30, length=16, seed=5)
    np.testing.assert_array_equal(got.tokens, expected)
    assert got.tokens.dtype == np.int32
    assert (got.source, got.seed) == (str(path), 5)
    other = data.calibration(path, TOKENIZER, samples=30, length=16, seed=6)
    assert other.sha256 != got.sha256


def test_short_documents_are_joined_with_a_notice(documents, caplog):
    path = documents("abc", "defg", "hij")
    ids = TOKENIZER.encode("abc\n\ndefg\n\nhij", add_special_tokens=True)
    with caplog.at_level(logging.INFO, logger="jprune"):
        got = data.calibration(path, TOKENIZER, samples=5, length=10, seed=0)
    rng = random.Random(0)
    starts = [rng.randint(0, len(ids) - 11) for _ in range(5)]
    np.testing.assert_array_equal(got.tokens, [ids[i : i + 10] for i in starts])
    assert "no document has more than 10 tokens" in got.notices[0]
    assert got.notices[0] in caplog.text


@pytest.mark.parametrize(("keep", "times"), [(10**6, 1), (25, 2), (0, 2)])
def test_documents_are_tokenised_once_or_twice_if_they_are_not_kept(keep, times):
    calls = []

    def encode(text):
        calls.append(text)
        return TOKENIZER.encode(text, add_special_tokens=True)

    texts = ["a" * 9] * 30 + [c * 20 for c in "bcdef"]
    got = draws.from_documents(texts, encode, 200, 10, random.Random(2), keep=keep)
    calls_of = collections.Counter(calls)
    assert calls_of["a" * 9] == 30
    assert max(calls_of[text] for text in texts[30:]) == times
    rng = random.Random(2)
    for window in got.tolist():
        while len(ids := TOKENIZER.encode(texts[rng.randint(0, 34)], add_special_tokens=True)) <= 10:
            pass
        start = rng.randint(0, len(ids) - 11)
        assert window == ids[start : start + 10]


# --- evaluation -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(characters=st.integers(0, 60), length=st.integers(1, 20), count=st.none() | st.integers(1, 8))
def test_evaluation_windows_are_the_text_cut_up(tmp_path_factory, characters, length, count):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(characters)))
    ids = TOKENIZER.encode(path.read_text(), add_special_tokens=True)
    available = len(ids) // length
    if available < (count or 1):
        with pytest.raises(JpruneError, match=f"it has {len(ids)} tokens, and {count or 1} window"):
            data.evaluation(path, TOKENIZER, length=length, windows=count)
        return
    got = data.evaluation(path, TOKENIZER, length=length, windows=count)
    assert got.tokens.shape == (count or available, length)
    assert got.tokens.ravel().tolist() == ids[: got.tokens.size]
    assert got.seed is None


@settings(max_examples=40, deadline=None)
@given(characters=st.integers(0, 60), length=st.integers(1, 20), samples=st.integers(1, 5), seed=st.integers(0, 99))
def test_calibration_windows_lie_in_the_text(tmp_path_factory, characters, length, samples, seed):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(chr(97 + i * i % 26) for i in range(characters)))
    ids = TOKENIZER.encode(path.read_text(), add_special_tokens=True)
    options = {"samples": samples, "length": length, "seed": seed}
    if len(ids) <= length:
        with pytest.raises(JpruneError, match=f"it has {len(ids)} tokens.* at least {length + 1}"):
            data.calibration(path, TOKENIZER, **options)
        return
    got = data.calibration(path, TOKENIZER, **options)
    every = {tuple(ids[i : i + length]) for i in range(len(ids) - length)}
    assert got.tokens.shape == (samples, length)
    assert {tuple(row) for row in got.tokens.tolist()} <= every
    assert data.calibration(path, TOKENIZER, **options).sha256 == got.sha256


def test_evaluation_joins_documents(documents):
    got = data.evaluation(documents("abc", "de"), TOKENIZER, length=4)
    assert got.tokens.tolist() == [[BOS, 97, 98, 99], [10, 10, 100, 101]]


def test_a_stream_may_bound_its_evaluation(monkeypatch):
    source = windows.sources.Stream(text="a" * 100, max_windows=3)
    monkeypatch.setattr(windows.sources, "read", lambda spec, split: source)
    assert len(data.evaluation("hf:c4", TOKENIZER, length=10).tokens) == 3
    assert len(data.evaluation("hf:c4", TOKENIZER, length=10, windows=5).tokens) == 5


def test_pydoc_has_windows_for_both():
    assert data.calibration("pydoc", TOKENIZER).tokens.shape == (128, 2048)
    assert data.evaluation("pydoc", TOKENIZER, windows=4).tokens.shape == (4, 2048)


# --- token rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [data.calibration, data.evaluation])
@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int32])
def test_npy_rows_are_used_as_they_are(npy, make, dtype):
    array = np.arange(12, dtype=dtype).reshape(3, 4)
    got = make(npy(array), None, vocab_size=12)
    np.testing.assert_array_equal(got.tokens, array)
    assert got.tokens.dtype == np.int32
    assert got.seed is None
    assert got.notices == ()


def test_npy_rows_are_cut_to_what_is_asked(npy):
    path = npy(np.arange(12).reshape(3, 4))
    got = data.calibration(path, None, samples=2, length=3)
    assert got.tokens.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert "of each row of 4 tokens the first 3" in got.notices[0]
    assert data.evaluation(path, None, windows=1).tokens.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("make", [data.calibration, data.evaluation])
def test_npy_with_too_little(npy, make):
    count = "samples" if make is data.calibration else "windows"
    path = npy(np.zeros((3, 4), np.int32))
    with pytest.raises(JpruneError, match="has 3 rows of 4 token ids; 3 rows of 8 were asked for"):
        make(path, None, length=8)
    with pytest.raises(JpruneError, match="has 3 rows of 4 token ids; 5 rows of 4 were asked for"):
        make(path, None, **{count: 5})
    for shape in ((0, 4), (3, 0)):
        with pytest.raises(JpruneError, match=f"has {shape[0]} rows of {shape[1]} token ids"):
            make(npy(np.zeros(shape, np.int32)), None)


@pytest.mark.parametrize(("bad", "dtype"), [(-1, np.int64), (100, np.uint8), (2**40, np.int64), (2**63, np.uint64)])
def test_ids_outside_the_vocabulary_are_named(npy, bad, dtype):
    array = np.zeros((3, 4), dtype)
    array[1, 2] = bad
    with pytest.raises(JpruneError, match=rf"token id {bad} at window 1, position 2 is outside \[0, 100\)"):
        data.calibration(npy(array), None, vocab_size=100)
    if not 0 <= bad < 2**31:
        with pytest.raises(JpruneError, match=f"token id {bad} at window 1"):
            data.evaluation(npy(array), None)


def test_a_tokenizer_of_another_model(text_file):
    with pytest.raises(JpruneError, match=r"outside \[0, 50\). Use token ids made with this model's own tokenizer"):
        data.evaluation(text_file(50), TOKENIZER, length=10, vocab_size=50)


# --- lengths, counts, hash --------------------------------------------------------------------------------------------


def test_the_default_length_is_cut_to_the_context(text_file, npy):
    got = data.calibration(text_file(100), TOKENIZER, samples=2, context=32)
    assert got.tokens.shape == (2, 32)
    assert "length of 2048 is cut to the model's context of 32" in got.notices[0]
    assert data.evaluation(text_file(100), TOKENIZER, context=32).tokens.shape == (3, 32)
    rows = data.evaluation(npy(np.zeros((2, 8), np.int32)), None, context=6)
    assert rows.tokens.shape == (2, 6)
    assert len(rows.notices) == 2


@pytest.mark.parametrize("make", [data.calibration, data.evaluation])
def test_bad_numbers(text_file, make):
    path = text_file(100)
    with pytest.raises(JpruneError, match="Sequence length 64 is more than the model's context of 32"):
        make(path, TOKENIZER, length=64, context=32)
    with pytest.raises(JpruneError, match="sequence length must be at least 1; it is 0"):
        make(path, TOKENIZER, length=0)
    count = "samples" if make is data.calibration else "windows"
    with pytest.raises(JpruneError, match=f"number of {count} must be at least 1; it is -1"):
        make(path, TOKENIZER, length=8, **{count: -1})


@pytest.mark.parametrize("make", [data.calibration, data.evaluation])
def test_text_needs_a_tokenizer(text_file, make):
    with pytest.raises(JpruneError, match=r"without a tokenizer.*tokenizer.json.*\.npy"):
        make(text_file(100), None, length=8)


def test_the_hash_tells_shape_and_tokens():
    tokens = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert windows.sha256(tokens) == hashlib.sha256(b"int32[2,3]" + tokens.tobytes()).hexdigest()
    assert windows.sha256(tokens) != windows.sha256(tokens.reshape(3, 2))
    assert windows.sha256(np.asfortranarray(tokens)) == windows.sha256(tokens)

"""Long texts are tokenised in pieces to the tokens of the whole, by tokenizers of every kind."""

from pydoc_data.topics import topics

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jprune.checkpoints.huggingface import pieces
from jprune.checkpoints.huggingface.tokenizer import from_files

TEXT = "".join(topics[name] + "\n \n\t héllo wörld 🙂🙂  \r\n" for name in sorted(topics))[:30_000]


def trained(kind):
    """A tokenizer that learnt from a part of the text."""
    special = ["<unk>", "<s>", "</s>"]
    model = models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>")
    made = Tokenizer(model)
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        own = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "words":
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        own = trainers.BpeTrainer(vocab_size=600, special_tokens=special)
    else:  # as in SentencePiece's: a mark for spaces, and one before the text
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
        trainer = trainers.UnigramTrainer if kind == "unigram" else trainers.BpeTrainer
        own = trainer(vocab_size=600, special_tokens=special, **({"unk_token": "<unk>"} if kind == "unigram" else {}))
    made.train_from_iterator([TEXT[:10_000]], own)
    if kind == "pieces":
        made.pre_tokenizer = None  # one word of thirty thousand letters
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", made.token_to_id("<s>")), ("</s>", made.token_to_id("</s>"))]
    )
    return Tokenizer.from_str(made.to_str())  # the scores as the file rounds them, which is what decides between ties


@pytest.mark.parametrize("kind", ["bytes", "words", "pieces", "unigram"])
def test_pieces_give_the_tokens_of_the_whole(monkeypatch, kind):
    made = trained(kind)
    ours = from_files({"tokenizer.json": made.to_str().encode()}, {})
    monkeypatch.setattr(pieces, "PIECE", 4000)
    monkeypatch.setattr(pieces, "OVERLAP", 1500)
    monkeypatch.setattr(
        ours, "_whole", lambda text, special, whole=ours._whole: len(text) > 100 or whole(text, special)
    )
    for special in (True, False):
        expected = made.encode(TEXT, add_special_tokens=special).ids
        np.testing.assert_array_equal(ours.encode(TEXT, add_special_tokens=special), expected)


def test_files_that_go_through_transformers_are_tokenised_in_pieces_too(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    made = trained("bytes")
    made.model.save(str(tmp_path))
    files = {name: (tmp_path / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    ours = from_files(
        files | {"tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}'}, {"model_type": "gpt2"}
    )
    expected = ours.encode(TEXT)
    monkeypatch.setattr(pieces, "PIECE", 4000)
    monkeypatch.setattr(pieces, "OVERLAP", 1500)
    monkeypatch.setattr(
        ours, "_whole", lambda text, special, whole=ours._whole: len(text) > 100 or whole(text, special)
    )
    np.testing.assert_array_equal(ours.encode(TEXT), expected)


def test_where_no_two_pieces_agree_the_whole_is_tokenised(monkeypatch):
    """A letter ten thousand times is cut into tokens from its beginning on, so pieces are cut elsewhere."""
    made = Tokenizer(models.BPE({"a": 0, "aa": 1, "aaa": 2}, [("a", "a"), ("aa", "a")]))
    ours = from_files({"tokenizer.json": made.to_str().encode()}, {})
    monkeypatch.setattr(pieces, "PIECE", 1000)
    monkeypatch.setattr(pieces, "OVERLAP", 400)
    for text in ("a" * 10_000, "a" * 10_001):
        assert list(ours.encode(text)) == made.encode(text).ids


def test_special_tokens_around():
    assert pieces.around([1, 5, 6, 2], [5, 6]) == ([1], [2])
    assert pieces.around([5, 6], [5, 6]) == ([], [])
    assert pieces.around([1, 7, 2], [5, 6]) is None
    assert pieces.around([1, 2], []) is None

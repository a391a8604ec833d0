import functools
import io
import itertools
import json
from pydoc_data.topics import topics

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jprune.checkpoints.gguf import tokenizer as gguf_tokenizer
from jprune.checkpoints.gguf.header import Header
from jprune.checkpoints.huggingface.tokenizer import from_files
from jprune.errors import JpruneError

SAMPLES = (
    "Hello world! I'm 12345 years old, aren't I?  \n\n tabs\t x",
    "Привет, мир! 你好，世界。これはテストです 123",
    "émigré naïve cafe\u0301 😀👩‍👩‍👧 ٣٤٥ ½ 三",
    "<|im_start|>user\nhi<|im_end|>\n",
    "def f(x):\n    return x**2  # ok\r\n",
    "   lead and trail   ",
    "",
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = ["Hello world, I'm 12345 years old and hello again, aren't I? Привет мир 你好 こんにちは café 😀 return x"] * 3


def byte_level(pre_tokenizer, **options):
    """A small tokenizer trained by the `tokenizers` library, as its makers would publish it."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def header(tmp_path, **metadata):
    return Header(path=tmp_path / "model.gguf", metadata=metadata, tensors={}, data=memoryview(b""))


def gguf_metadata(tokenizer, pre):
    content = json.loads(tokenizer.to_str())
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in ids],
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token, _ in ids],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def llama3_split(digits):
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ).replace("{DIGITS}", digits)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def original(pre):
    """The tokenizer as the model's makers define it, in their own terms."""
    if pre == "gpt-2":
        return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return byte_level(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]))
    if pre == "qwen2":
        tokenizer = byte_level(llama3_split(""))
        tokenizer.normalizer = normalizers.NFC()
        return tokenizer
    return byte_level(llama3_split("{1,3}"), ignore_merges=True)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_byte_level_tokenizers_equal_their_originals(tmp_path, pre):
    expected = original(pre)
    files = gguf_tokenizer.tokenizer_files(header(tmp_path, **gguf_metadata(expected, pre)))
    rebuilt = from_files(files, {})
    for text in SAMPLES:
        ids = expected.encode(text, add_special_tokens=False).ids
        assert rebuilt.encode(text, add_special_tokens=False) == ids, text
        assert rebuilt.decode(ids, skip_special_tokens=False) == expected.decode(ids, skip_special_tokens=False)
    bos = [1] if pre == "llama-bpe" else []
    assert rebuilt.encode("Hello") == bos + rebuilt.encode("Hello", add_special_tokens=False)


@pytest.mark.parametrize(("pre", "name"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_byte_level_tokenizers_equal_those_of_transformers(tmp_path, pre, name):
    """Which know how these families split a text, given vocabulary and merges."""
    transformers = pytest.importorskip("transformers")
    metadata = gguf_metadata(original(pre), pre)
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    if transformers.__version__ < "5":
        pytest.skip("transformers 4 makes these of files only")
    theirs = getattr(transformers, name)(vocab=vocab, merges=merges, extra_special_tokens=SPECIAL)
    ours = from_files(gguf_tokenizer.tokenizer_files(header(tmp_path, **metadata)), {})
    for text in (*SAMPLES, *TEXT):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("pre", ["tekken", "default", None])
def test_other_kinds_split_as_they_should(tmp_path, pre):
    metadata = gguf_metadata(original("gpt-2"), pre)
    if pre is None:
        del metadata["tokenizer.ggml.pre"]
    files = gguf_tokenizer.tokenizer_files(header(tmp_path, **metadata))
    splitter = Tokenizer.from_str(files["tokenizer.json"].decode()).pre_tokenizer
    pieces = [piece.replace("Ġ", " ") for piece, _ in splitter.pre_tokenize_str("HelloWorld 12345!")]
    expected = (
        ["Hello", "World", " ", "1", "2", "3", "4", "5", "!"]
        if pre == "tekken"
        else ["HelloWorld", " ", "123", "45", "!"]
    )
    assert pieces == expected


def test_transformers_loads_the_files_and_encodes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    metadata = gguf_metadata(original("llama-bpe"), "llama-bpe")
    files = gguf_tokenizer.tokenizer_files(header(tmp_path, **metadata))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = from_files(files, {})
    for text in SAMPLES:
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (1, 2, 2, 0)
    assert theirs.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False) == "Hello"


def test_bos_and_eos_as_the_metadata_say(tmp_path):
    metadata = gguf_metadata(original("smollm"), "smollm")
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = from_files(gguf_tokenizer.tokenizer_files(header(tmp_path, **metadata)), {})
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("Hello") == [1, *ids, 2]
    assert tokenizer.decode([1, *ids, 2]) == "Hello"


def test_user_defined_tokens_are_not_special(tmp_path):
    metadata = gguf_metadata(original("smollm"), "smollm")
    metadata["tokenizer.ggml.token_type"][2] = 4
    tokenizer = from_files(gguf_tokenizer.tokenizer_files(header(tmp_path, **metadata)), {})
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [2]
    assert tokenizer.decode([1, 2]) == "<|im_end|>"


# SentencePiece.

WORDS = "the theory of there and then this that with water weather whether other mother rather".split()  # noqa: SIM905


def sentence_piece(tmp_path, **more):
    pieces = sorted(
        {("▁" + w)[i:j] for w in WORDS for i in range(8) for j in range(i + 2, i + 6)} - {""},
        key=lambda p: (-len(p), p),
    )
    pieces = [p for p in pieces if len(p) > 1][::2]  # gaps, so that some merges have no way
    letters = sorted({c for w in WORDS for c in w} | {"▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *letters]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) + len(letters))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters))]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return header(tmp_path, **metadata | more)


def sentence_piece_reference(tokens, scores, text):
    """SentencePiece's BPE: join the neighbours whose union scores best, the leftmost first, while there are any."""
    best = {token: score for token, score, i in zip(tokens, scores, range(len(tokens))) if i >= 259}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [(-best[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in best]
        if not joins:
            break
        i = min(joins)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids = {token: i for i, token in enumerate(tokens)}
    return [i for s in symbols for i in ([ids[s]] if s in ids else [3 + b for b in s.encode()])]


def test_sentence_piece_equals_a_plain_reference(tmp_path):
    head = sentence_piece(tmp_path)
    tokenizer = from_files(gguf_tokenizer.tokenizer_files(head), {})
    tokens, scores = head.metadata["tokenizer.ggml.tokens"], head.metadata["tokenizer.ggml.scores"]
    for text in (
        "the weather",
        "whether there  is water",
        " other mothers rather",
        "été 😀 therether",
        "",
        "ththththethe",
    ):
        expected = sentence_piece_reference(tokens, scores, text)
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text
        assert tokenizer.encode(text) == [1, *expected]
        assert tokenizer.decode(expected) == text


def test_sentence_piece_without_a_space_in_front(tmp_path):
    head = sentence_piece(tmp_path, **{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False})
    tokenizer = from_files(gguf_tokenizer.tokenizer_files(head), {})
    assert tokenizer.decode(tokenizer.encode("the water")) == "the water"
    assert tokenizer.encode("t")[0] == head.metadata["tokenizer.ggml.tokens"].index("t")


@pytest.fixture(scope="module")
def trained():
    """A function that trains a SentencePiece model on Python's documentation and a little of other scripts."""
    sentencepiece = pytest.importorskip("sentencepiece")
    other = ["Привет, мир! Как дела?", "你好，世界。", "これはテストです", "émigré naïve café", "😀 ٣٤٥ ½ Ⅷ ﬁ"]
    lines = ["\n".join(topics.values())[:60000].split("\n"), other * 20]

    @functools.cache
    def train(kind, normaliser, byte_fallback, extra_spaces):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(*lines),
            model_writer=out,
            vocab_size=700,
            model_type=kind,
            byte_fallback=byte_fallback,
            normalization_rule_name=normaliser,
            remove_extra_whitespaces=not extra_spaces,
            minloglevel=2,
        )
        return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())

    return train


@pytest.mark.parametrize(
    ("kind", "normaliser", "byte_fallback", "extra_spaces"),
    [
        ("bpe", "identity", True, True),  # Llama's
        ("unigram", "identity", True, True),
        ("unigram", "nmt_nfkc", True, False),
        ("unigram", "nmt_nfkc", False, False),  # T5's
    ],
)
def test_sentence_piece_equals_the_library_itself(tmp_path, trained, kind, normaliser, byte_fallback, extra_spaces):
    original = trained(kind, normaliser, byte_fallback, extra_spaces)
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(original.serialized_model_proto())
    metadata = {  # as llama.cpp's converter writes them
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama" if kind == "bpe" else "t5",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": proto.normalizer_spec.remove_extra_whitespaces,
        "tokenizer.ggml.precompiled_charsmap": list(proto.normalizer_spec.precompiled_charsmap),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    files = gguf_tokenizer.tokenizer_files(header(tmp_path, **metadata))
    rebuilt = from_files(files, {})
    for text in (*SAMPLES, "ﬁne Ⅷ ｆｕｌｌ　width", *next(iter(topics.values())).split("\n")):
        if "<|" in text:
            continue
        ids, expected = rebuilt.encode(text, add_special_tokens=False), original.encode(text)
        if kind == "unigram" and ids != expected:  # two ways to cut a text may have one score
            assert len(ids) == len(expected)
            assert sum(map(original.get_score, ids)) == pytest.approx(sum(map(original.get_score, expected)), abs=1e-4)
            ids, expected = (["".join(map(original.id_to_piece, each))] for each in (ids, expected))
        assert ids == expected, text


def test_no_tokenizer(tmp_path):
    assert gguf_tokenizer.tokenizer_files(header(tmp_path)) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.pre": "klingon"}, "'klingon'.*supported: .*smollm"),
        ({"tokenizer.ggml.tokens": ["a"]}, "lists of one length"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "cannot be rebuilt"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores"),
    ],
)
def test_bad_metadata(tmp_path, change, words):
    metadata = gguf_metadata(original("smollm"), "smollm") | change
    with pytest.raises(JpruneError, match=words):
        gguf_tokenizer.tokenizer_files(header(tmp_path, **metadata))

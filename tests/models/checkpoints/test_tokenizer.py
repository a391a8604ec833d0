import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jprune.checkpoints.huggingface.tokenizer import from_files
from jprune.errors import JpruneError

VOCAB = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}


def files(config=(), template=None):
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(2)
    out = {"tokenizer.json": tokenizer.to_str().encode()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **dict(config)}
    return out | {"tokenizer_config.json": json.dumps(config).encode()}


def test_encode_and_decode_without_truncation():
    tokenizer = from_files(files(), {})
    assert tokenizer.encode("hello world hello") == [3, 4, 3]
    assert tokenizer.decode([1, 3, 4]) == "hello world"
    assert tokenizer.decode([1, 3], skip_special_tokens=False) == "<s> hello"


@pytest.mark.parametrize("template", [None, "<s> $A"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_special_tokens_as_transformers_adds_them(tmp_path, config, template):
    transformers = pytest.importorskip("transformers")
    content = files(config, template)
    for name, text in content.items():
        (tmp_path / name).write_bytes(text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = from_files(content, {})
    for special in (True, False):
        assert ours.encode("hello", add_special_tokens=special) == theirs.encode(
            "hello", add_special_tokens=special, truncation=False
        )


def test_slower_files_go_through_transformers():
    pytest.importorskip("transformers")
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", "h", "i", "hi", "Ġ", "Ġh", "Ġhi"])}
    content = {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": b"#version: 0.2\nh i\n\xc4\xa0 hi\n",
        "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}',
    }
    tokenizer = from_files(content, {"model_type": "gpt2"})
    assert tokenizer.encode("hi hi") == [3, 6]
    assert tokenizer.decode([3, 6]) == "hi hi"


def test_no_tokenizer_files():
    assert from_files({"generation_config.json": b"{}"}, {}) is None


def test_damaged():
    with pytest.raises(JpruneError, match=r"tokenizer\.json cannot be read"):
        from_files({"tokenizer.json": b"{"}, {})
    with pytest.raises(JpruneError, match=r"tokenizer\.model cannot be read.*Put a tokenizer\.json[^\n]*$"):
        from_files({"tokenizer.model": b"\x00\x01"}, {"model_type": "llama"})

"""The tokenizer of a GGUF file, rebuilt from its metadata as tokenizer.json and tokenizer_config.json.

Three kinds exist. "gpt2" is byte-level BPE: vocabulary and merges are stored, but the way text is split before merging
is only *named* (tokenizer.ggml.pre); `_PRE_TOKENIZERS` spells the names out. The other two are SentencePiece's, with a
score for every piece. "llama" is its BPE: pieces merge in the order of the score of what they become. "t5" is its
unigram model: of all ways to cut a text, the one whose pieces have the highest sum of scores.
"""

import json
import logging
from typing import TYPE_CHECKING, Any

from jprune.checkpoints.gguf.header import Header
from jprune.checkpoints.source import reason
from jprune.errors import JpruneError
from jprune.packages import require

if TYPE_CHECKING:
    import tokenizers

_log = logging.getLogger(__name__)

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_KINDS = ("gpt2", "llama", "t5")

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What llama.cpp does when it knows no better.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# Name -> the expressions by which text is split, one after the other.
_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "roberta-bpe"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "bloom": (r" ?[^(\s|.,!?…。，、।۔،)]+",),
    "default": _DEFAULT,
}
# Tokenizers that take a word of the vocabulary whole even where the merges would not build it, and that begin with BOS.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
# Tokenizers whose originals normalise the text (llama.cpp does not, which is a known difference there).
_NFC = ("qwen2", "deepseek-r1-qwen", "megrez")


def tokenizer_files(header: Header) -> dict[str, bytes]:
    """The contents of tokenizer.json and tokenizer_config.json; empty if the file holds no tokenizer.

    Raises:
        JpruneError: a kind of tokenizer that is not supported, or lists that do not fit together.
    """
    metadata = header.metadata
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind == "none":
        return {}
    if kind not in _KINDS:
        raise JpruneError(
            f"{header.path}: tokenizers of kind {kind!r} are not supported; supported: {', '.join(_KINDS)}"
        )
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types):
        raise JpruneError(
            f"{header.path}: tokenizer.ggml.tokens and token_type must be lists of one length; the file is damaged"
        )
    require("tokenizers")
    try:
        if kind == "gpt2":
            tokenizer, begins = _byte_level(header, tokens)
        else:
            # BOS is SentencePiece's habit in Llama's kind; EOS comes last where its unigram models are used.
            tokenizer, begins = _sentence_piece(header, kind, tokens, types), kind == "llama"
        _add_special_tokens(tokenizer, tokens, types)
        config = _tokenizer_config(header, tokens, begins)
        _add_template(tokenizer, config)
    except JpruneError:
        raise
    except Exception as error:  # `tokenizers` raises plain Exception
        raise JpruneError(
            f"{header.path}: the tokenizer cannot be rebuilt ({reason(error)}); the metadata are damaged"
        ) from error
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def _add_template(tokenizer: "tokenizers.Tokenizer", config: dict) -> None:
    """Makes the tokenizer put BOS and EOS around a text as its tokenizer_config.json says."""
    from tokenizers import processors

    bos, eos = (config.get(f"{key}_token") if config[f"add_{key}_token"] else None for key in ("bos", "eos"))
    sequence = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=sequence, special_tokens=ids)


def _byte_level(header: Header, tokens: list[str]) -> tuple["tokenizers.Tokenizer", bool]:
    """A byte-level BPE tokenizer, and whether its kind begins every text with BOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = header.metadata.get("tokenizer.ggml.pre")
    if name is None:
        _log.warning(
            "%s does not say how its tokenizer splits text; splitting as llama.cpp does by default", header.path
        )
        name = "default"
    if name not in _PRE_TOKENIZERS:
        raise JpruneError(
            f"{header.path}: pre-tokenizer {name!r} is not supported; supported: {', '.join(sorted(_PRE_TOKENIZERS))}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in header.metadata.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(models.BPE(_ids(tokens), merges, ignore_merges=name in _WHOLE_WORDS))
    if name in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PRE_TOKENIZERS[name]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, name in _WHOLE_WORDS


def _sentence_piece(header: Header, kind: str, tokens: list[str], types: list[int]) -> "tokenizers.Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers

    metadata = header.metadata
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise JpruneError(
            f"{header.path}: tokenizer.ggml.scores must be a list with one score a token; the file is damaged"
        )
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model: models.Model
    if kind == "t5":
        model = models.Unigram(list(zip(tokens, map(float, scores))), unknown, byte_fallback=_BYTE in types)
    else:
        model = models.BPE(
            _ids(tokens),
            merges_by_score(tokens, scores, types),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    tokenizer = Tokenizer(model)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = []
    if charsmap := metadata.get("tokenizer.ggml.precompiled_charsmap"):
        steps.append(normalizers.Precompiled(bytes(charsmap)))
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces", False):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def merges_by_score(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece vocabulary: every split of a piece into two, best score of the whole first."""
    pieces = {token: -score for token, score, kind in zip(tokens, scores, types) if kind == _NORMAL}
    merges = []
    for whole, rank in pieces.items():
        for i in range(1, len(whole)):
            left, right = whole[:i], whole[i:]
            if left in pieces and right in pieces:
                merges.append((rank, pieces[left], pieces[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _add_special_tokens(tokenizer: "tokenizers.Tokenizer", tokens: list[str], types: list[int]) -> None:
    from tokenizers import AddedToken

    special = [t for t, kind in zip(tokens, types) if kind in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    user_defined = [t for t, kind in zip(tokens, types) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in user_defined])


def _tokenizer_config(header: Header, tokens: list[str], begins: bool) -> dict:
    metadata = header.metadata
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", begins),
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None and token < len(tokens):
            config[f"{ours}_token"] = tokens[token]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return {key: value for key, value in config.items() if value is not None}

"""A tokenizer with one face: made of tokenizer.json by the `tokenizers` library, or else by `transformers`."""

import json
import tempfile
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from jprune import texts
from jprune.checkpoints.huggingface import pieces
from jprune.checkpoints.source import reason
from jprune.errors import JpruneError
from jprune.packages import require


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str, add_special_tokens: bool = True) -> Sequence[int]:
        """Token ids; with BOS or EOS around them if the tokenizer's files say so and `add_special_tokens` is set."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some token ids."""


class _Fast:
    """tokenizer.json: which tokens begin and end a text is written there too, in its post-processor."""

    def __init__(self, tokenizer_json: bytes):
        require("tokenizers")
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(texts.decoded(tokenizer_json, "tokenizer.json"))
        except Exception as error:  # `tokenizers` raises plain Exception
            raise JpruneError(f"tokenizer.json cannot be read ({reason(error)}); download it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, add_special_tokens: bool = True) -> Sequence[int]:
        try:
            return _encode(self._whole, self._spans, text, add_special_tokens)
        except Exception as error:  # `tokenizers` raises plain Exception
            raise JpruneError(f"tokenizer.json does not tokenise this text ({reason(error)})") from error

    def _whole(self, text: str, add_special_tokens: bool) -> list[int]:
        # The fast form does not track where in the text each token lies: a third less time and memory.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def _spans(self, part: str) -> tuple[Sequence[int], pieces.Spans]:
        found = self._tokenizer.encode_batch([part], add_special_tokens=False)[0]
        return found.ids, found.offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        try:
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        except Exception as error:
            raise JpruneError(f"tokenizer.json does not decode these ids ({reason(error)})") from error


class _Slow:
    """Whatever transformers.AutoTokenizer makes of the files (sentencepiece models, vocab.json and merges.txt, ...)."""

    def __init__(self, files: Mapping[str, bytes], hf_config: dict):
        require("transformers")
        import transformers

        # AutoTokenizer reads folders only; the config.json tells it which class to take.
        with tempfile.TemporaryDirectory(prefix="jprune-tokenizer-") as folder:
            for name, content in {**files, "config.json": json.dumps(hf_config).encode()}.items():
                (Path(folder) / name).write_bytes(content)
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            except Exception as error:  # anything from a missing package to a damaged file
                raise JpruneError(
                    f"the tokenizer files {', '.join(sorted(files))} cannot be read ({reason(error)}). "
                    "Put a tokenizer.json beside the weights"
                ) from error

    def encode(self, text: str, add_special_tokens: bool = True) -> Sequence[int]:
        # Those of the library's that are written in Python do not tell where in the text a token lies.
        spans = self._spans if self._tokenizer.is_fast else None
        return _encode(self._whole, spans, text, add_special_tokens)

    def _whole(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _spans(self, part: str) -> tuple[Sequence[int], pieces.Spans]:
        found = self._tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))


def _encode(
    whole: Callable[[str, bool], list[int]], spans: pieces.Tokenise | None, text: str, add_special_tokens: bool
) -> Sequence[int]:
    """The ids of a text: from pieces of it where it is long, and they give the same; else whole."""
    if len(text) > 2 * pieces.PIECE and spans is not None:
        sample = text[:100]
        special = pieces.around(whole(sample, add_special_tokens), whole(sample, False))
        if special is not None and (found := pieces.encode(spans, text)) is not None:
            return array("i", special[0]) + found + array("i", special[1])
    return whole(text, add_special_tokens)


_SLOW_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


def from_files(files: Mapping[str, bytes], hf_config: dict) -> Tokenizer | None:
    """The tokenizer described by the files beside a model, or None if none of them is a tokenizer's."""
    if "tokenizer.json" in files:
        return _Fast(files["tokenizer.json"])
    if any(name in _SLOW_FILES or name.endswith(".tiktoken") for name in files):
        return _Slow(files, hf_config)
    return None

"""Token windows for calibration and evaluation, sampled as the SparseGPT and Wanda programs do.

Calibration draws from one `random.Random(seed)` stream, so that the same tokenizer, text and seed give the tokens that
the originals saw. Of a stream: one offset a window. Of documents: a document (again while it is not longer than the
window), then the offset in it. Evaluation cuts the text into windows that do not overlap and drops the tail. Special
tokens are added once, where the text or document starts, so a window holds a BOS only when it starts there.

Deviation: when no document is longer than the window the originals never return; here the documents are joined by blank
lines and sampled as a stream, with a notice.
"""

import dataclasses
import functools
import hashlib
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jprune.annotations import Int32, Integer
from jprune.data import draws, sources
from jprune.errors import JpruneError

logger = logging.getLogger(__name__)

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048


@runtime_checkable
class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        """The token ids of `text`, with a BOS where the tokenizer adds one."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Token windows, and what is recorded of them.

    Attributes:
        tokens: the windows, one a row.
        source: the spec they come from, as given.
        seed: what they were drawn with; None when nothing was drawn (evaluation, or a .npy).
        sha256: of the tokens and their shape: equal when, and only when, the tokens are.
        notices: what the user should know about how they were made, one sentence each.
        parts: of windows of several sources, what is recorded of each by name.
        overlap: the share of them that has text in common with what a run calibrates on; None where nobody looked.
    """

    tokens: Int32[np.ndarray, "n length"]
    source: str
    seed: int | None
    sha256: str
    notices: tuple[str, ...] = ()
    parts: Mapping[str, Any] | None = None
    overlap: float | None = None

    def first(self, count: int) -> "Windows":
        """The first `count` of them, or all if there are fewer."""
        tokens = self.tokens[:count]
        return dataclasses.replace(self, tokens=tokens, sha256=sha256(tokens))

    def described(self) -> dict[str, Any]:
        """What the record of a result says of them."""
        n, length = self.tokens.shape
        return {
            "source": self.source,
            "windows": n,
            "sequence_length": length,
            "seed": self.seed,
            "sha256": self.sha256,
            **({} if self.parts is None else {"parts": dict(self.parts)}),
            **({} if self.overlap is None else {"overlap": self.overlap}),
        }


Spec = str | Path | np.ndarray | Windows
"""A source by its name (`jprune.data.sources`), or token ids [n, length] themselves; or windows that were made of one
already, which are taken as they are."""


def calibration(
    spec: Spec,
    tokenizer: Tokenizer | None,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    context: int | None = None,
) -> Windows:
    """Windows to calibrate on, drawn as the originals draw them; of a `.npy`, the first rows in their order.

    Args:
        spec: names the source, see `jprune.data.sources`; or token ids, treated as a `.npy` of them.
        tokenizer: needed for text; a `.npy` works without.
        samples: number of windows; by default 128, or every row of a `.npy`.
        length: tokens a window; by default 2048 cut to `context`, or what the rows of a `.npy` have.
        seed: of the draws; with `random.seed(seed)` the originals draw the same.
        vocab_size: ids from here on are refused.
        context: the longest sequence that the model takes.

    Raises:
        JpruneError: a source that cannot be used, too little of it, or a length that the model does not take.
    """
    if isinstance(spec, Windows):
        return spec
    source, spec = read(spec, "calibration")
    length, notices = window_length(length, context, source)
    notices += source.notices
    if isinstance(source, sources.TokenRows):
        return _from_rows(source, spec, samples, length, vocab_size, notices)
    samples = DEFAULT_SAMPLES if samples is None else samples
    check_count("number of samples", samples)
    tokenizer = require_tokenizer(tokenizer, spec)
    rng = random.Random(seed)
    tokens = None
    if isinstance(source, sources.Documents):
        encode = functools.partial(tokenizer.encode, add_special_tokens=True)
        tokens = draws.from_documents(source.texts, encode, samples, length, rng)
        if tokens is None:
            notices += (f"{spec}: no document has more than {length} tokens; they are joined into one text.",)
    if tokens is None:
        ids = _encode(tokenizer, source)
        if len(ids) <= length:
            raise JpruneError(
                f"{spec}: too little text for calibration: it has {len(ids)} tokens, and windows of {length} tokens "
                f"need at least {length + 1}. Give more text, or shorter windows (`sequence_length`)."
            )
        tokens = draws.from_stream(ids, samples, length, rng)
    return made(tokens, spec, seed, vocab_size, notices)


def evaluation(
    spec: Spec,
    tokenizer: Tokenizer | None,
    *,
    length: int | None = None,
    windows: int | None = None,
    vocab_size: int | None = None,
    context: int | None = None,
) -> Windows:
    """The first `windows` (by default all) non-overlapping windows of the evaluation text; the tail is dropped.

    `length`, `vocab_size`, `context` and errors are those of `calibration`; documents are joined by blank lines.
    """
    if isinstance(spec, Windows):
        return spec
    source, spec = read(spec, "evaluation")
    length, notices = window_length(length, context, source)
    notices += source.notices
    if isinstance(source, sources.TokenRows):
        return _from_rows(source, spec, windows, length, vocab_size, notices)
    if windows is not None:
        check_count("number of windows", windows)
    ids = _encode(require_tokenizer(tokenizer, spec), source)
    available = len(ids) // length
    wanted = windows
    if wanted is None:
        limit = source.max_windows if isinstance(source, sources.Stream) else None
        wanted = max(1, available if limit is None else min(available, limit))
    if available < wanted:
        raise JpruneError(
            f"{spec}: too little text for evaluation: it has {len(ids)} tokens, and {wanted} window(s) of {length} "
            f"tokens need {wanted * length}. Give more text, fewer windows, or shorter ones (`sequence_length`)."
        )
    tokens = ids[: wanted * length].reshape(wanted, length)
    return made(tokens, spec, None, vocab_size, notices)


def is_rows(spec: Spec | None) -> bool:
    """Whether a spec stands for rows of token ids, which have a number and a length of their own."""
    return isinstance(spec, np.ndarray | Windows) or str(spec).endswith(".npy")


def read(spec: Spec, split: sources.Split) -> tuple[sources.Source, str | Path]:
    """The source, and what to call it in messages."""
    if isinstance(spec, Windows):
        return sources.TokenRows(rows=spec.tokens), spec.source
    if isinstance(spec, np.ndarray):
        return sources.TokenRows(rows=sources.checked_rows(spec, "the array of token ids")), "an array of token ids"
    return sources.read(spec, split), spec


def sha256(tokens: Int32[np.ndarray, "n length"]) -> str:
    """Hash of the shape and the little-endian bytes of `tokens`."""
    digest = hashlib.sha256(f"int32[{tokens.shape[0]},{tokens.shape[1]}]".encode())
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    return digest.hexdigest()


def _encode(tokenizer: Tokenizer, source: sources.Stream | sources.Documents) -> Int32[np.ndarray, "tokens"]:
    """The ids of the whole source as one text."""
    text = source.text if isinstance(source, sources.Stream) else "\n\n".join(source.texts)
    return np.array(tokenizer.encode(text, add_special_tokens=True), np.int32)


def _from_rows(
    source: sources.TokenRows,
    spec: str | Path,
    count: int | None,
    length: int,
    vocab_size: int | None,
    notices: tuple[str, ...],
) -> Windows:
    """The first `length` tokens of the first `count` rows (by default of all)."""
    rows, row_length = source.rows.shape
    if count is None:
        count = max(1, rows)
    check_count("number of windows", count)
    if rows < count or row_length < length:
        raise JpruneError(f"{spec} has {rows} rows of {row_length} token ids; {count} rows of {length} were asked for.")
    if row_length > length:
        notices += (f"{spec}: of each row of {row_length} tokens the first {length} are used.",)
    return made(source.rows[:count, :length], spec, None, vocab_size, notices)


def made(
    tokens: np.ndarray, spec: str | Path, seed: int | None, vocab_size: int | None, notices: tuple[str, ...]
) -> Windows:
    """The tokens as windows, when their ids are checked, with what is recorded of them."""
    check_ids(tokens, spec, vocab_size)
    tokens = np.array(tokens, dtype=np.int32)
    for notice in notices:
        logger.info(notice)
    return Windows(tokens=tokens, source=str(spec), seed=seed, sha256=sha256(tokens), notices=notices)


def check_ids(
    tokens: Integer[np.ndarray, "n length"], spec: str | Path, vocab_size: int | None, first_window: int = 0
) -> None:
    """An error that names the first id outside the vocabulary; call it before a cast, which would wrap such an id."""
    limit = 2**31 if vocab_size is None else vocab_size
    # NumPy before 2.3 crashes where a slice is compared with a number that its dtype does not have.
    bad = np.argwhere((tokens < 0) | (tokens > min(limit - 1, np.iinfo(tokens.dtype).max)))
    if len(bad):
        row, column = bad[0]
        raise JpruneError(
            f"{spec}: token id {tokens[row, column]} at window {first_window + row}, position {column} is outside "
            f"[0, {limit}). Use token ids made with this model's own tokenizer."
        )


def window_length(length: int | None, context: int | None, source: sources.Source) -> tuple[int, tuple[str, ...]]:
    """The window length, and a notice when a default was cut to the model's context."""
    if length is not None:
        return checked_length(length, context), ()
    length = max(1, source.rows.shape[1]) if isinstance(source, sources.TokenRows) else DEFAULT_LENGTH
    if context is not None and context < length:
        return context, (f"The default sequence length of {length} is cut to the model's context of {context} tokens.",)
    return length, ()


def checked_length(length: int, context: int | None) -> int:
    """The length, if it is one and the model takes it."""
    check_count("sequence length", length)
    if context is not None and length > context:
        raise JpruneError(f"Sequence length {length} is more than the model's context of {context} tokens.")
    return length


def require_tokenizer(tokenizer: Tokenizer | None, spec: str | Path) -> Tokenizer:
    """The tokenizer, or an error that says what to do without one."""
    if tokenizer is None:
        raise JpruneError(
            f"{spec} is text, and the model comes without a tokenizer. Put its tokenizer.json beside the weights, "
            "or give token ids as a .npy of shape [n, length]."
        )
    return tokenizer


def check_count(what: str, value: int) -> None:
    """An error when a number that must be at least 1 is not."""
    if value < 1:
        raise JpruneError(f"The {what} must be at least 1; it is {value}.")

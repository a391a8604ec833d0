"""Batches to train on, by grain: a deterministic, shuffled and resumable stream of token windows.

Text is tokenised once. Each document is encoded as its tokenizer encodes a text (with a BOS where it adds one) and ends
with EOS; the documents follow each other in one row of tokens, which is cut into windows without overlap, so a window
may hold the end of one document and the beginning of the next. The tail that fills no window is dropped. A stream (see
`jprune.data.sources`) is one document; a `.npy` is windows already.

Every epoch is a new permutation of the windows, which follows from the seed and the number of the epoch alone. What
fills no batch at the end of an epoch is left out of it. The place in the stream is the number of batches taken, so
resuming costs nothing and gives exactly the batches that were left.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jprune.annotations import Int, Int32, Integer
from jprune.data import sources, windows
from jprune.data.stream import Batch, Stream, check_place
from jprune.data.windows import Spec, Tokenizer
from jprune.errors import JpruneError
from jprune.packages import require

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1024
"""Rows of a memory-mapped file that are checked in one go."""


@runtime_checkable
class Examples(Protocol):
    """Windows by their number. `sha256` is of everything in them."""

    length: int
    sha256: str

    def __len__(self) -> int: ...

    def take(self, indices: Int[np.ndarray, "b"]) -> Batch:
        """The windows of these numbers as one batch."""
        ...


class Rows:
    """Rows of token ids, every token of which but the first is learnt. A memory-mapped file stays on disk."""

    def __init__(self, rows: Integer[np.ndarray, "n length"], spec: str, vocab_size: int | None):
        digest = hashlib.sha256(f"int32[{rows.shape[0]},{rows.shape[1]}]".encode())  # as windows.sha256
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            windows.check_ids(chunk, spec, vocab_size, first_window=start)
            digest.update(np.ascontiguousarray(chunk, dtype="<i4").tobytes())
        self._rows = rows
        self.length = rows.shape[1]
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: Int[np.ndarray, "b"]) -> Batch:
        """The rows of these numbers; nothing predicts the first token of a row, so its weight is 0."""
        tokens = np.asarray(self._rows[indices], dtype=np.int32)
        weights = np.ones(tokens.shape, np.float32)
        weights[:, 0] = 0
        return {"tokens": tokens, "weights": weights}


@dataclass(frozen=True, kw_only=True)
class Batches(Stream):
    """A stream of batches; every `iter()` starts at its beginning.

    With `shuffle` (training) an epoch has `windows // batch_size` batches. Without it (evaluation) the windows come in
    their order, and the last batch is filled up with rows whose weights are 0.

    Attributes:
        examples: the windows.
        source: the spec they come from, as given.
        epochs: how often the windows are gone through; None for ever.
        shuffle: whether each epoch is a new permutation.
        notices: what the user should know about how they were made, one sentence each.

    Raises:
        JpruneError: fewer windows than one batch, or numbers that do not fit together.
    """

    examples: Examples
    source: str
    epochs: int | None = None
    shuffle: bool = True
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None:
            windows.check_count("number of epochs", self.epochs)
        if self.length < 2:
            raise JpruneError(f"{self.source}: windows of {self.length} token hold nothing to predict; give 2 or more.")
        needed = self.batch_size if self.shuffle else 1
        if self.windows < needed:
            tokens = self.windows * self.length
            raise JpruneError(
                f"{self.source}: too little to train on: it has {self.windows} windows of {self.length} tokens "
                f"({tokens} tokens), and one batch needs {needed} ({needed * self.length} tokens). Give more data, a "
                "smaller batch, or shorter windows."
            )

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return len(self.examples)

    @property
    def length(self) -> int:
        """Tokens a window."""
        return self.examples.length

    @property
    def sha256(self) -> str:
        """Hash of the windows: equal when, and only when, their tokens (and weights) are."""
        return self.examples.sha256

    @property
    def per_epoch(self) -> int:
        """Batches an epoch."""
        return self.windows // self.batch_size if self.shuffle else -(-self.windows // self.batch_size)

    @property
    def fingerprint(self) -> str:
        """Equal for streams that give the same global batches in the same order, however many processes share them."""
        order = [self.sha256, self.batch_size, self.seed if self.shuffle else None]
        return hashlib.sha256(json.dumps(order).encode()).hexdigest()

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def _take(self, indices: Int[np.ndarray, "b"]) -> Batch:
        """This process's rows of the global batch made of these windows."""
        mine, batch = np.asarray(indices)[self.mine], self.blank(self.length)
        if len(mine) == len(batch["tokens"]):
            return self.examples.take(mine)
        if len(mine):
            for name, rows in self.examples.take(mine).items():
                batch[name][: len(mine)] = rows
        return batch


class BatchIterator(Iterator[Batch]):
    """Goes through `Batches`; knows its place, and can be set to another one."""

    def __init__(self, batches: Batches):
        require("grain")
        import grain

        self._batches = batches
        numbers = grain.MapDataset.range(batches.windows)
        if batches.shuffle:
            numbers = numbers.shuffle(seed=batches.seed)
        numbers = numbers.batch(batches.batch_size, drop_remainder=batches.shuffle)
        # No threads: a batch is gathered in about a millisecond, while the device is busy with the one before.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(numbers.map(batches._take).repeat(batches.epochs).to_iter_dataset(options))

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The place in the stream, as something that JSON can hold."""
        return {"data": self._batches.fingerprint, "position": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a place that `get_state` gave, also of another process or another run.

        Raises:
            JpruneError: the place is in a stream of other data, another batch size or another seed.
        """
        check_place(state, fingerprint=self._batches.fingerprint, source=self._batches.source)
        self._iterator.set_state(state["position"])


def token_batches(
    spec: Spec,
    tokenizer: Tokenizer | None,
    *,
    batch_size: int,
    length: int | None = None,
    windows_at_most: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    context: int | None = None,
    eos_id: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Shuffled batches of the windows of a text, of its training (calibration) part.

    Args:
        spec: names the source, see `jprune.data.sources`; or token ids, treated as a `.npy` of them.
        tokenizer: needed for text; a `.npy` works without.
        batch_size: windows a batch, over all processes.
        length: tokens a window; by default 2048 cut to `context`, or what the rows of a `.npy` have.
        windows_at_most: the number of windows to take, from the first on; no more is tokenised than they need.
        epochs: how often to go through the windows; None for ever.
        seed: of the order, from 0 to 2**32 - 1.
        vocab_size: ids from here on are refused.
        context: the longest sequence that the model takes.
        eos_id: ends every document; None if the model has no such token.
        process_index: which of the equal parts of each batch this process gets, from 0.
        process_count: how many parts there are.

    Raises:
        JpruneError: a source that cannot be used, less of it than one batch, ids outside the vocabulary, or a length
            that the model does not take.
    """
    source, name = windows.read(spec, "calibration")
    length, notices = windows.window_length(length, context, source)
    notices += source.notices
    if windows_at_most is not None:
        windows.check_count("number of windows", windows_at_most)
    if isinstance(source, sources.TokenRows):
        if source.rows.shape[1] < length:
            raise JpruneError(f"{name}: its rows have {source.rows.shape[1]} token ids; {length} were asked for.")
        if source.rows.shape[1] > length:
            notices += (f"{name}: of each row of {source.rows.shape[1]} tokens the first {length} are used.",)
        rows = source.rows[:windows_at_most, :length]
    else:
        texts = [source.text] if isinstance(source, sources.Stream) else source.texts
        if eos_id is None and isinstance(source, sources.Documents):
            notices += (f"{name}: the model names no end-of-text token, so nothing marks where a document ends.",)
        wanted = None if windows_at_most is None else windows_at_most * length
        tokens = encode_documents(texts, windows.require_tokenizer(tokenizer, name), eos_id=eos_id, at_most=wanted)
        if len(tokens) < batch_size * length:
            raise JpruneError(
                f"{name}: too little text to train on: it has {len(tokens)} tokens, and one batch of {batch_size} "
                f"windows of {length} tokens needs {batch_size * length}. Give more text, a smaller batch, or shorter "
                "windows."
            )
        rows = tokens[: len(tokens) // length * length].reshape(-1, length)[:windows_at_most]
    for notice in notices:
        logger.info(notice)
    return Batches(
        examples=Rows(rows, str(name), vocab_size),
        source=str(name),
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        notices=notices,
    )


def encode_documents(
    texts: Sequence[str], tokenizer: Tokenizer, *, eos_id: int | None, at_most: int | None = None
) -> Int32[np.ndarray, "tokens"]:
    """The tokens of all texts, one after the other, each with the tokenizer's BOS and an EOS; empty texts are skipped.

    Stops after the text with which there are `at_most` tokens.
    """
    parts: list[np.ndarray] = []
    count = 0
    for text in texts:
        if not text:
            continue
        ids = np.array(tokenizer.encode(text, add_special_tokens=True), np.int32)
        if eos_id is not None and ids[-1:].tolist() != [eos_id]:
            ids = np.append(ids, np.int32(eos_id))
        parts.append(ids)
        count += len(ids)
        if at_most is not None and count >= at_most:
            break
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)

"""Random windows of tokens, drawn as the SparseGPT and Wanda programs draw them; every text is tokenised once.

Where the next window is drawn from depends on the length of the document drawn last, so lengths are needed on the way;
tokens are needed only where a window is cut. Lengths are kept of every document that was drawn, and tokens as far as
they fit `KEPT`; what did not fit is tokenised once more, when all windows are known. So time and memory grow with the
text, and not with the number of windows.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np

from jprune.annotations import Int32

Encode = Callable[[str], Sequence[int]]
"""The token ids of a text."""

KEPT = 2**26
"""Tokens of documents that are kept, of 4 bytes each."""


def from_documents(
    texts: Sequence[str], encode: Encode, samples: int, length: int, rng: random.Random, *, keep: int = KEPT
) -> Int32[np.ndarray, "n length"] | None:
    """Windows of random documents longer than the window (C4 calibration); None when there is no such document.

    Args:
        texts: the documents.
        encode: tokenises one; called once for each that is drawn, or twice if its tokens could not be kept.
        samples: number of windows.
        length: tokens a window.
        rng: gives a document (again while it is not longer than the window), then the offset in it.
        keep: tokens to keep of all documents together.
    """
    lengths: dict[int, int] = {}
    kept: dict[int, np.ndarray] = {}
    room = keep

    def length_of(index: int) -> int:
        nonlocal room
        if index not in lengths:
            ids = encode(texts[index])
            lengths[index] = len(ids)
            if length < len(ids) <= room:
                kept[index] = np.array(ids, np.int32)
                room -= len(ids)
        return lengths[index]

    # Without one long document the draws below would never end.
    if all(length_of(index) <= length for index in range(len(texts))):
        return None
    places: dict[int, list[tuple[int, int]]] = {}  # of the windows in each document: number and offset
    for number in range(samples):
        while length_of(index := rng.randint(0, len(texts) - 1)) <= length:
            pass
        places.setdefault(index, []).append((number, _offset(lengths[index], length, rng)))
    windows = np.empty((samples, length), np.int32)
    for index, own in places.items():
        ids = kept[index] if index in kept else np.array(encode(texts[index]), np.int32)
        for number, start in own:
            windows[number] = ids[start : start + length]
    return windows


def from_stream(
    ids: Int32[np.ndarray, "tokens"], samples: int, length: int, rng: random.Random
) -> Int32[np.ndarray, "n length"]:
    """Windows at random offsets of one tokenised text, which has more tokens than a window (WikiText-2 calibration)."""
    starts = [_offset(len(ids), length, rng) for _ in range(samples)]
    return np.stack([ids[start : start + length] for start in starts])


def _offset(tokens: int, length: int, rng: random.Random) -> int:
    """Where a window begins. As in the originals, the last possible offset is never drawn."""
    return rng.randint(0, tokens - length - 1)

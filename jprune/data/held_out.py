"""Whether a model is evaluated on text that it was trained on, found in the tokens themselves.

Sources with splits keep the two apart; local files do only if the user names two files that share nothing. Every run of
32 tokens in the training windows is hashed, and the runs of the evaluation windows are looked up.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jprune.annotations import Integer
from jprune.data.batches import Batches
from jprune.data.mixture import Mixture
from jprune.data.windows import Windows

RUN = 32
"""Tokens in a row that are no coincidence, about 25 words."""

WINDOWS_AT_ONCE = 1024


def beside(evaluation: Windows, *read: Windows | None) -> Windows:
    """Evaluation windows with the share of them that has text in common with what a run reads, and a notice of it.

    Args:
        evaluation: what a model is measured on.
        read: the windows that a method calibrates on, or reads the importance from; None where there are none.
    """
    known = [overlap(windows.tokens, evaluation.tokens) for windows in read if windows is not None]
    if not known:
        return evaluation
    share = max(known)
    told = (overlap_notice(share),) if share else ()
    return dataclasses.replace(evaluation, overlap=share, notices=(*evaluation.notices, *told))


def overlap_notice(share: float) -> str:
    """What is to be known of numbers on windows of which a share was calibrated on."""
    return (
        f"{100 * share:.3g} % of the evaluation windows share text with the calibration windows: what is measured on "
        "these is no evidence for other text"
    )


def overlap(
    training: Batches | Mixture | Integer[np.ndarray, "m other"], evaluation: Batches | Integer[np.ndarray, "n length"]
) -> float:
    """The share of the evaluation windows, from 0 to 1, that have a run of 32 tokens in common with a training window.

    Windows of token ids may be given as arrays.

    Windows that are shorter than 32 tokens have no such runs, and so no overlap.
    """
    tokens = evaluation if isinstance(evaluation, np.ndarray) else _tokens(evaluation, 0, evaluation.windows)
    length = training.shape[1] if isinstance(training, np.ndarray) else training.length
    if tokens.shape[1] < RUN or length < RUN:
        return 0.0
    wanted = _hashes(tokens)
    found = np.zeros(wanted.shape, bool)
    for chunk in _chunks(training):
        found |= np.isin(wanted, _hashes(chunk))
    # Runs of one token over and over are padding, or say nothing.
    runs = np.lib.stride_tricks.sliding_window_view(tokens, RUN, axis=1)
    found &= (runs != runs[..., :1]).any(-1)
    return float(found.any(axis=1).mean())


def _chunks(training: Batches | Mixture | np.ndarray) -> Iterator[np.ndarray]:
    """The tokens of all windows, some at a time."""
    if isinstance(training, np.ndarray):
        yield from np.split(training, range(WINDOWS_AT_ONCE, len(training), WINDOWS_AT_ONCE))
        return
    for part in training.domains.values() if isinstance(training, Mixture) else [training]:
        for start in range(0, part.windows, WINDOWS_AT_ONCE):
            yield _tokens(part, start, min(start + WINDOWS_AT_ONCE, part.windows))


def _tokens(batches: Batches, start: int, stop: int) -> np.ndarray:
    return batches.examples.take(np.arange(start, stop))["tokens"]


def _hashes(tokens: Integer[np.ndarray, "n length"]) -> np.ndarray:
    """A 64-bit hash of every run of `RUN` tokens, [n, length - RUN + 1]: of two halves, as often as it takes."""
    hashes = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(29)
    width = 1
    while width < RUN:
        # Multiplied by another odd number at each level, so that the order of the halves counts.
        factor = np.uint64(0xBF58476D1CE4E5B9 + 2 * width)
        hashes = hashes[:, :-width] * factor + hashes[:, width:]
        hashes ^= hashes >> np.uint64(31)
        width *= 2
    return hashes

"""Calibration windows of several sources by weight: a model that is used for several things is pruned on all of them.

Of n windows each source gives its share, rounded so that they sum to n (the largest remainders are rounded up). Each is
drawn as it would be alone, with the same seed; then they are laid out so that the first windows, which some steps of a
run are content with, have about the same shares as all.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jprune.data import windows
from jprune.data.mixture import normalised
from jprune.data.windows import Spec, Windows
from jprune.errors import JpruneError


def blend(
    given: Mapping[str, Spec],
    proportions: Mapping[str, int | float] | None,
    samples: int,
    draw: Callable[[Spec, int], Windows],
) -> Windows:
    """The windows of all sources.

    Args:
        given: sources by name.
        proportions: their weights, one for each; they need not sum to 1. By default all weigh the same.
        samples: number of windows.
        draw: gives so many windows of a source, all of one length.

    Raises:
        JpruneError: proportions that are not those of the sources, windows of different lengths, or so few windows that
            a source has none.
    """
    windows.check_count("number of samples", samples)
    weights = dict.fromkeys(given, 1) if proportions is None else proportions
    weights = normalised(weights, given, what="`calibration_proportions`")
    counts = shares(weights, samples)
    if none := [name for name, count in counts.items() if weights[name] > 0 and not count]:
        raise JpruneError(
            f"of {samples} calibration windows there is none for {', '.join(none)}; give more `samples`, or another "
            "proportion"
        )
    parts = {name: draw(spec, counts[name]) for name, spec in given.items() if counts[name]}
    lengths = {name: part.tokens.shape[1] for name, part in parts.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{length} ({name})" for name, length in lengths.items())
        raise JpruneError(f"calibration windows must have one length, and have {found} tokens; give `sequence_length`")
    places = [((number + 0.5) / counts[name], name, number) for name in parts for number in range(counts[name])]
    order = sorted(places, key=lambda place: place[0])
    tokens = np.stack([parts[name].tokens[number] for _, name, number in order])
    return Windows(
        tokens=tokens,
        source=named(given) or "an array of token ids",
        seed=next((part.seed for part in parts.values() if part.seed is not None), None),
        sha256=windows.sha256(tokens),
        notices=tuple(dict.fromkeys(notice for part in parts.values() for notice in part.notices)),
        parts={name: {**part.described(), "proportion": weights[name]} for name, part in parts.items()},
    )


def named(given: Spec | Mapping[str, Spec]) -> str | None:
    """A source, or sources by name, in one word; None where token ids are given themselves."""
    every = list(given.values()) if isinstance(given, Mapping) else [given]
    if not all(isinstance(spec, str | Path) for spec in every):
        return None
    return ",".join(f"{name}={spec}" for name, spec in given.items()) if isinstance(given, Mapping) else str(given)


def shares(weights: Mapping[str, float], samples: int) -> dict[str, int]:
    """Whole numbers that sum to `samples`, nearest to its parts by weights that sum to 1."""
    exact = {name: weight * samples for name, weight in weights.items()}
    counts = {name: math.floor(x) for name, x in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: samples - sum(counts.values())]:
        counts[name] += 1
    return counts

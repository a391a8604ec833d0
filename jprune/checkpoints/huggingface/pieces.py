"""Long texts, tokenised a piece at a time: the tokens of the whole text, in the memory that a piece takes.

Pieces overlap. What a tokenizer makes of the ends of a piece depends on where it was cut; further in it does not, and
there the tokens of two pieces are the same, at the same places of the text. They are put together where they are, for
`AGREED` tokens to both sides. A text in which there is no such place (a million times the same letter, say) is left to
whoever has the memory to tokenise it whole.
"""

from array import array
from collections.abc import Callable, Sequence

PIECE = 2**20
"""Characters of a piece. The libraries take a few hundred bytes for each while they tokenise it."""
OVERLAP = 2**13
AGREED = 24
"""Tokens before and after a seam that are equal in both pieces."""

Spans = Sequence[tuple[int, int]]
"""Where in the text each token begins and ends."""
Tokenise = Callable[[str], tuple[Sequence[int], Spans]]
"""Token ids of a text, without special tokens, and their spans."""


def encode(tokenise: Tokenise, text: str) -> array | None:
    """The ids of a text, as `tokenise` gives them for all of it; None if two pieces do not agree anywhere."""
    whole = array("i")
    at = 0
    ids, spans = tokenise(text[:PIECE])
    while at + PIECE < len(text):
        later = at + PIECE - OVERLAP
        more, places = tokenise(text[later : later + PIECE])
        seam = _seam(ids, spans, later - at, more, places)
        if seam is None:
            return None
        whole.extend(ids[: seam[0]])
        ids, spans, at = more[seam[1] :], places[seam[1] :], later
    whole.extend(ids)
    return whole


def around(with_special: Sequence[int], without: Sequence[int]) -> tuple[Sequence[int], Sequence[int]] | None:
    """The special tokens before and after a text, from the ids of some text with and without them; None if unclear."""
    if not without:  # they could all stand before, or after
        return None
    for before in range(len(with_special) - len(without) + 1):
        if list(with_special[before : before + len(without)]) == list(without):
            return with_special[:before], with_special[before + len(without) :]
    return None


def _seam(ids: Sequence[int], spans: Spans, shift: int, more: Sequence[int], places: Spans) -> tuple[int, int] | None:
    """The numbers of a token of one piece and of the next that are the same one, of a text that both have.

    `shift` is where the next piece begins in the one.
    """
    begins = {span[0]: number for number, span in enumerate(spans) if span[0] >= shift}
    for there in range(AGREED, len(places) - AGREED):
        if places[there][0] > OVERLAP * 3 // 4:
            return None
        here = begins.get(places[there][0] + shift)
        if here is None or here < AGREED or here + AGREED > len(ids) or places[there][0] < OVERLAP // 4:
            continue
        near = range(-AGREED, AGREED)
        if all(ids[here + i] == more[there + i] for i in near) and all(
            spans[here + i] == (places[there + i][0] + shift, places[there + i][1] + shift) for i in near
        ):
            return here, there
    return None

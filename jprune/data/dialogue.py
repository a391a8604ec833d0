"""Windows of instruction data, as a model that answers sees it: whole conversations in its chat template.

To calibrate on, each window begins with a conversation, drawn without repetition, and goes on with the next ones until
it is full; what does not fit of the last is left out. So no window begins in the middle of a turn, as windows of a text
begin anywhere, and none is padded. To measure on, the conversations stand one after the other, cut into windows.
"""

import random
from collections.abc import Iterable

import numpy as np

from jprune.data import instructions, windows
from jprune.data.instructions import Format
from jprune.data.records import Record
from jprune.data.windows import Windows
from jprune.errors import JpruneError


def calibration(records: Iterable[Record], source: str, form: Format, *, samples: int, seed: int) -> Windows:
    """Windows to calibrate on.

    Args:
        records: of instructions (`jprune.data.instructions`).
        source: what they are called.
        form: how they become tokens; its length is that of a window.
        samples: number of windows.
        seed: of the order of the conversations.

    Raises:
        JpruneError: a record that is none of instructions, or too few of them.
    """
    windows.check_count("number of samples", samples)
    known = list(records)
    random.Random(seed).shuffle(known)
    found: list[list[int]] = []
    own: list[int] = []
    for record in known:
        own += instructions.encode(record, form)[0].tolist()
        if len(own) >= form.length:
            found.append(own[: form.length])
            own = []
        if len(found) == samples:
            return windows.made(np.array(found), source, seed, form.vocab_size, ())
    raise JpruneError(
        f"{source}: too little text for calibration: its {len(known)} conversations fill {len(found)} windows of "
        f"{form.length} tokens, and {samples} were asked for. Give more of them, fewer `samples`, or shorter windows "
        "(`sequence_length`)."
    )


def evaluation(records: Iterable[Record], source: str, form: Format, *, count: int | None) -> Windows:
    """Windows to measure on: the first `count`, by default all; arguments and errors are those of `calibration`."""
    tokens: list[int] = []
    for record in records:
        tokens += instructions.encode(record, form)[0].tolist()
        if count is not None and len(tokens) >= count * form.length:
            break
    available = len(tokens) // form.length
    wanted = max(1, available) if count is None else count
    windows.check_count("number of windows", wanted)
    if available < wanted:
        raise JpruneError(
            f"{source}: too little text for evaluation: its conversations have {len(tokens)} tokens, and {wanted} "
            f"window(s) of {form.length} tokens need {wanted * form.length}. Give more of them, fewer windows, or "
            "shorter ones (`sequence_length`)."
        )
    cut = np.array(tokens[: wanted * form.length]).reshape(wanted, form.length)
    return windows.made(cut, source, None, form.vocab_size, ())

"""Sizes of windows that a model suggests."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suggested:
    """Sizes of windows to work on a model with where the user asks for none; None where the usual ones serve."""

    samples: int | None = None
    """Calibration windows."""
    length: int | None = None
    """Tokens of a calibration window."""
    evaluation_length: int | None = None
    """Tokens of an evaluation window."""
    evaluation_windows: int | None = None
    """Evaluation windows of that length, from the beginning of a text."""
    training_length: int | None = None
    """Tokens of a training window."""


USUAL = Suggested()
# A quarter of the tokens of the published results; what it costs is in docs/prune-a-model.md.
DEMO = Suggested(samples=16, length=512, evaluation_length=512, evaluation_windows=10, training_length=256)

"""Token windows of a checkpoint: its tokenizer, vocabulary and context, and the sizes that it suggests."""

from jprune.checkpoints import Checkpoint
from jprune.data import windows


def calibration_shape(
    checkpoint: Checkpoint, source: windows.Spec, *, samples: int | None = None, length: int | None = None
) -> tuple[int, int]:
    """Calibration windows and tokens in each, with the defaults filled in; no text is read."""
    if windows.is_rows(source):
        rows, row_length = calibration_windows(checkpoint, source, samples=samples, length=length).tokens.shape
        return rows, row_length
    samples = checkpoint.suggested.samples if samples is None else samples
    length = checkpoint.suggested.length if length is None else length
    return (
        windows.DEFAULT_SAMPLES if samples is None else samples,
        min(windows.DEFAULT_LENGTH, checkpoint.model.context) if length is None else length,
    )


def calibration_windows(
    checkpoint: Checkpoint,
    source: windows.Spec,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
) -> windows.Windows:
    """The windows to calibrate a checkpoint on.

    Args:
        checkpoint: the model.
        source: calibration text, see `jprune.data.sources`; or token windows [n, length].
        samples: number of windows; by default what the checkpoint suggests, else 128 (of rows of tokens, all).
        length: tokens a window; by default what the checkpoint suggests, else 2048 cut to its context (of rows of
            tokens, their own).
        seed: of the draws.

    Raises:
        JpruneError: as `jprune.data.windows.calibration`.
    """
    suggested = checkpoint.suggested
    text = not windows.is_rows(source)
    return windows.calibration(
        source,
        checkpoint.tokenizer,
        samples=suggested.samples if samples is None and text else samples,
        length=suggested.length if length is None and text else length,
        seed=seed,
        vocab_size=checkpoint.model.vocab,
        context=checkpoint.model.context,
    )


def evaluation_windows(
    checkpoint: Checkpoint, source: windows.Spec, *, length: int | None = None, count: int | None = None
) -> windows.Windows:
    """The windows to measure a checkpoint on: the first `count` of `length` tokens.

    Both are by default those of `jprune.data.windows.evaluation`, whatever the checkpoint suggests: a run asks for
    what is suggested, while a measurement by itself has the usual length.
    """
    return windows.evaluation(
        source,
        checkpoint.tokenizer,
        length=length,
        windows=count,
        vocab_size=checkpoint.model.vocab,
        context=checkpoint.model.context,
    )

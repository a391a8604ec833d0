"""Token windows of a checkpoint: its tokenizer, vocabulary and context, and the sizes that it suggests."""

from collections.abc import Mapping

from jprune.checkpoints import Checkpoint
from jprune.data import dialogue, windows
from jprune.data.blend import blend
from jprune.data.training import form_of, records_of
from jprune.errors import JpruneError

Sources = windows.Spec | Mapping[str, windows.Spec]
"""One source, or several by name."""


def calibration_shape(
    checkpoint: Checkpoint, source: Sources, *, samples: int | None = None, length: int | None = None
) -> tuple[int, int]:
    """Calibration windows and tokens in each, with the defaults filled in; no text is read."""
    if not isinstance(source, Mapping) and windows.is_rows(source):
        rows, row_length = calibration_windows(checkpoint, source, samples=samples, length=length).tokens.shape
        return rows, row_length
    rows = [spec for spec in source.values() if windows.is_rows(spec)] if isinstance(source, Mapping) else []
    if rows and length is None:  # they have a length of their own, and the others are cut to it
        _, length = calibration_shape(checkpoint, rows[0])
    samples = checkpoint.suggested.samples if samples is None else samples
    length = checkpoint.suggested.length if length is None else length
    return (
        windows.DEFAULT_SAMPLES if samples is None else samples,
        min(windows.DEFAULT_LENGTH, checkpoint.model.context) if length is None else length,
    )


def calibration_windows(
    checkpoint: Checkpoint,
    source: Sources,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    proportions: Mapping[str, int | float] | None = None,
) -> windows.Windows:
    """The windows to calibrate a checkpoint on.

    Args:
        checkpoint: the model.
        source: calibration text, see `jprune.data.sources`; or token windows [n, length]. Records of instructions are
            put into the model's chat template (`jprune.data.dialogue`). Or several of these by name
            (`jprune.data.blend`).
        samples: number of windows; by default what the checkpoint suggests, else 128 (of rows of tokens, all).
        length: tokens a window; by default what the checkpoint suggests, else 2048 cut to its context (of rows of
            tokens, their own).
        seed: of the draws.
        proportions: weights of the sources by name; by default they are equal.

    Raises:
        JpruneError: as `jprune.data.windows.calibration`; proportions of one source alone, or not of those there are.
    """
    if isinstance(source, Mapping):
        count, each = calibration_shape(checkpoint, source, samples=samples, length=length)
        return blend(source, proportions, count, lambda spec, n: _drawn(checkpoint, spec, n, each, seed))
    if proportions is not None and not isinstance(source, windows.Windows):
        raise JpruneError(f"`calibration_proportions` are of sources by name (NAME=SOURCE,...); {source} is one alone")
    return _drawn(checkpoint, source, samples, length, seed)


def _drawn(
    checkpoint: Checkpoint, source: windows.Spec, samples: int | None, length: int | None, seed: int
) -> windows.Windows:
    """The windows of one source."""
    suggested = checkpoint.suggested
    text = not windows.is_rows(source)
    if text and (found := records_of(source, "calibration")) is not None:
        count, each = calibration_shape(checkpoint, source, samples=samples, length=length)
        form = form_of(checkpoint, str(source), windows.checked_length(each, checkpoint.model.context))
        return dialogue.calibration(found[0], str(source), form, samples=count, seed=seed)
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
    what is suggested, while a measurement by itself has the usual length. Instructions are put into the chat template.
    """
    if not windows.is_rows(source) and (found := records_of(source, "evaluation")) is not None:
        context = checkpoint.model.context
        each = min(windows.DEFAULT_LENGTH, context) if length is None else windows.checked_length(length, context)
        return dialogue.evaluation(found[0], str(source), form_of(checkpoint, str(source), each), count=count)
    return windows.evaluation(
        source,
        checkpoint.tokenizer,
        length=length,
        windows=count,
        vocab_size=checkpoint.model.vocab,
        context=checkpoint.model.context,
    )

"""What a structured run is to do, as one object, and what its record says of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.typing import DTypeLike

from jprune.checkpoints import Checkpoint
from jprune.checkpoints.formats import Format
from jprune.data import windows
from jprune.data.for_model import calibration_windows
from jprune.pipeline.options import CalibrationText
from jprune.pipeline.registry import name_of
from jprune.pipeline.shrink.report import ShrinkReport
from jprune.runs.report import environment
from jprune.structured.base import UnitMethod
from jprune.structured.selection import Target


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """A model, what is to go of it, and the texts that are needed for it."""

    checkpoint: Checkpoint
    method: UnitMethod
    target: Target | None
    dtype: DTypeLike
    """Of the activations."""
    format: Format | None
    """Of the result; None for that of its sizes."""
    examples: windows.Windows | None
    """The texts that importance is read from; None for methods that read only weights."""
    evaluation: windows.Windows | None

    def format_of(self, smaller: Checkpoint) -> Format:
        """The format of the result."""
        return self.format or format_of(smaller)

    def fingerprint(self) -> dict[str, Any]:
        """What the result depends on beside the model and the versions, by the name that a message gives it."""
        return {
            "the method": {"name": name_of(self.method), **self.method.described()},
            "the target": self.target.described() if self.target else None,
            "the texts of the importance": self.examples.sha256 if self.examples else None,
            "--format": self.format,
        }

    def contents(self, report: ShrinkReport, format: Format, source: str | None) -> dict[str, Any]:
        """jprune.json: what was asked for and what came out; `source` is that of all texts, None if none was read."""
        examples, evaluation = self.examples, self.evaluation
        recipe = {**self.method.described(), **(self.target.described() if self.target else {})}
        return {
            "model": self.checkpoint.described(),
            "format": format,
            **environment(self.dtype),
            **report.json(),
            "recipe": {"method": name_of(self.method), **recipe, "calibration": source},
            "calibration": examples and examples.described(),
            "evaluation": evaluation and evaluation.described(),
            "notices": list(report.notices),
        }


def format_of(smaller: Checkpoint) -> Format:
    """The format that the sizes of a model ask for."""
    return "hf" if smaller.config.uniform else "jprune"


def examples(checkpoint: Checkpoint, method: UnitMethod, text: CalibrationText) -> windows.Windows | None:
    """The texts that importance is read from; None for methods that read only weights."""
    if method.needs in ("nothing", "weights"):
        return None
    source = text.calibration
    rows = not isinstance(source, Mapping) and windows.is_rows(source)
    return calibration_windows(
        checkpoint,
        source,
        samples=None if rows else method.examples,
        length=None if rows else min(method.sequence_length, checkpoint.config.context),
        seed=method.seed,
        proportions=text.calibration_proportions,
    )

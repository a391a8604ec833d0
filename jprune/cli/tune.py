"""`jprune tune METHOD`, and what all commands have that train."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from jprune.cli import display
from jprune.cli.command import ByRecipe, Told
from jprune.cli.flags import Flags, keywords
from jprune.cli.words import EVALUATE_DOMAINS
from jprune.errors import UsageError
from jprune.pipeline.options import DynamicLoading, Evaluation, Result, Schedule, TrainingData
from jprune.pipeline.training import tune_model
from jprune.train.shearing.dynamic_loading import Reweighing
from jprune.tuning import TrainedMethod
from jprune.tuning.report import TuneReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(ByRecipe):
    """What all commands have that train."""

    method: TrainedMethod
    data: Annotated[TrainingData, Flags(without=("dynamic_loading",))]
    dynamic_loading: bool = False
    """Draw more from domains whose losses lag behind their references, as LLM-Shearing does."""
    references: Annotated[Mapping[str, Any], Flags(of=DynamicLoading, without=("reweighing",))]
    reweighing: Annotated[Reweighing, Flags(prefix="loading_")]
    evaluation: Annotated[Evaluation, Flags(words={"evaluate": EVALUATE_DOMAINS})]
    schedule: Schedule
    result: Result

    def options(self) -> dict[str, Any]:
        """The options by their names in Python.

        Raises:
          UsageError: no data, or words that do not fit together.
        """
        if not self.data.data:
            raise UsageError("give --data SOURCE, or --data NAME=SOURCE for each of several domains")
        given = keywords(self, "data", "evaluation", "schedule", "result")
        return {**given, "dynamic_loading": self._loading()}

    def _loading(self) -> DynamicLoading | None:
        if self.dynamic_loading:
            return DynamicLoading(**self.references, reweighing=self.reweighing)
        if any(value is not None for value in self.references.values()) or self.reweighing != Reweighing():
            raise UsageError("--reference-loss, --reference and --loading-... need --dynamic-loading")
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tune(Training):
    """Tune a pruned model."""

    out: Path
    """Folder of the result; it appears when everything is done."""

    def run(self) -> Told:
        """Tunes."""
        with display.progress() as progress:
            report = tune_model(self.model, self.out, method=self.method, progress=progress, **self.options())
        return self.told(report, self.evaluation, functools.partial(print_report, report))


def print_report(report: TuneReport, *own: str) -> None:
    """Prints how a training run went, and at the end some lines of its own."""
    display.report(report, _learnt(report), _domains(report))
    for line in own:
        print(line)


def _learnt(report: TuneReport) -> Iterator[str]:
    share = 100 * report.trainable_parameters / report.parameters
    yield f"{report.method}: {report.trainable_parameters:,} parameters trained ({share:.2f} % of the model's)"
    speed = f", {report.tokens_per_second:,.0f} tokens/s" if report.tokens_per_second else ""
    yield f"{report.steps} steps: loss {report.losses[0]:.4f} to {report.losses[-1]:.4f}{speed}"
    if report.best_step != report.steps:
        yield f"the result is the state after step {report.best_step}, the best on the evaluation data"


def _domains(report: TuneReport) -> Iterator[str]:
    for name, domain in report.domains.items():
        weight, loss, wanted = domain["weight"], domain["loss"], domain["reference_loss"]
        yield (
            f"{name}: loss {loss['first']:.4f} to {loss['last']:.4f}"
            + ("" if wanted is None else f" (reference {wanted:.4f})")
            + f", weight {weight['first']:.4f} to {weight['last']:.4f}, {domain['epochs']:.2f} epochs"
        )

"""`jprune tune lora` and `jprune tune full`, and the options of all training; `main` adds those of each way."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from jprune.checkpoints.formats import Format
from jprune.cli import display
from jprune.cli.command import Command
from jprune.cli.training_data import TrainingData
from jprune.pipeline.training.run import TuneReport
from jprune.pipeline.training.tune import tune_model
from jprune.tuning.recovery import Full, Lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRun(TrainingData, Command):
    """What all commands that train have."""

    checkpoint_every: int | None = None
    """Keep the state of the run every so many steps. By default after each tenth."""
    format: Format | None = None
    """Of the result. By default hf, or jprune where layers differ in size."""
    fsdp: int = 1
    """Cut parameters and optimizer state up over so many devices; the other devices share out the data."""
    resume: bool = False
    """Go on with the run in OUT.run, if there is one."""
    overwrite: bool = False
    """Replace --out if an earlier run wrote it, and forget an unfinished one."""
    recipe: Path | None = None
    """TOML or JSON file with options, or the jprune.json of an earlier run (whose data is not in it); the command line
    counts more."""

    def options(self) -> dict[str, Any]:
        """These and those of the data, by their names in Python."""
        return {
            **self.training_data(),
            "evaluate_every": self.evaluate_every,
            "checkpoint_every": self.checkpoint_every,
            "format": self.format,
            "fsdp": self.fsdp,
            "resume": self.resume,
            "overwrite": self.overwrite,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tune(TrainingRun):
    """Tune a pruned model."""

    method: Lora | Full
    out: Path
    """Folder of the result; it appears when everything is done. The state of the run is kept beside it, in OUT.run."""

    def run(self) -> dict[str, Any]:
        """Tunes."""
        with display.progress() as progress:
            report = tune_model(self.model, self.out, method=self.method, progress=progress, **self.options())
        print_report(report, json=self.json)
        return report.json()


def print_report(report: TuneReport, *, json: bool) -> None:
    """What the user should know to stderr; to stdout how it went, unless that is for JSON."""
    for notice in report.notices:
        print(notice, file=sys.stderr)
    if json:
        return
    share = 100 * report.trainable_parameters / report.parameters
    print(f"{report.method}: {report.trainable_parameters:,} parameters trained ({share:.2f} % of the model's)")
    speed = f", {report.tokens_per_second:,.0f} tokens/s" if report.tokens_per_second else ""
    print(f"{report.steps} steps: loss {report.losses[0]:.4f} to {report.losses[-1]:.4f}{speed}")
    if report.best_step != report.steps:
        print(f"the result is the state after step {report.best_step}, the best on the evaluation data")
    if report.before and report.after:
        after = report.after
        print(
            f"perplexity ({after.windows} windows of {after.sequence_length} tokens): "
            f"{report.before.value:.3f} before, {after.value:.3f} after"
        )
    for name, domain in report.domains.items():
        weight, loss, wanted = domain["weight"], domain["loss"], domain["reference_loss"]
        print(
            f"{name}: loss {loss['first']:.4f} to {loss['last']:.4f}"
            + ("" if wanted is None else f" (reference {wanted:.4f})")
            + f", weight {weight['first']:.4f} to {weight['last']:.4f}, {domain['epochs']:.2f} epochs"
        )
    parts = ", ".join(
        f"{name} {value:.1f}" for name, value in report.seconds.items() if name != "total" and value >= 0.05
    )
    print(f"{report.seconds['total']:.1f} s ({parts}); peak memory {report.peak_memory_bytes / 1e9:.2f} GB")
    print(f"written to {report.out}")

"""`jprune tune lora` and `jprune tune full`: the options of a run, whatever the way; `main` adds the way's own."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from jprune.checkpoints.formats import Format
from jprune.cli import display
from jprune.cli.command import Command
from jprune.pipeline.recovery import Full, Lora
from jprune.pipeline.tune import TuneReport, tune_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tune(Command):
    """Tune a pruned model."""

    method: Lora | Full
    data: str
    """Training data: pydoc, a text file, .jsonl, .jsonl.gz, .parquet (text, or records of instructions), .npy of token
    ids, or hf:DATASET."""
    out: Path
    """Folder of the result; it appears when everything is done. The state of the run is kept beside it, in OUT.run."""
    sequence_length: int | None = None
    """Tokens a window. By default 2048 for text and 256 for instructions, or the model's context (256 for the demo
    model)."""
    windows: int | None = None
    """Take only the first so many windows or records of the data."""
    train_on_prompt: bool = False
    """Of instructions, learn the prompts too."""
    evaluate: str | None = None
    """Text whose perplexity is measured before and after, or instructions, named as for --data."""
    evaluate_length: int | None = None
    """Tokens a window of it. By default 2048 or the model's context (512 for the demo model)."""
    evaluate_windows: int | None = None
    """Take only the first so many windows of it."""
    evaluate_every: int | None = None
    """Measure its loss every so many steps; the best state becomes the result."""
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

    def run(self) -> dict[str, Any]:
        """Tunes."""
        with display.progress() as progress:
            report = tune_model(
                self.model,
                self.out,
                method=self.method,
                data=self.data,
                sequence_length=self.sequence_length,
                windows_at_most=self.windows,
                train_on_prompt=self.train_on_prompt,
                evaluate=self.evaluate,
                evaluate_length=self.evaluate_length,
                evaluate_windows=self.evaluate_windows,
                evaluate_every=self.evaluate_every,
                checkpoint_every=self.checkpoint_every,
                format=self.format,
                fsdp=self.fsdp,
                resume=self.resume,
                overwrite=self.overwrite,
                progress=progress,
            )
        for notice in report.notices:
            print(notice, file=sys.stderr)
        if not self.json:
            _print_report(report)
        return report.json()


def _print_report(report: TuneReport) -> None:
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
    parts = ", ".join(
        f"{name} {value:.1f}" for name, value in report.seconds.items() if name != "total" and value >= 0.05
    )
    print(f"{report.seconds['total']:.1f} s ({parts}); peak memory {report.peak_memory_bytes / 1e9:.2f} GB")
    print(f"written to {report.out}")

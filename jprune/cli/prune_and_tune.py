"""`jprune prune prune-and-tune`: the options of all rounds; `main` adds those of the pruner and of the tuning."""

import dataclasses
import sys
from typing import Any, Literal

import tyro

from jprune.checkpoints.formats import Format
from jprune.cli import display
from jprune.cli.command import Command
from jprune.cli.pruning import Pruning
from jprune.errors import UsageError
from jprune.methods import Method
from jprune.pipeline.rounds.plan import PruneAndTunePlan, plan_prune_and_tune
from jprune.pipeline.rounds.run import prune_and_tune
from jprune.pipeline.rounds.schedule import PruneAndTuneReport
from jprune.tuning.recovery import Full, Lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneAndTune(Pruning, Command):
    """Prune in rounds, and train what is left after each (Syed, Guo and Sundarapandiyan 2023)."""

    pruner_options: Method
    tuning_options: Full | Lora
    sparsity: float
    """Share of zeros after the last round, in [0, 1)."""
    data: str | None = None
    """Training data: pydoc, a text file, .jsonl, .jsonl.gz, .parquet (text, or records of instructions), .npy of token
    ids, or hf:DATASET."""
    rounds: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Sparsities of the rounds, such as 0.3,0.5,0.7; the last is --sparsity, and at 0 nothing is pruned. By default
    0,0.1,0.3,0.5,0.7,0.8 as far as they go."""
    pruner: Literal["sparsegpt", "wanda", "magnitude"] = "sparsegpt"
    """How a round prunes; its own options go with it."""
    tuning: Literal["full", "lora"] = "full"
    """What a round trains: all weights that are left, or adapters that are merged; its own options go with it. --steps
    are those of one round, 100 by default."""
    tune_length: int | None = None
    """Tokens of a training window. By default 2048 for text and 256 for instructions, or the model's context (256 for
    the demo model)."""
    windows: int | None = None
    """Take only the first so many windows or records of the training data."""
    evaluate: str | None = None
    """Text whose perplexity is measured before, and in each round after pruning and after training."""
    evaluate_length: int | None = None
    """Tokens a window of it. By default 2048 or the model's context (512 for the demo model)."""
    evaluate_windows: int | None = None
    """Take only the first so many windows of it."""
    checkpoint_every: int | None = None
    """Keep the state of the training every so many steps. By default after each tenth."""
    format: Format = "hf"
    """Of the result: hf, jprune, decilm or orbax."""
    keep_rounds: bool = False
    """Keep the model of every round, in OUT/rounds."""
    fsdp: int = 1
    """Cut parameters and optimizer state up over so many devices; the other devices share out the data."""

    def run(self) -> dict[str, Any]:
        """Does all rounds, or prints the plan."""
        options: dict[str, Any] = {
            **self.pruning(),
            "sparsity": self.sparsity,
            "rounds": self._rounds(),
            "method": self.pruner_options,
            "per": self.per,
            "tuning": self.tuning_options,
            "tune_length": self.tune_length,
            "seed": self.tuning_options.seed,
        }
        if self.plan:
            return self._show_plan(plan_prune_and_tune(self.model, out=self.out or ".", **options))
        if self.out is None or self.data is None:
            raise UsageError("give --out DIR for the result and --data SOURCE to train on (or --plan)")
        with display.progress() as progress:
            report = prune_and_tune(
                self.model,
                self.out,
                data=self.data,
                windows_at_most=self.windows,
                checkpoint_every=self.checkpoint_every,
                evaluate=self.evaluate,
                evaluate_length=self.evaluate_length,
                evaluate_windows=self.evaluate_windows,
                format=self.format,
                fsdp=self.fsdp,
                keep_rounds=self.keep_rounds,
                resume=self.resume,
                overwrite=self.overwrite,
                progress=progress,
                **options,
            )
        for notice in report.notices:
            print(notice, file=sys.stderr)
        if not self.json:
            _print_report(report)
        return report.json()

    def _rounds(self) -> tuple[float, ...] | None:
        parts = [part.strip() for text in self.rounds for part in text.split(",")]
        try:
            return tuple(map(float, parts)) or None
        except ValueError:
            raise UsageError(f"--rounds {','.join(parts)} are not sparsities, such as 0.3,0.5,0.7") from None

    def _show_plan(self, plan: PruneAndTunePlan) -> dict[str, Any]:
        if not self.json:
            size = sum(kernel.size for kernel in plan.pruning.kernels)
            display.table(
                ["round", "zeros", "of prunable %", "prune s", "steps", "tokens", "tune TFLOP", "tune s"],
                [
                    (
                        number,
                        zeros,
                        f"{100 * zeros / size:.2f}",
                        f"{plan.pruning.seconds:.0f}" if sparsity else "-",
                        plan.tuning_steps,
                        plan.tuning_tokens,
                        f"{plan.tuning_flops / 1e12:.3g}",
                        f"{plan.tuning_seconds:.0f}",
                    )
                    for number, (sparsity, zeros) in enumerate(zip(plan.sparsities, plan.zeros, strict=True), start=1)
                ],
            )
            print(f"\nabout {plan.seconds:.0f} s at what was just measured here, without compiling and evaluating")
            print(f"run folder: up to {plan.disk_bytes / 1e9:.2g} GB, beside the result")
            print("nothing was touched")
        names = ("sparsities", "zeros", "tuning_steps", "tuning_tokens", "tuning_flops", "tuning_seconds", "disk_bytes")
        told = {name: getattr(plan, name) for name in names}
        return {"method": "prune-and-tune", **told, "pruning_seconds": plan.pruning.seconds, "seconds": plan.seconds}


def _print_report(report: PruneAndTuneReport) -> None:
    measured = report.before is not None

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    perplexities = ["pruned", "tuned"] if measured else []
    display.table(
        ["round", "sparsity %", "zeros", "prune s", "tune s", "first loss", "last loss", *perplexities],
        [
            (
                number,
                f"{100 * each.sparsity:g}",
                each.zeros,
                f"{each.prune_seconds:.1f}",
                f"{each.tune_seconds:.1f}",
                f"{each.first_loss:.4f}",
                f"{each.last_loss:.4f}",
                *((shown(each.perplexity_pruned), shown(each.perplexity_tuned)) if measured else ()),
            )
            for number, each in enumerate(report.rounds, start=1)
        ],
    )
    print(f"\n{report.pruner} and tune {report.tuning}: sparsity {report.sparsity}")
    if report.before and report.after:
        after = report.after
        print(
            f"perplexity ({after.windows} windows of {after.sequence_length} tokens): "
            f"{report.before.value:.3f} before, {after.value:.3f} after"
        )
    seconds = report.seconds
    print(f"{seconds['total']:.1f} s (prune {seconds['prune']:.1f}, tune {seconds['tune']:.1f}); ", end="")
    print(f"peak memory {report.peak_memory_bytes / 1e9:.2f} GB")
    print(f"written to {report.out}")

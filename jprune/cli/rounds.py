"""`jprune prune prune-and-tune`: the options of all rounds; those of its pruner and its tuning are parts."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from jprune.cli import display
from jprune.cli.command import Planning, Told
from jprune.cli.flags import Flags, Repeated, Word, keywords
from jprune.cli.words import shares
from jprune.errors import UsageError
from jprune.methods import Method
from jprune.patterns import Scope
from jprune.pipeline.options import Calibration, Choice, Evaluation, Machine, Result, Schedule, TrainingData
from jprune.pipeline.recipe import Recipe
from jprune.pipeline.registry import ONE_SHOT, TUNERS
from jprune.pipeline.rounds.plan import PruneAndTunePlan, plan_prune_and_tune
from jprune.pipeline.rounds.report import PruneAndTuneReport
from jprune.pipeline.rounds.run import prune_and_tune
from jprune.tuning.base import Tuning

PRUNER, TUNING = "sparsegpt", "full"
"""Unless said otherwise."""
Pruner = Literal[tuple(reversed(list(ONE_SHOT)))]  # type: ignore[valid-type]
Tuner = Literal[tuple(reversed(list(TUNERS)))]  # type: ignore[valid-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneAndTune(Planning):
    """Prune in rounds, and train what is left after each (Syed, Guo and Sundarapandiyan 2023)."""

    sparsity: float
    """Share of zeros after the last round, in [0, 1)."""
    rounds: Annotated[tuple[float, ...] | None, Word(type=Repeated, default=(), made=shares)] = None
    """Sparsities of the rounds, such as 0.3,0.5,0.7; the last is `sparsity`, and at 0 nothing is pruned. By default
    0,0.1,0.3,0.5,0.7,0.8 as far as they go."""
    per: Scope | None = None
    """Where weights compete for `sparsity`: among the inputs of each output, in blocks of 128 inputs, or in the whole
    kernel. By default as the method's authors do."""
    pruner: Pruner = PRUNER
    """Method by which a round prunes; its own options go with it."""
    pruner_options: Method
    tuning: Tuner = TUNING
    """Method by which a round trains all weights that are left, or adapters that are merged; its own options go with
    it. `steps` are those of one round, 100 by default."""
    tuning_options: Tuning
    data: Annotated[
        TrainingData,
        Flags(
            only=("data", "sequence_length", "windows_at_most"),
            words={"data": Word(type=str | None, default=None), "sequence_length": Word(flag="tune_length")},
        ),
    ]
    calibration: Annotated[Calibration, Flags(without=("seed",))]
    choice: Annotated[Choice, Flags(without=("overrides",))]
    details: Annotated[Mapping[str, Any], Flags(of=Recipe, only=("dtype", "expert_tokens", "reconstruct"))]
    evaluation: Evaluation
    schedule: Annotated[Schedule, Flags(without=("evaluate_every",))]
    result: Annotated[Result, Flags(words={"format": Word(default="hf")})]
    machine: Annotated[Machine, Flags(only=("memory",))]
    keep_rounds: bool = False
    """Keep the model of every round, in OUT/rounds."""

    def run(self) -> Told:
        """Does all rounds, or prints the plan."""
        options: dict[str, Any] = {
            **keywords(self, "calibration", "choice", "details", "machine"),
            "sparsity": self.sparsity,
            "rounds": self.rounds,
            "method": self.pruner_options,
            "per": self.per,
            "tuning": self.tuning_options,
            "tune_length": self.data.sequence_length,
            "seed": self.tuning_options.seed,
        }
        if self.plan:
            plan = plan_prune_and_tune(self.model, out=self.out or ".", **options)
            return Told(_plan_json(plan), show=functools.partial(_print_plan, plan))
        if self.out is None or self.data.data is None:
            raise UsageError("give --out DIR for the result and --data SOURCE to train on (or --plan)")
        with display.progress() as progress:
            report = prune_and_tune(
                self.model,
                self.out,
                data=self.data.data,  # type: ignore[arg-type]
                windows_at_most=self.data.windows_at_most,
                keep_rounds=self.keep_rounds,
                progress=progress,
                **options,
                **keywords(self, "evaluation", "schedule", "result"),
            )
        return self.told(report, self.evaluation, functools.partial(_print_report, report))


def _plan_json(plan: PruneAndTunePlan) -> dict[str, Any]:
    names = ("sparsities", "zeros", "tuning_steps", "tuning_tokens", "tuning_flops", "tuning_seconds", "disk_bytes")
    told = {name: getattr(plan, name) for name in names}
    return {"method": "prune-and-tune", **told, "pruning_seconds": plan.pruning.seconds, "seconds": plan.seconds}


def _print_plan(plan: PruneAndTunePlan) -> None:
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
    display.report(report, ["", f"{report.pruner} and tune {report.tuning}: sparsity {report.sparsity}"])

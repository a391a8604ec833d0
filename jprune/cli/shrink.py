"""`jprune prune METHOD` for methods that make a model smaller, at once or while it is trained."""

import dataclasses
import functools
from typing import Annotated, cast

from jprune.cli import display
from jprune.cli.command import Planning, Told
from jprune.cli.flags import Flags, keywords
from jprune.cli.prune import costs_json, print_costs
from jprune.cli.tune import Training, print_report
from jprune.cli.words import TargetWords
from jprune.pipeline.options import CalibrationText, Evaluation, Machine, Output, Result
from jprune.pipeline.shrink.plan import ShrinkPlan, plan_shrink
from jprune.pipeline.shrink.report import ShrinkReport
from jprune.pipeline.shrink.run import shrink_model
from jprune.pipeline.training import TrainingPlan, plan_training, tune_model
from jprune.structured import DropLayers
from jprune.structured.base import UnitMethod
from jprune.structured.selection import Target
from jprune.tuning.report import PrunedReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink(Planning):
    """Remove parts of a model, so that it really becomes smaller."""

    method: UnitMethod
    calibration: CalibrationText
    dtype: str | None = None
    """Dtype of the activations: float32, bfloat16 or float16. By default float32 on CPU and
    for float16 weights, else that of the weights."""
    evaluation: Annotated[Evaluation, Flags(without=("evaluate_windows",))]
    result: Output

    def target(self) -> Target | None:
        """How small the model is to be, where the method does not say."""
        return None

    def run(self) -> Told:
        """Prunes, or prints the plan."""
        if self.plan:
            machine = keywords(self, "machine")
            place = machine.get("run") or self.out or "."
            return _planned(
                plan_shrink(
                    self.model,
                    method=self.method,
                    target=self.target(),
                    out=place,
                    dtype=self.dtype,
                    **keywords(self, "calibration"),
                    **machine,
                )
            )
        out = self.destination()
        with display.progress() as progress:
            report = shrink_model(
                self.model,
                out,
                method=self.method,
                target=self.target(),
                dtype=self.dtype,
                progress=progress,
                **keywords(self, "calibration", "evaluation", "result", "machine"),
            )
        return self.told(report, self.evaluation, functools.partial(_print_report, report))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkInParts(Shrink):
    """`Shrink` for methods that need a while, and can be interrupted and gone on with."""

    result: Result
    machine: Annotated[Machine, Flags(only=("run",))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkTo(Shrink):
    """`Shrink` for methods that are told how small the model is to be, and may refit what is left."""

    size: TargetWords
    result: Result
    machine: Annotated[Machine, Flags(only=("memory", "run"))]

    def target(self) -> Target | None:
        """The one that is given; `shrink_model` says so if it should have been."""
        return self.size.made()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkWhileTraining(Training, Planning):
    """Prune a model while it is trained."""

    def run(self) -> Told:
        """Prunes, or prints the plan."""
        if self.plan:
            return _planned(plan_training(self.model, method=self.method))
        out = self.destination()
        with display.progress() as progress:
            report = tune_model(self.model, out, method=self.method, progress=progress, **self.options())
        return self.told(report, self.evaluation, functools.partial(_print_pruned, cast(PrunedReport, report)))


def _print_pruned(report: PrunedReport) -> None:
    print_report(report, *report.lines(display.change(report.parameters, report.parameters_after)))


def _planned(plan: ShrinkPlan | TrainingPlan) -> Told:
    before, after = plan.parameters
    sizes = plan.sizes and list(plan.sizes)
    json = {"parameters": {"before": before, "after": after}, "sizes": sizes}
    show = functools.partial(_print_plan, plan)
    if not isinstance(plan, ShrinkPlan):
        return Told(json, show=show)
    refitting = plan.refitting and costs_json(plan.refitting)
    return Told({**json, "refitting": refitting}, plan.notices, show)


def _print_plan(plan: ShrinkPlan | TrainingPlan) -> None:
    before, after = plan.parameters
    if plan.sizes is not None and after is not None:
        names = {"d_model": "d_model", "heads": "query heads", "kv_heads": "KV heads", "d_ff": "d_ff"}
        of_experts = {"experts": "experts", "d_expert": "d_expert", "d_shared": "d_shared"}
        names |= {name: said for name, said in of_experts.items() if any(name in sizes for sizes in plan.sizes)}
        rows = [
            (f"{a}" if a == b else f"{a} to {b}", *(sizes.get(name, "") for name in names))
            for a, b, sizes in display.runs(plan.sizes)
        ]
        display.table(["layers", *names.values()], rows)
        print(f"\nparameters: {display.change(before, after)}")
    else:
        print(f"parameters: {before:,} before; what stays of which layer depends on the importance of all")
    if isinstance(plan, ShrinkPlan) and plan.refitting is not None:
        print(f"\nthen {len(plan.refitting.kernels)} kernels that lose inputs are refitted:")
        print_costs(plan.refitting)
    print("nothing was touched")


def _counts(report: ShrinkReport) -> tuple[int, int]:
    """Experts of all layers together, before and after."""
    return sum(len(own.scores) for own in report.experts), sum(len(own.kept) for own in report.experts)


def _print_report(report: ShrinkReport) -> None:
    lines = [f"parameters: {display.change(*report.parameters)}"]
    if isinstance(report.method, DropLayers) or report.layers != tuple(range(len(report.layers))):
        lines.insert(0, f"layers that stay: {', '.join(map(str, report.layers))}")
    if report.experts:
        lines.insert(0, f"experts: {display.change(*_counts(report))}")
    if report.kernels:
        lines.append(f"kernels refitted for the inputs that they lost: {len(report.kernels)}")
    display.report(report, lines)

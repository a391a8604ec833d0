"""`jprune prune METHOD` for methods that prune one kernel at a time; the method's own options are a part."""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from jprune.cli import display
from jprune.cli.command import OnDevices, Planning, Told
from jprune.cli.flags import Flags, Word, keywords
from jprune.cli.words import PatternWords
from jprune.methods import Method
from jprune.pipeline.auto import Auto, decided
from jprune.pipeline.options import Calibration, Choice, Evaluation, Machine, Result, fields_of
from jprune.pipeline.recipe import Recipe
from jprune.pipeline.registry import name_of

if TYPE_CHECKING:
    from jprune.pipeline.forecast.forecast import Plan
    from jprune.pipeline.oneshot.report import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(Planning, OnDevices):
    """Prune a model."""

    pattern: PatternWords
    method: Method | Auto
    calibration: Calibration
    choice: Choice
    details: Annotated[
        Mapping[str, Any],
        Flags(of=Recipe, only=("dtype", "expert_tokens", "keep_zeros", "allocate", "reconstruct")),
    ]
    evaluation: Annotated[Evaluation, Flags(only=("evaluate",))]
    result: Annotated[Result, Flags(words={"format": Word(default="hf")})]
    machine: Annotated[Machine, Flags(only=("memory", "run"))]

    def asked(self) -> Recipe:
        """What to do to the model."""
        return Recipe(pattern=self.pattern.made(), **keywords(self, "calibration", "choice", "details"))

    def run(self) -> Told:
        """Prunes, or prints the plan."""
        from jprune.pipeline.oneshot.run import plan_run, prune_model

        recipe = self.asked()
        method, _, chosen = decided(self.method, recipe)
        out = None if self.plan else self.destination()
        if chosen is not None:  # now, and not when an hour is over
            print(f"{chosen.quality}: {chosen.command}\n({chosen.why})", file=sys.stderr, flush=True)
        options = {**fields_of(recipe), "method": self.method, "memory": self.machine.memory, "mesh": self.mesh()}
        if out is None:
            plan = plan_run(self.model, out=self.machine.run or self.out or ".", **options)
            plan = dataclasses.replace(plan, advice=tuple(map(self.spelled, plan.advice)))
            told = _plan_json(method, plan) | ({"chosen": chosen.json()} if chosen else {})
            return Told(told, show=functools.partial(_print_plan, plan))
        with display.progress() as progress:
            report = prune_model(
                self.model,
                out,
                **options,
                **keywords(self, "evaluation", "result"),
                run=self.machine.run,
                progress=progress,
            )
        return self.told(report, self.evaluation, functools.partial(_print_report, report), options["mesh"])


def _print_report(report: "Report") -> None:
    lines = [f"{report.method} {report.pattern}: sparsity {report.sparsity}"]
    if report.allocation:
        shares = " ".join(f"{100 * share:.1f}" for share in report.allocation["sparsities"].values())
        lines.append(f"{report.allocation['allocation']}, block by block, in %: {shares}")
    display.report(report, lines)


def _plan_json(method: Method, plan: "Plan") -> dict[str, Any]:
    return {
        "method": name_of(method),
        "kernels": [
            {"path": k.path, "shape": k.shape, "pattern": str(k.pattern), "zeros": k.zeros}
            | ({} if k.chosen is None else {"experts": k.chosen})
            for k in plan.kernels
        ],
        "sparsity": {"expected": plan.sparsity.achieved, **dataclasses.asdict(plan.sparsity)},
        **({"allocation": plan.allocation} if plan.allocation else {}),
        **costs_json(plan),
    }


def costs_json(plan: "Plan") -> dict[str, Any]:
    """What a run takes, as `--json` says it."""
    return {
        "calibration_tokens": plan.tokens,
        "units": [dataclasses.asdict(unit) for unit in plan.units],
        "flops": plan.flops,
        "seconds": plan.seconds,
        "time_class": plan.time_class,
        "micro_batch_windows": plan.layout.windows,
        "activations": plan.activations,
        "intermediates": plan.intermediates,
        "disk_bytes": plan.disk_bytes,
        "dense_model": plan.dense_model and dataclasses.asdict(plan.dense_model),
        "peak_memory_bytes": plan.peak_memory_bytes,
        "peak_device_memory_bytes": plan.peak_device_memory_bytes,
        "memory_limit_bytes": plan.memory_limit,
        "fits": plan.fits,
        "advice": plan.advice,
    }


def _print_plan(plan: "Plan") -> None:
    rows = [(k.named, k.shape, str(k.pattern), k.zeros) for k in plan.kernels]
    display.table(["kernel", "shape", "pattern", "zeros"], rows)
    print(f"\n{len(plan.kernels)} kernels, expected sparsity {plan.sparsity}\n")
    if plan.allocation and "sparsities" not in plan.allocation:
        name = plan.allocation["allocation"]
        print(
            f"{name} first scores every block of the dense model, and then gives each more or fewer zeros than shown\n"
        )
    print_costs(plan)
    print("nothing was touched")


def print_costs(plan: "Plan") -> None:
    """Prints what a run takes."""
    on_device = plan.peak_device_memory_bytes is not None
    columns = ["", "read MB", "TFLOP", "seconds", "peak GB", *(["device GB"] if on_device else [])]
    rows = []
    for unit in plan.units:
        row = [unit.name, f"{unit.bytes_read / 1e6:.0f}", f"{unit.flops / 1e12:.3g}", f"{unit.seconds:.3g}"]
        peaks = (unit.peak_memory_bytes, unit.peak_device_memory_bytes)
        rows.append([*row, *(f"{peak / 1e9:.2f}" for peak in peaks if peak is not None)])
    display.table(columns, rows)
    print(f"\n{plan.tokens} calibration tokens, {plan.layout.windows} windows at a time")
    print(
        f"{plan.flops / 1e12:.3g} TFLOP: {plan.time_class}, about {plan.seconds:.0f} s at what was just measured here"
    )
    where = {"none": "none are needed", "disk": "in memory and, for the rest, in the run folder"}
    print(f"activations between blocks: {where.get(plan.activations, 'in ' + plan.activations)}")
    between = {"none": "there are none", "kept": "kept in memory", "disk": where["disk"], "recomputed": "recomputed"}
    print(f"values between the stages of a block: {between[plan.intermediates]}")
    if plan.disk_bytes:
        print(f"run folder: up to {plan.disk_bytes / 1e9:.2g} GB, beside the result")
    if twice := plan.dense_model:
        print(
            f"of all this, the dense model beside the pruned one: {twice.memory_bytes / 1e9:.2g} GB of memory, "
            f"{twice.disk_bytes / 1e9:.2g} GB of the run folder, about {twice.seconds:.0f} s"
        )
    device = f", of the device {plan.peak_device_memory_bytes / 1e9:.2f} GB" if plan.peak_device_memory_bytes else ""
    print(f"peak memory {plan.peak_memory_bytes / 1e9:.2f} GB{device}; limit {plan.memory_limit / 1e9:.2f} GB")
    if not plan.fits:
        print("this does not fit; what helps:")
        for line in plan.advice:
            print(f"- {line}")

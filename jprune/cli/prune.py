"""`jprune prune METHOD`: the options of a run, whatever the method; `main` adds the method's own."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from jprune import patterns
from jprune.checkpoints.formats import Format
from jprune.cli import display
from jprune.cli.command import OnDevices
from jprune.cli.pruning import Pruning
from jprune.errors import JpruneError, UsageError
from jprune.methods import Method
from jprune.patterns import NM, Pattern, Unstructured
from jprune.pipeline import plan_run, prune_model
from jprune.pipeline.forecast.forecast import Plan
from jprune.pipeline.oneshot.report import Report
from jprune.pipeline.registry import name_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(Pruning, OnDevices):
    """Prune a model."""

    method: Method
    sparsity: float | None = None
    """Share of zeros, in [0, 1)."""
    pattern: str | None = None
    """N:M, such as 2:4, keeps N of every M consecutive inputs; instead of --sparsity."""
    override: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """REGEX=PATTERN: another sparsity or N:M for what the expression finds; the last that finds a kernel counts."""
    seed: int = 0
    """Of the choice of calibration windows."""
    keep_zeros: bool = False
    """Prune a model further that is pruned already: what is zero stays zero, and counts among the zeros asked for."""
    format: Format = "hf"
    """Of the result: hf (safetensors, for every Hugging Face loader), jprune (where layers differ in size), decilm (for
    vLLM) or orbax."""
    evaluate: str | None = None
    """Text whose perplexity is measured before and after, named as for --calibration."""
    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """Folder of what the run needs to be resumed, and of what does not fit into memory. By default OUT.run."""

    def run(self) -> dict[str, Any]:
        """Prunes, or prints the plan."""
        options: dict[str, Any] = {
            **self.pruning(),
            "method": self.method,
            "pattern": self._pattern(),
            "overrides": dict(_override(text) for text in self.override),
            "seed": self.seed,
            "keep_zeros": self.keep_zeros,
            "mesh": self.mesh(),
        }
        if self.plan:
            return self._show_plan(plan_run(self.model, out=self.run_folder or self.out or ".", **options))
        if self.out is None:
            raise UsageError("give --out DIR for the result (or --plan to see what would be done)")
        with display.progress() as progress:
            report = prune_model(
                self.model,
                self.out,
                format=self.format,
                evaluate=self.evaluate,
                overwrite=self.overwrite,
                resume=self.resume,
                run=self.run_folder,
                progress=progress,
                **options,
            )
        for notice in report.notices:
            print(notice, file=sys.stderr)
        if not self.json:
            _print_report(report)
        return report.json()

    def _pattern(self) -> Pattern:
        if (self.sparsity is None) == (self.pattern is None):
            raise UsageError("give either --sparsity S, such as 0.5, or --pattern N:M, such as 2:4")
        if self.sparsity is not None:
            return Unstructured(self.sparsity, self.per)
        pattern = patterns.parse(self.pattern or "")
        if not isinstance(pattern, NM):
            raise JpruneError(f"--pattern is N:M, such as 2:4; for a share of zeros give --sparsity {self.pattern}")
        if self.per is not None:
            raise UsageError(f"--per {self.per} goes with --sparsity; the pattern {pattern} is per output")
        return pattern

    def _show_plan(self, plan: Plan) -> dict[str, Any]:
        result = {
            "method": name_of(self.method),
            "kernels": [
                {"path": k.path, "shape": k.shape, "pattern": str(k.pattern), "zeros": k.zeros} for k in plan.kernels
            ],
            "sparsity": {"expected": plan.sparsity.achieved, **dataclasses.asdict(plan.sparsity)},
            "calibration_tokens": plan.tokens,
            "units": [dataclasses.asdict(unit) for unit in plan.units],
            "flops": plan.flops,
            "seconds": plan.seconds,
            "time_class": plan.time_class,
            "micro_batch_windows": plan.layout.windows,
            "activations": plan.activations,
            "intermediates": plan.intermediates,
            "disk_bytes": plan.disk_bytes,
            "peak_memory_bytes": plan.peak_memory_bytes,
            "peak_device_memory_bytes": plan.peak_device_memory_bytes,
            "memory_limit_bytes": plan.memory_limit,
            "fits": plan.fits,
            "advice": plan.advice,
        }
        if not self.json:
            rows = [(k.path, k.shape, str(k.pattern), k.zeros) for k in plan.kernels]
            display.table(["kernel", "shape", "pattern", "zeros"], rows)
            print(f"\n{len(plan.kernels)} kernels, expected sparsity {plan.sparsity}\n")
            _print_costs(plan)
            print("nothing was touched")
        return result


def _override(text: str) -> tuple[str, Pattern]:
    regex, equals, pattern = text.rpartition("=")
    if not equals or not regex:
        raise UsageError(f"--override {text!r} is not REGEX=PATTERN, such as 'mlp/down=0.3' or 'blocks/0/=2:4'")
    return regex, patterns.parse(pattern)


def _print_costs(plan: Plan) -> None:
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
    device = f", of the device {plan.peak_device_memory_bytes / 1e9:.2f} GB" if plan.peak_device_memory_bytes else ""
    print(f"peak memory {plan.peak_memory_bytes / 1e9:.2f} GB{device}; limit {plan.memory_limit / 1e9:.2f} GB")
    if not plan.fits:
        print("this does not fit; what helps:")
        for line in plan.advice:
            print(f"- {line}")


def _print_report(report: Report) -> None:
    print(f"{report.method} {report.pattern}: sparsity {report.sparsity}")
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

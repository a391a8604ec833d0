"""`jprune prune llm-pruner` and `jprune prune layers`: what removes parts of a model, and `jprune groups`."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from jprune.anatomy.units import model_groups
from jprune.checkpoints import load
from jprune.checkpoints.formats import Format
from jprune.cli import display
from jprune.cli.command import Command
from jprune.errors import UsageError
from jprune.pipeline.shrink.run import ShrinkPlan, ShrinkReport, StructuredMethod, plan_shrink, shrink_model
from jprune.structured import DropLayers, LLMPruner
from jprune.structured.llm_pruner import Importance
from jprune.structured.selection import Target
from jprune.trace import Group


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMPrunerOptions(LLMPruner):
    """Remove the heads and feed-forward channels that change the loss least (Ma, Fang and Wang 2023)."""

    # The authors' names for two of its options.
    importance: Annotated[Importance, tyro.conf.arg(aliases=("--taylor",))] = LLMPruner.importance
    globally: Annotated[bool, tyro.conf.arg(aliases=("--global",))] = LLMPruner.globally


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink(Command):
    """Remove parts of a model, so that it really becomes smaller."""

    method: StructuredMethod
    out: Path | None = None
    """Folder of the result; it appears when everything is done."""
    calibration: str = "pydoc"
    """Text that importance is read from: pydoc, a text file, .jsonl, .jsonl.gz, .parquet, .npy of token ids, or
    hf:DATASET."""
    dtype: str | None = None
    """Of the activations: float32, bfloat16 or float16. By default float32 on CPU, else what the weights have.
    Gradients are float32."""
    format: Format | None = None
    """Of the result: hf (for every Hugging Face loader; all layers must be equal), jprune (layers may differ), decilm
    (for vLLM) or orbax. By default hf if all layers are equal, else jprune."""
    evaluate: str | None = None
    """Text whose perplexity is measured before and after, named as for --calibration."""
    evaluate_length: int | None = None
    """Tokens a window of it. By default 2048 or the model's context, or 512 for the demo model."""
    plan: bool = False
    """Print the sizes of the result, and touch nothing. Works on a folder that holds only a config.json."""
    overwrite: bool = False
    """Replace --out if an earlier run wrote it."""
    recipe: Path | None = None
    """TOML or JSON file with options, or the jprune.json of an earlier run; the command line counts more."""

    def target(self) -> Target | None:
        """How small the model is to be, where the method does not say."""
        return None

    def run(self) -> dict[str, Any]:
        """Prunes, or prints the plan."""
        if self.plan:
            return show_plan(plan_shrink(self.model, method=self.method, target=self.target()), json=self.json)
        if self.out is None:
            raise UsageError("give --out DIR for the result (or --plan to see what would be done)")
        with display.progress() as progress:
            report = shrink_model(
                self.model,
                self.out,
                method=self.method,
                target=self.target(),
                calibration=self.calibration,
                evaluate=self.evaluate,
                evaluate_length=self.evaluate_length,
                format=self.format,
                dtype=self.dtype,
                overwrite=self.overwrite,
                progress=progress,
            )
        for notice in report.notices:
            print(notice, file=sys.stderr)
        if not self.json:
            _print_report(report)
        return report.json()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkTo(Shrink):
    """`Shrink` for methods that are told how small the model is to be."""

    ratio: float | None = None
    """Share of the units (heads, feed-forward channels or hidden dimensions) to remove, of each layer that is pruned,
    or with --global of all together."""
    parameter_ratio: float | None = None
    """Share of all parameters of the model to remove, at least; instead of --ratio."""
    parameters: int | None = None
    """How many parameters stay, at most; instead of --ratio."""

    def target(self) -> Target | None:
        """The one that is given; `shrink_model` says so if it should have been."""
        given = {"units": self.ratio, "share": self.parameter_ratio, "parameters": self.parameters}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise UsageError("give only one of --ratio, --parameter-ratio and --parameters")
        return Target(**given) if given else None  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupsOf(Command):
    """The coupled axes of a model: what can only be removed together, and what cannot be removed and why."""

    def run(self) -> dict[str, Any]:
        """Traces the model; reads no weight."""
        groups = model_groups(load(self.model, weights=False))
        rows = [
            {
                "name": group.name,
                "size": group.size,
                "members": [dataclasses.asdict(member) for member in group.members],
                "frozen": group.frozen,
                "renormalised": group.renormalised,
            }
            for group in groups
        ]
        if not self.json:
            alike: dict[tuple, list[Group]] = {}
            for group in groups:
                key = (_anywhere(group.name), group.size, len(group.members), _anywhere(group.frozen or ""))
                alike.setdefault(key, []).append(group)
            display.table(
                ["group", "times", "size", "members", "prunable"],
                [
                    (
                        _anywhere(same[0].name) if len(same) > 1 else same[0].name,
                        len(same),
                        same[0].size,
                        _members(same[0]),
                        f"no: {same[0].frozen}"
                        if same[0].frozen
                        else "renormalised"
                        if same[0].renormalised
                        else "yes",
                    )
                    for same in alike.values()
                ],
            )
        return {"groups": rows}


def show_plan(plan: ShrinkPlan, *, json: bool) -> dict[str, Any]:
    """Prints the sizes of the result, unless JSON is wanted; returns what that has."""
    before, after = plan.parameters
    if not json:
        if plan.sizes is not None:
            display.table(
                ["layers", "d_model", "query heads", "KV heads", "d_ff"],
                [(layers, s["d_model"], s["heads"], s["kv_heads"], s["d_ff"]) for layers, s in _alike(plan.sizes)],
            )
            print(f"\nparameters: {change(before, after)}")
        else:
            print(f"parameters: {before:,} before; what stays of which layer depends on the importance of all")
        print("nothing was touched")
    return {"parameters": {"before": before, "after": after}, "sizes": plan.sizes and list(plan.sizes)}


def _anywhere(text: str) -> str:
    """A path or a reason with the number of the block left open."""
    return re.sub(r"blocks/\d+", "blocks/*", text)


def _members(group: Group) -> str:
    """Where a group lies, the blocks' numbers left open where there are several."""
    places = dict.fromkeys(f"{m.path}[{m.axis}]" for m in group.members)
    if len({re.findall(r"blocks/(\d+)", place)[0] for place in places if "blocks/" in place}) > 1:
        places = dict.fromkeys(_anywhere(place) for place in places)
    else:
        places = dict.fromkeys(re.sub(r"blocks/\d+/", "", place) for place in places)
    return ", ".join(places)


def _alike(sizes: tuple[dict[str, int], ...]) -> list[tuple[str, dict[str, int]]]:
    """Runs of layers of equal sizes."""
    runs: list[tuple[int, int]] = []
    for i, size in enumerate(sizes):
        if runs and sizes[runs[-1][0]] == size:
            runs[-1] = (runs[-1][0], i)
        else:
            runs.append((i, i))
    return [(str(a) if a == b else f"{a} to {b}", sizes[a]) for a, b in runs]


def change(before: int, after: int | None) -> str:
    """How many parameters there were, and are."""
    assert after is not None
    return f"{before:,} before, {after:,} after ({100 * (1 - after / before):.1f} % less)"


def _print_report(report: ShrinkReport) -> None:
    if isinstance(report.method, DropLayers) or report.layers != tuple(range(len(report.layers))):
        print(f"layers that stay: {', '.join(map(str, report.layers))}")
    print(f"parameters: {change(*report.parameters)}")
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

"""`jprune compare`: what pruning has changed, measured on the same text."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from jprune import counts
from jprune.cli import display
from jprune.cli.command import OnDevices, OnText, Told, command_line
from jprune.cli.flags import Repeated
from jprune.cli.tasks import check_harness, task_names
from jprune.errors import JpruneError, UsageError
from jprune.pipeline.options import Asking

if TYPE_CHECKING:
    from jprune.pipeline.compare import Compared, Comparison, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(OnText, OnDevices):
    """Models against the first of them, on the same text: perplexity, divergence, agreement, with intervals."""

    others: tyro.conf.Positional[tuple[str, ...]] = ()
    """Models to hold against it, as pruned versions of it."""
    prompt: Repeated = ()
    """Text that each model continues, side by side; each model is loaded whole for it. May be repeated."""
    tasks: str = ""
    """Names of tasks of lm-evaluation-harness (`pip install jprune[eval]`), separated by commas: which items each model
    has right, and how many flip from right to wrong and back."""
    asking: Asking
    out: Path | None = None
    """An HTML file for all of it, with maps of the zeros and what was done to each model."""

    def run(self) -> Told:
        """Measures."""
        from jprune.checkpoints import load
        from jprune.checkpoints.dtypes import activation_dtype
        from jprune.checkpoints.writing import replace
        from jprune.pipeline.compare import compare
        from jprune.pipeline.page import page_of
        from jprune.runs import processes
        from jprune.runs.report import Progress

        if not self.others:
            raise UsageError(f"expected two models or more, got {self.model}: jprune compare DENSE PRUNED ...")
        if self.out is not None and self.out.exists():
            raise JpruneError(f"{self.out} exists; give another --out, or remove it")
        if self.out is not None and not self.out.absolute().parent.is_dir():
            raise JpruneError(f"{self.out.absolute().parent} is no folder to write {self.out.name} into; make it first")
        if self.tasks:
            check_harness()
        elif self.asking != Asking():
            raise UsageError(
                "`fewshot`, `limit`, `include`, `chat` and `example_seed` say how `tasks` are asked; give --tasks"
            )
        mesh = self.mesh()
        with processes.run_together():
            dtype = activation_dtype(load(self.model), self.dtype)
        with display.progress() as show:
            result = compare(
                [self.model, *self.others],
                self.text,
                sequence_length=self.sequence_length,
                windows=self.windows,
                prompts=self.prompt,
                tasks=task_names(self.tasks),
                asking=self.asking,
                dtype=dtype,
                mesh=mesh,
                progress=lambda done, total, model: show(Progress(float(done), total, model, "compare")),
            )
        if self.out is not None and processes.is_first():
            replace(self.out, page_of(result, command_line()).encode())
        return Told(result.json(), result.notices, functools.partial(_show, result, self.out))


def _show(result: "Comparison", out: Path | None) -> None:
    from jprune.evaluate.intervals import LEVEL
    from jprune.pipeline.compare import TAIL

    first = result.models[0]
    windows = counts.windows(result.windows, result.sequence_length)
    print(f"{windows} of {result.text}, against {first.model}")
    display.table(
        ["model", "parameters", "zeros %", "perplexity", "change %", "KL", f"KL, {TAIL} %", "agreement %"],
        [_row(own, own is first) for own in result.models],
    )
    print(f"in brackets: {LEVEL:.0%} intervals by bootstrap over windows; KL in nats a token, against the first model")
    for own in result.models[1:]:
        if not own.change.tells:
            print(f"{own.model}: its perplexity is not distinguishable from that of {first.model} here")
    for task in result.tasks:
        print(f"\n{task.task}, {task.metric} ({task.filter}): {task.items} items")
        columns = ["model", "right %", "change %", "right to wrong", "wrong to right", ""]
        display.table(columns, [_answers(own.model, task, i) for i, own in enumerate(result.models)])
    for continued in result.continuations:
        print(f"\n{continued['prompt']}")
        for text in continued["texts"]:
            print(f"  {text['model']}: {text['text']!r}")
    if out is not None:
        print(f"written to {out}")


def _answers(model: str, task: "Task", index: int) -> tuple[str, ...]:
    own = task.models[index]
    accuracy = display.interval(dataclasses.asdict(own.accuracy), ".2f", 100)
    if index == 0:
        return model, accuracy, "-", "-", "-", ""
    change = display.interval(dataclasses.asdict(own.change), "+.2f", 100)
    return model, accuracy, change, str(own.lost), str(own.gained), "" if own.change.tells else "not distinguishable"


def _row(own: "Compared", first: bool) -> tuple[str, ...]:
    def shown(name: str, form: str, scale: float = 1) -> str:
        return display.interval(dataclasses.asdict(getattr(own, name)), form, scale)

    change = {end: 100 * math.expm1(min(x, 700.0)) for end, x in dataclasses.asdict(own.change).items()}
    return (
        own.model,
        f"{own.sparsity.total_parameters:,}",
        f"{100 * own.sparsity.achieved:.2f}",
        shown("perplexity", ".3f"),
        "-" if first else display.interval(change, "+.2f"),
        "-" if first else shown("divergence", ".4f"),
        "-" if first else f"{own.tail:.3f}",
        "-" if first else shown("agreement", ".2f", 100),
    )

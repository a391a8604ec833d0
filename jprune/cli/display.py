"""What a person sees: progress and notices on stderr, tables and reports on stdout.

Nothing moves where stderr is not a terminal.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from jprune import counts

if TYPE_CHECKING:
    from jprune.runs.report import Progress as Step

T = TypeVar("T")


@contextlib.contextmanager
def progress() -> Iterator[Callable[["Step"], None]]:
    """A bar per phase: block and stage, time left, and the last reconstruction loss."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.fields[phase]:>16}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=console,
    )
    tasks: dict[str, object] = {}

    def show(step: "Step") -> None:
        if step.phase not in tasks:
            tasks[step.phase] = bars.add_task("", total=step.total, phase=step.phase, text="")
        loss = "" if step.loss is None else f"  loss {step.loss:.3g}"
        bars.update(tasks[step.phase], completed=step.done, text=f"{step.text}{loss}")  # type: ignore[arg-type]

    # Elsewhere not even begun: rich 14 prints an empty line at the end of bars that are disabled.
    with bars if console.is_terminal else contextlib.nullcontext():
        yield show


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; the first column is text, the others are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*map(str, row))
    # Where stdout is not a terminal, lines are as long as they need to be.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(drawn)


def report(result: Any, first: Iterable[str], last: Iterable[str] = ()) -> None:
    """Prints the report of a run: its own lines, and between them what all have.

    Args:
      result: the report of a run, of any kind.
      first: lines before the perplexity.
      last: lines between the perplexity and what the run took.
    """
    for line in first:
        print(line)
    if result.before and result.after:
        after = result.after
        print(
            f"perplexity ({counts.windows(after.windows, after.sequence_length)}): "
            f"{result.before.value:.3f} before, {after.value:.3f} after"
        )
    for line in last:
        print(line)
    spent = {name: value for name, value in result.seconds.items() if name != "total" and value >= 0.05}
    parts = ", ".join(f"{name} {value:.1f}" for name, value in spent.items())
    print(f"{result.seconds['total']:.1f} s ({parts}); peak memory {result.peak_memory_bytes / 1e9:.2f} GB")
    print(f"written to {result.out}")


def interval(own: Mapping[str, float | None], form: str, scale: float = 1) -> str:
    """A value of {value, low, high} with its interval, if that is known; a dash for what is not finite."""
    value, low, high = (math.nan if x is None else scale * x for x in (own["value"], own["low"], own["high"]))
    ends = "" if math.isnan(low) or math.isnan(high) else f" [{low:{form}}, {high:{form}}]"
    return "-" if math.isnan(value) else f"{value:{form}}{ends}"


def change(before: int, after: int) -> str:
    """Numbers of parameters before and after, and how many percent are gone."""
    return f"{before:,} before, {after:,} after ({100 * (1 - after / before):.1f} % less)"


def runs(values: Sequence[T]) -> list[tuple[int, int, T]]:
    """The first and the last place of each run of equal values, and the value."""
    found: list[tuple[int, int, T]] = []
    for i, value in enumerate(values):
        if found and found[-1][2] == value:
            found[-1] = (found[-1][0], i, value)
        else:
            found.append((i, i, value))
    return found

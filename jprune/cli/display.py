"""What a person sees: progress on stderr, tables on stdout. Nothing moves where stderr is not a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jprune.runs.report import Progress as Step


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Step], None]]:
    """A bar per phase: block and stage, time left, and the last reconstruction loss."""
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.fields[phase]:>16}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, object] = {}

    def show(step: Step) -> None:
        if step.phase not in tasks:
            tasks[step.phase] = bars.add_task("", total=step.total, phase=step.phase, text="")
        loss = "" if step.loss is None else f"  loss {step.loss:.3g}"
        bars.update(tasks[step.phase], completed=step.done, text=f"{step.text}{loss}")  # type: ignore[arg-type]

    with bars:
        yield show


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; the first column is text, the others are aligned to the right."""
    drawn = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*map(str, row))
    # Where stdout is not a terminal, lines are as long as they need to be.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(drawn)

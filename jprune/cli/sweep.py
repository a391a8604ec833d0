"""`jprune sweep`: methods by sparsities, every cell of which is a `jprune prune` command."""

import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jprune import counts
from jprune.cli import display
from jprune.cli.command import OnMesh, OnText, Told, command_line
from jprune.errors import UsageError

if TYPE_CHECKING:
    from jprune.cli.prune import Prune
    from jprune.pipeline.sweep import Cell

PAGE = "report.html"
OURS = frozenset(
    {"--out", "--evaluate", "--plan", "--json", "--overwrite", "--resume", "--run", "--report", "--sparsity"}
    | {"--pattern", "--model-axis", "--coordinator", "--process-id", "--num-processes", "--distributed"}
)
"""Options of `jprune prune` that are not a cell's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(OnText, OnMesh):
    """Prune a model by several methods to several sparsities, and hold every result against it."""

    methods: str
    """Methods of `jprune prune`, separated by commas, each with options of its own if it is to have some, as in
    "magnitude,wanda,sparsegpt --refit 4,auto"."""
    sparsities: str
    """Shares of zeros and N:M patterns, separated by commas: 0.5,0.6,2:4."""
    options: str = ""
    """Options of `jprune prune` for all of them, as one text: "--calibration text.txt --samples 64"."""
    out: Path
    """Folder for sweep.json, the page report.html, and the models until they are measured. The same command goes on
    where it was interrupted."""
    keep_models: bool = False
    """Keep the models, in OUT/models."""

    def run(self) -> Told:
        """Does every cell that is not done."""
        from jprune.checkpoints.writing import replace
        from jprune.data.for_model import evaluation_windows
        from jprune.evaluate.report.grid import grid_page
        from jprune.pipeline.sweep import sweep

        cells = self._cells()
        with display.progress() as progress:
            found = sweep(
                self.model,
                cells,
                self.out,
                evaluation=lambda model: evaluation_windows(
                    model, self.text, length=self.sequence_length, count=self.windows
                ),
                dtype=self.dtype,
                keep_models=self.keep_models,
                mesh=self.mesh(),
                progress=progress,
                failed=lambda line: print(self.spelled(line), file=sys.stderr, flush=True),
            )
        page = self.out / PAGE
        replace(page, grid_page({**found, "command": command_line()}).encode())
        failures = sum("failed" in cell for cell in found["cells"])
        return Told(found, show=functools.partial(_show, found, page), status=1 if failures else 0)

    def _cells(self) -> list["Cell"]:
        """The cells in their order, each as `jprune prune` reads its words."""
        patterns = [part.strip() for part in self.sparsities.split(",") if part.strip()]
        methods, common = _split(self.methods), shlex.split(self.options)
        if not patterns or not methods:
            raise UsageError("give --methods such as magnitude,wanda and --sparsities such as 0.5,2:4")
        return [self._cell(words, common, pattern) for words in methods for pattern in patterns]

    def _cell(self, words: list[str], common: list[str], pattern: str) -> "Cell":
        from jprune.cli.main import parse
        from jprune.pipeline.registry import AUTOMATIC, ONE_SHOT
        from jprune.pipeline.sweep import Cell

        method, *own = words
        if method not in ONE_SHOT | AUTOMATIC:
            raise UsageError(f"--methods are of {', '.join(AUTOMATIC | ONE_SHOT)}, with their options; got {method!r}")
        for word in (*own, *common):
            if (flag := word.split("=")[0]) in OURS:
                raise UsageError(f"{flag} is not for a cell of a sweep, which says itself where and what it writes")
        asked = ["--pattern" if ":" in pattern else "--sparsity", pattern]
        command: Prune = parse(f"prune {method}", [self.model, *own, *common, *asked])
        return Cell(
            name=shlex.join(words),
            method=command.method,
            recipe=command.asked(),
            format=command.result.format or "hf",
            memory=command.machine.memory,
        )


def _split(text: str) -> list[list[str]]:
    """Words separated by commas that do not stand in quotes."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=",")
    lexer.whitespace_split = True
    lexer.commenters = ""
    found: list[list[str]] = [[]]
    try:
        for word in lexer:
            if set(word) == {","}:
                found.append([])
            else:
                found[-1].append(word)
    except ValueError as error:
        raise UsageError(f"--methods {text!r} cannot be read: {error}") from error
    return [words for words in found if words]


def _show(found: Mapping[str, Any], page: Path) -> None:
    from jprune.evaluate.intervals import few

    evaluation, model = found["grid"]["evaluation"], found["grid"]["model"]["source"]
    windows = counts.windows(evaluation["windows"], evaluation["sequence_length"])
    print(f"{windows} of {evaluation['source']}, against {model}")
    rows = [] if found["dense"] is None else [_row(model, "", found["dense"], dense=True)]
    for asked, cell in zip(found["grid"]["cells"], found["cells"], strict=True):
        if "failed" in cell:
            rows.append((asked["name"], asked["pattern"], "failed", *[""] * 6))
        else:
            rows.append(_row(asked["name"], asked["pattern"], cell))
    columns = ["method", "pattern", "zeros %", "perplexity", "change %", "KL", "agreement %", "seconds", "peak GB"]
    display.table(columns, rows)
    print("in brackets: 95% intervals by bootstrap over windows; KL in nats a token, against the dense model")
    for notice in few(evaluation["windows"]):
        print(notice)
    for asked, cell in zip(found["grid"]["cells"], found["cells"], strict=True):
        if "failed" in cell:
            print(f"{asked['name']} {asked['pattern']} failed: {cell['failed']}")
    print(f"written to {page}")


def _row(name: str, pattern: str, own: Mapping[str, Any], *, dense: bool = False) -> tuple[str, ...]:
    sparsity = own["sparsity"]
    change = {end: None if x is None else 100 * math.expm1(min(x, 700.0)) for end, x in own["change"].items()}
    return (
        name,
        pattern,
        f"{100 * sparsity['zeros'] / max(sparsity['prunable_parameters'], 1):.2f}",
        display.interval(own["perplexity"], ".3f"),
        "" if dense else display.interval(change, "+.2f"),
        "" if dense else display.interval(own["divergence"], ".4f"),
        "" if dense else display.interval(own["agreement"], ".2f", 100),
        "" if dense else f"{own['seconds']['total']:.1f}",
        "" if dense else f"{own['peak_memory_bytes'] / 1e9:.2f}",
    )

"""A comparison as a page, with what lies beside the models: their records, and the losses of their training.

`page_of` is what `jprune compare --out` writes. `report_of_run` is the page of a run that has just ended: its result
against the model that it was made from.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jprune import paths
from jprune.checkpoints import Checkpoint, load, record, writing
from jprune.checkpoints.huggingface import adapters
from jprune.data.held_out import overlap_notice
from jprune.data.windows import Windows
from jprune.errors import JpruneError
from jprune.evaluate.report import page, thinned
from jprune.pipeline.compare import CONTINUED, Comparison, held_against
from jprune.pipeline.options import Evaluation
from jprune.runs import failures, memory, processes
from jprune.train import metrics

NAME = "report.html"
PROMPTS, PROMPT_TOKENS = 2, 24
"""Beginnings of evaluation windows that both models continue."""


def page_of(comparison: Comparison, command: str) -> str:
    """The page of a comparison.

    Args:
      comparison: of models that were named by where they lie.
      command: the words that made it.
    """
    folders = [paths.real(own.model) for own in comparison.models]
    known = [record.read(folder) if (folder / record.NAME).is_file() else None for folder in folders]
    told = [*comparison.notices]
    for own, made in zip(comparison.models, known, strict=True):
        on = (made or {}).get("evaluation") or {}
        if on.get("sha256") == comparison.sha256 and on.get("overlap"):
            told.append(f"{own.model}: {overlap_notice(on['overlap'])}")
    return page(
        {
            **comparison.json(),
            "records": [own and {n: x for n, x in own.items() if n not in ("files", "checksum")} for own in known],
            "curves": [curves(folder) for folder in folders],
            "notices": told,
            "command": command,
        }
    )


def curves(folder: Path) -> dict[str, dict[str, list[tuple[float, float, str]]]]:
    """The losses by step of the training that the metrics in a folder are of, in panels, by name, at most 200 of each:
    (step, loss, "mean of" how many, if of several). Empty where there was none."""
    found = metrics.panels(metrics.read(folder / metrics.NAME))
    return {
        panel: {name: [(p.x, p.y, p.said) for p in thinned(points)] for name, points in series.items()}
        for panel, series in found.items()
        if "loss" in panel
    }


def report_of_run(
    model: str,
    out: Path,
    measured: Evaluation,
    *,
    command: str,
    mesh: Mesh | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Path | None, tuple[str, ...]]:
    """Holds the result of a run against its model and writes the page into its folder: OUT/report.html.

    A failure takes nothing away from the result, and is told.

    Args:
      model: what the result was made from.
      out: the folder of the result.
      measured: the text to compare on, "pydoc" if it names none, and its windows.
      command: the words that made the result.
      mesh: the devices, by default all of them.
      progress: called with (done, total, model) after each block of each.

    Returns:
      The page, and what is to be told. No page if it failed.

    Raises:
      KeyboardInterrupt: Ctrl-C, which says that the result is there.
    """
    try:
        with processes.run_together():
            dense, result, made = load(model), _result(model, out), record.read(out)
        tokens, notices = _windows(dense, measured, made)
        prompts, why = _prompts(dense, result, tokens)
        comparison = held_against(
            [(model, dense), (str(out), result)],
            tokens,
            prompts=prompts,
            dtype=jnp.dtype(made["dtype"]),
            mesh=mesh,
            progress=progress,
        )
        comparison = dataclasses.replace(comparison, notices=(*comparison.notices, *notices, *why))
        if processes.is_first():
            writing.replace(out / NAME, page_of(comparison, command).encode())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the result is in {out}, without its report") from None
    except (JpruneError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not failures.out_of_memory(error):
            raise
        short = "out of memory" if failures.out_of_memory(error) else str(error)
        return None, (f"the result is in {out}, but its report could not be made: {short}",)
    return out / NAME, (*notices, *why)


def _result(model: str, out: Path) -> Checkpoint:
    """The result of a run; of one that wrote only adapters, its model with these."""
    return load(model, adapter=out) if (out / adapters.WEIGHTS).is_file() else load(out)


def _windows(dense: Checkpoint, measured: Evaluation, made: Mapping[str, Any]) -> tuple[Windows, tuple[str, ...]]:
    """The windows that a run was measured on, or else those of its options; and what is to be told of them."""
    text = measured.evaluate
    told: tuple[str, ...] = ()
    if isinstance(text, Mapping):
        told = (f"domains are no text to compare models on; the report is about pydoc, not {', '.join(text)}",)
    if text is None or isinstance(text, Mapping):
        measured = dataclasses.replace(measured, evaluate="pydoc")
    known = made.get("evaluation") or {}
    if known.get("source") == str(measured.evaluate):
        shape = {"evaluate_length": known["sequence_length"], "evaluate_windows": known["windows"]}
        measured = dataclasses.replace(measured, **shape)
    tokens = measured.text(dense)
    assert tokens is not None
    return tokens, told


def _prompts(dense: Checkpoint, result: Checkpoint, tokens: Windows) -> tuple[list[str], tuple[str, ...]]:
    """Beginnings of windows as text, for both models to continue; none, and why, if they cannot."""
    needed, room = dense.nbytes + result.nbytes, int(memory.SHARE * memory.free())
    room = min(room, memory.device_limit() or room)
    if dense.tokenizer is None:
        return [], (f"{dense.source} has no tokenizer: the report has no text that the models continue",)
    if dense.road != "native":
        return [], (f"{dense.source} is computed by {dense.road}: the report has no text that the models continue",)
    if needed > room:
        return [], (
            f"the report has no text that the models continue: both in memory take {needed / 1e9:.3g} GB, and "
            f"{room / 1e9:.3g} GB may be taken",
        )
    length = min(PROMPT_TOKENS, tokens.tokens.shape[1], dense.model.context - CONTINUED)
    places = itertools.islice(range(0, len(tokens.tokens), max(1, len(tokens.tokens) // PROMPTS)), PROMPTS)
    if length < 1:
        return [], (f"a context of {dense.model.context} tokens leaves no room for text to continue",)
    return [dense.tokenizer.decode(tokens.tokens[i, :length].tolist()) for i in places], ()

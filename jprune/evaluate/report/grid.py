"""The page of a sweep: a table of all its cells, and perplexity against sparsity with a line for each method."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jprune import counts
from jprune.evaluate.intervals import few
from jprune.evaluate.report.document import Json, cell, document, measured, percent, sortable, tells
from jprune.evaluate.report.plot import Point, lines


def grid_page(sweep: Json) -> str:
    """A whole HTML document.

    Args:
      sweep: what sweep.json has (`jprune.pipeline.sweep`), and ``command``, the words that made it.
    """
    grid = sweep["grid"]
    model, evaluation = grid["model"]["source"], grid["evaluation"]
    done = list(zip(grid["cells"], sweep["cells"], strict=True))
    title = f"{model}: {', '.join(dict.fromkeys(asked['name'] for asked, _ in done))}"
    about = (
        f"{counts.windows(evaluation['windows'], evaluation['sequence_length'])} of {evaluation['source']} (sha256 "
        f"{evaluation['sha256'][:12]}). In brackets 95 % intervals, by bootstrap over windows. KL is the divergence of "
        f"the predictions of a token from those of {model}, in nats; agreement says for how many tokens both hold the "
        "same one for the most likely. Seconds are those of the run, without measuring; memory is the most that the "
        "process had meanwhile."
    )
    body = [
        "<h1>" + re.sub(r"--[\w-]+", r'<span class="word">\g<0></span>', html.escape(title)) + "</h1>",
        f'<p class="soft">{html.escape(about)}</p>',
        *(f'<p class="warn">{html.escape(notice)}</p>' for notice in few(evaluation["windows"])),
        lines(
            _series(done, sweep["dense"], model),
            about=f"perplexity of {model} pruned, by sparsity, a line for each method",
            x="zeros, %",
            y="perplexity, logarithmic",
            logarithmic=True,
        ),
        _table(done, sweep["dense"], model),
        *_findings(done),
        "<h2>Made by</h2>",
        f"<pre>{html.escape(sweep['command'])}</pre>",
        *_about_methods(done),
    ]
    return document(title, body, sweep)


Cells = Sequence[tuple[Json, Json]]
"""What was asked for, and what came of it."""


def _share(own: Json) -> float:
    sparsity = own["sparsity"]
    return 100 * sparsity["zeros"] / max(sparsity["prunable_parameters"], 1)


def _series(done: Cells, dense: Json | None, model: str) -> Mapping[str, list[Point]]:
    """The points of each method, those of N:M beside its line; and the dense model, all along."""
    found: dict[str, list[Point]] = {}
    for asked, own in done:
        if "failed" in own:
            continue
        loose = ":" in asked["pattern"]
        x = round(_share(own), 2)
        point = Point(**_ends(own["perplexity"]), x=x, said=asked["pattern"] if loose else "", loose=loose)
        found.setdefault(asked["name"], []).append(point)
    found = {name: sorted(points, key=lambda p: (p.x, p.loose)) for name, points in found.items()}
    places = [p.x for points in found.values() for p in points]
    if dense is not None and places:
        found[model] = [Point(x=x, y=dense["perplexity"]["value"]) for x in sorted({min(places), max(places)})]
    return found


def _ends(own: Json) -> dict[str, Any]:
    value = own["value"]
    return {"y": float("nan") if value is None else value, "low": own["low"], "high": own["high"]}


def _table(done: Cells, dense: Json | None, model: str) -> str:
    columns = ["method", "pattern", "perplexity", "change, %", "KL", "KL, 99 %", "agreement, %", "zeros, %"]
    columns += ["seconds", "peak GB"]
    rows = [] if dense is None else [_row({"name": model, "pattern": ""}, dense, [cell(0, "-"), cell(0, "-")])]
    for asked, own in done:
        if "failed" in own:
            rows.append(f'<tr>{_named(asked)}<td class="warn" colspan=8>failed</td></tr>')
            continue
        seconds, memory = own["seconds"]["total"], own["peak_memory_bytes"] / 1e9
        spent = [cell(seconds, f"{seconds:.1f}"), cell(memory, f"{memory:.2f}")]
        rows.append(_row(asked, own, spent))
    return sortable(columns, rows)


def _named(asked: Json) -> str:
    return f'<td class="name">{html.escape(asked["name"])}</td><td>{html.escape(asked["pattern"])}</td>'


def _row(asked: Json, own: Json, spent: Iterable[str]) -> str:
    cells = [
        measured(own["perplexity"], ".3f"),
        measured(percent(own["change"]), "+.2f"),
        measured(own["divergence"], ".4f"),
        cell(own["tail"], "-" if own["tail"] is None else f"{own['tail']:.3f}"),
        measured(own["agreement"], ".2f", 100),
        cell(_share(own), f"{_share(own):.2f}"),
        *spent,
    ]
    return f"<tr>{_named(asked)}{''.join(cells)}</tr>"


def _findings(done: Cells) -> Iterable[str]:
    for asked, own in done:
        name = html.escape(f"{asked['name']} {asked['pattern']}")
        if "failed" in own:
            yield f'<p class="warn">{name} failed: {html.escape(own["failed"])}</p>'
        elif not tells(own["change"]):
            yield f'<p class="warn">{name}: its perplexity is not distinguishable from the dense model\'s here.</p>'


def _about_methods(done: Cells) -> Iterable[str]:
    """What `auto` chose, and what runs told."""
    told = []
    for asked, own in done:
        name = f"{asked['name']} {asked['pattern']}"
        if own.get("chosen"):
            told.append(f"{name}: {own['chosen']['command']} ({own['chosen']['why']})")
        told += [f"{name}: {notice}" for notice in own.get("notices", ())]
    if told:
        yield "<h2>What the runs say</h2>"
        yield f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in told)}</ul>"

"""The page of a comparison: every number on it is one of the object that `jprune compare --json` prints."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jprune import counts
from jprune.evaluate.report.document import Json, cell, document, interval, measured, percent, sortable, tells
from jprune.evaluate.report.drawing import heat_map, number, whiskers
from jprune.evaluate.report.plot import Point, lines


def page(comparison: Json) -> str:
    """A whole HTML document.

    Args:
      comparison: what `jprune.pipeline.compare.Comparison.json` gives; and ``records``, the jprune.json of each model
        or None; ``curves``, of each the losses of its training (`jprune.pipeline.page.curves`); ``notices``, what is
        to be known of all of it, one sentence each; and ``command``, the words that made it.
    """
    models = comparison["models"]
    title = f"{models[0]['model']} and {', '.join(own['model'] for own in models[1:])}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{html.escape(_about(comparison))}</p>',
        *(f'<p class="warn">{html.escape(notice)}</p>' for notice in comparison["notices"]),
        "<h2>What they predict</h2>",
        _table(comparison),
        *_findings(comparison),
        whiskers(
            [(own["model"], own["perplexity"], interval(own["perplexity"], ".4g")) for own in models],
            "perplexity, logarithmic",
        ),
        *_tasks(models, comparison["tasks"]),
        *_texts(comparison["continuations"]),
        *_curves(models, comparison["curves"]),
        *_maps(models, comparison["records"]),
        *_sizes(models, comparison["records"]),
        *_recipes(models, comparison["records"]),
        "<h2>Made by</h2>",
        f"<pre>{html.escape(comparison['command'])}</pre>",
    ]
    return document(title, body, comparison)


def _about(comparison: Json) -> str:
    return (
        f"{counts.windows(comparison['windows'], comparison['sequence_length'])} of {comparison['text']} (sha256 "
        f"{comparison['sha256'][:12]}). In brackets 95 % intervals, by bootstrap over windows. KL is the divergence of "
        f"the predictions of a token from those of {comparison['models'][0]['model']}, in nats; agreement says for how "
        "many tokens both hold the same one for the most likely."
    )


def _table(comparison: Json) -> str:
    columns = ["model", "perplexity", "change, %", "KL", "KL, 99 %", "agreement, %", "zeros, %", "parameters", "MB"]
    rows = []
    for i, own in enumerate(comparison["models"]):
        sparsity = own["sparsity"]
        share = 100 * sparsity["zeros"] / max(sparsity["prunable_parameters"], 1)
        cells = [
            measured(own["perplexity"], ".3f"),
            measured(percent(own["change"]), "+.2f") if i else cell(0, "-"),
            measured(own["divergence"], ".4f") if i else cell(0, "-"),
            cell(own["tail"], number(own["tail"], ".3f") if i else "-"),
            measured(own["agreement"], ".2f", 100) if i else cell(100, "-"),
            cell(share, f"{share:.2f}"),
            cell(sparsity["total_parameters"], f"{sparsity['total_parameters']:,}"),
            cell(own["nbytes"], f"{own['nbytes'] / 1e6:,.0f}"),
        ]
        rows.append(f'<tr><td class="name">{html.escape(own["model"])}</td>{"".join(cells)}</tr>')
    return sortable(columns, rows)


def _findings(comparison: Json) -> Iterable[str]:
    first, *others = comparison["models"]
    for own in others:
        if not tells(own["change"]):
            yield (
                f'<p class="warn">The perplexity of {html.escape(own["model"])} is not distinguishable from that of '
                f"{html.escape(first['model'])} on this text.</p>"
            )


def _tasks(models: Sequence[Json], tasks: Sequence[Json]) -> Iterable[str]:
    """Answers to the items of tasks."""
    if not tasks:
        return
    first = models[0]["model"]
    yield "<h2>What they answer</h2>"
    yield (
        f'<p class="soft">Items that each has right, and the change from {html.escape(first)} item by item, with 95 % '
        "intervals by bootstrap over items. The last columns count items that one of the two alone has right: "
        "models of equal accuracy may have lost as many as they gained.</p>"
    )
    columns = ["task", "metric", "items", "model", "right, %", "change, %", "right to wrong", "wrong to right"]
    rows = []
    for task in tasks:
        of = f"{task['metric']} ({task['filter']})"
        for own, found in zip(models, task["models"], strict=True):
            other = own is not models[0]
            said = "" if not other or tells(found["change"]) else '<small class="warn">not distinguishable</small>'
            cells = [
                f'<td class="name">{html.escape(task["task"])}</td><td>{html.escape(of)}</td>',
                cell(task["items"], f"{task['items']:,}"),
                f'<td class="name">{html.escape(own["model"])}{said}</td>',
                measured(found["accuracy"], ".2f", 100),
                measured(found["change"], "+.2f", 100) if other else cell(0, "-"),
                *(cell(found[name], str(found[name]) if other else "-") for name in ("lost", "gained")),
            ]
            rows.append(f"<tr>{''.join(cells)}</tr>")
    yield sortable(columns, rows)


def _texts(continuations: Sequence[Json]) -> Iterable[str]:
    if not continuations:
        return
    yield "<h2>What they write</h2>"
    for own in continuations:
        yield f"<h3>{html.escape(own['prompt'])}</h3>"
        shown = [(html.escape(text["model"]), html.escape(text["text"].lstrip(" "))) for text in own["texts"]]
        figures = [f"<figure><figcaption>{name}</figcaption>{text}</figure>" for name, text in shown]
        yield f'<div class="texts">{"".join(figures)}</div>'


def _maps(models: Sequence[Json], records: Sequence[Json | None]) -> Iterable[str]:
    """Sparsity of every kernel, and what pruning it lost, of models that have either."""
    drawn = []
    for own, record in zip(models, records, strict=True):
        zeros = {k["path"]: 100 * k["zeros"] / k["size"] for k in own["kernels"]}
        name = html.escape(own["model"])
        if own["sparsity"]["zeros"] > 0.01 * own["sparsity"]["prunable_parameters"]:
            drawn.append(f'<div class="map"><h3>{name}: zeros, %</h3>{heat_map(zeros, ".1f")}</div>')
        kernels = (record or {}).get("kernels") or []
        losses = {k["path"]: k["loss"] / k["size"] for k in kernels if k.get("loss")}
        if losses:
            table = heat_map(losses, ".3g", logarithmic=True)
            drawn.append(f'<div class="map"><h3>{name}: error of a weight</h3>{table}</div>')
    if drawn:
        yield "<h2>Where the zeros are, and what they cost</h2>"
        yield (
            '<p class="soft">By layer and kernel; hover for the value. The error is that of the outputs on the '
            "calibration tokens, the sum over them halved and divided by the number of weights, coloured by its "
            "logarithm.</p>"
        )
        yield f'<div class="maps">{"".join(drawn)}</div>'


def _curves(models: Sequence[Json], curves: Sequence[Json]) -> Iterable[str]:
    """The losses of models that were trained."""
    if any(curves):
        yield "<h2>How training went</h2>"
    for own, panels in zip(models, curves, strict=True):
        for panel, series in panels.items():
            about = f"{own['model']}: {panel} by training step"
            points = {name: [Point(x=x, y=y, said=said) for x, y, said in found] for name, found in series.items()}
            yield f"<h3>{html.escape(own['model'])}</h3>{lines(points, about=about, x='step', y=panel)}"


def _sizes(models: Sequence[Json], records: Sequence[Json | None]) -> Iterable[str]:
    """The widths of the layers, where some model has others than the first."""
    layers = [own["layers"] for own in models]
    if all(own == layers[0] for own in layers):
        return
    yield "<h2>What is left of each layer</h2>"
    for own, record in zip(models, records, strict=True):
        names = list(own["layers"][0])
        rows = [
            f"<tr><td>{i}</td>{''.join(cell(layer[n], f'{layer[n]:,}') for n in names)}</tr>"
            for i, layer in enumerate(own["layers"])
        ]
        kept = _kept(own["layers"], layers[0], (record or {}).get("layers") or range(len(own["layers"])))
        about = f"{own['model']}: share of each size that is left, by layer of {models[0]['model']}"
        drawn = lines(kept, about=about, x="layer", y="left, %")
        yield f"<h3>{html.escape(own['model'])}</h3>{drawn}{sortable(['layer', *names], rows)}"


def _kept(layers: Sequence[Json], first: Sequence[Json], places: Sequence[int]) -> dict[str, list[Point]]:
    """Percent of each size of the layers that is left, of sizes that some layer has less of.

    Args:
      layers: the sizes of what is left.
      first: those of all layers before.
      places: which of these are left.
    """
    found: dict[str, list[Point]] = {}
    for place, own in zip(places, layers):
        for name, size in own.items():
            if place < len(first) and first[place].get(name):
                y = 100 * size / first[place][name]
                found.setdefault(name, []).append(Point(x=place, y=y, said=f"{size} of {first[place][name]}"))
    return {name: points for name, points in found.items() if any(p.y != 100 for p in points)}


def _recipes(models: Sequence[Json], records: Sequence[Json | None]) -> Iterable[str]:
    yield "<h2>What was done</h2>"
    for own, record in zip(models, records, strict=True):
        yield f"<h3>{html.escape(own['model'])}</h3>"
        if not record:
            yield '<p class="soft">No jprune.json lies beside it: nothing is known of how it was made.</p>'
            continue
        facts = {
            "recipe": record.get("recipe"),
            "made from": record.get("model"),
            "calibrated on": record.get("calibration"),
            "perplexity then": record.get("perplexity"),
            "seconds": record.get("seconds"),
            "peak memory": f"{record['peak_memory_bytes'] / 1e9:.2f} GB" if "peak_memory_bytes" in record else None,
            "device": record.get("device"),
            "versions": record.get("versions"),
        }
        known = {name: _said(value) for name, value in facts.items() if value}
        yield "".join(
            ["<dl>", *(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in known.items()), "</dl>"]
        )


def _said(value: Any) -> str:
    """A part of a record in a line."""
    if isinstance(value, Mapping):
        given = ((k, v) for k, v in value.items() if v not in (None, [], {}, False))
        return ", ".join(f"{k} {_said(v)}" for k, v in given)
    return f"{value:.4g}" if isinstance(value, float) else str(value)

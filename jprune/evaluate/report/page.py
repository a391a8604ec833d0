"""The page of a comparison: every number on it is one of the object that `jprune compare --json` prints."""

import html
import importlib.resources
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jprune.evaluate.report.drawing import heat_map, number, whiskers

Json = Mapping[str, Any]


def page(comparison: Json) -> str:
    """A whole HTML document.

    Args:
      comparison: what `jprune.pipeline.compare.Comparison.json` gives; and ``records``, the jprune.json of each model
        or None, and ``command``, the words that made it.
    """
    models = comparison["models"]
    title = f"{models[0]['model']} and {', '.join(own['model'] for own in models[1:])}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{html.escape(_about(comparison))}</p>',
        "<h2>What they predict</h2>",
        _wide(_table(comparison)),
        *_findings(comparison),
        whiskers(
            [(own["model"], own["perplexity"], _interval(own["perplexity"], ".4g")) for own in models],
            "perplexity, logarithmic",
        ),
        *_texts(comparison["continuations"]),
        *_maps(models, comparison["records"]),
        *_sizes(models),
        *_recipes(models, comparison["records"]),
        "<h2>Made by</h2>",
        f"<pre>{html.escape(comparison['command'])}</pre>",
    ]
    asset = importlib.resources.files(__package__)
    data = json.dumps(comparison).replace("<", "\\u003c")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{asset.joinpath('page.css').read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>",
            *body,
            "</main>",
            f'<script type="application/json" id="data">{data}</script>',
            f"<script>\n{asset.joinpath('page.js').read_text(encoding='utf-8')}</script>\n</body>\n</html>\n",
        ]
    )


def _about(comparison: Json) -> str:
    return (
        f"{comparison['windows']} windows of {comparison['sequence_length']} tokens of {comparison['text']} (sha256 "
        f"{comparison['sha256'][:12]}). In brackets 95 % intervals, by bootstrap over windows. KL is the divergence of "
        f"the predictions of a token from those of {comparison['models'][0]['model']}, in nats; agreement says for how "
        "many tokens both hold the same one for the most likely."
    )


def _table(comparison: Json) -> str:
    columns = ["model", "parameters", "MB", "zeros, %", "perplexity", "change, %", "KL", "KL, 99 %", "agreement, %"]
    rows = []
    for i, own in enumerate(comparison["models"]):
        sparsity = own["sparsity"]
        share = 100 * sparsity["zeros"] / max(sparsity["prunable_parameters"], 1)
        change = {name: _percent(x) for name, x in own["change"].items()}
        cells = [
            _cell(sparsity["total_parameters"], f"{sparsity['total_parameters']:,}"),
            _cell(own["nbytes"], f"{own['nbytes'] / 1e6:,.0f}"),
            _cell(share, f"{share:.2f}"),
            _measured(own["perplexity"], ".3f"),
            _measured(change, "+.2f") if i else _cell(0, "-"),
            _measured(own["divergence"], ".4f") if i else _cell(0, "-"),
            _cell(own["tail"], number(own["tail"], ".3f") if i else "-"),
            _measured(own["agreement"], ".2f", 100) if i else _cell(100, "-"),
        ]
        rows.append(f'<tr><td class="name">{html.escape(own["model"])}</td>{"".join(cells)}</tr>')
    return _sortable(columns, rows)


def _findings(comparison: Json) -> Iterable[str]:
    first, *others = comparison["models"]
    for own in others:
        low, high = own["change"]["low"], own["change"]["high"]
        if low is None or low <= 0 <= high:
            yield (
                f'<p class="warn">The perplexity of {html.escape(own["model"])} is not distinguishable from that of '
                f"{html.escape(first['model'])} on this text.</p>"
            )


def _texts(continuations: Sequence[Json]) -> Iterable[str]:
    if not continuations:
        return
    yield "<h2>What they write</h2>"
    for own in continuations:
        yield f"<h3>{html.escape(own['prompt'])}</h3>"
        figures = [
            f"<figure><figcaption>{html.escape(text['model'])}</figcaption>{html.escape(text['text'])}</figure>"
            for text in own["texts"]
        ]
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


def _sizes(models: Sequence[Json]) -> Iterable[str]:
    """The widths of the layers, where some model has others than the first."""
    layers = [own["layers"] for own in models]
    if all(own == layers[0] for own in layers):
        return
    yield "<h2>What is left of each layer</h2>"
    for own in models:
        names = list(own["layers"][0])
        rows = [
            f"<tr><td>{i}</td>{''.join(_cell(layer[n], f'{layer[n]:,}') for n in names)}</tr>"
            for i, layer in enumerate(own["layers"])
        ]
        yield f"<h3>{html.escape(own['model'])}</h3>{_wide(_sortable(['layer', *names], rows))}"


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


def _sortable(columns: Sequence[str], rows: Sequence[str]) -> str:
    heads = "".join(f"<th scope=col><button>{html.escape(name)}</button></th>" for name in columns)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _wide(table: str) -> str:
    return f'<div class="wide" tabindex=0>{table}</div>'


def _cell(value: float | None, text: str) -> str:
    return f'<td data-value="{"" if value is None else value}">{text}</td>'


def _measured(own: Json, form: str, scale: float = 1) -> str:
    value = own["value"]
    ends = [own["low"], own["high"]]
    known = "" if None in ends else f"<small>[{', '.join(format(scale * x, form) for x in ends)}]</small>"
    shown = "-" if value is None else format(scale * value, form)
    return f'<td data-value="{"" if value is None else value}">{shown}{known}</td>'


def _interval(own: Json, form: str) -> str:
    ends = "" if own["low"] is None else f" [{own['low']:{form}}, {own['high']:{form}}]"
    return f"{number(own['value'], form)}{ends}"


def _percent(x: float | None) -> float | None:
    return None if x is None else 100 * math.expm1(min(x, 700.0))

"""What pages have in common: one HTML document that needs nothing else, and tables whose numbers have intervals."""

import html
import importlib.resources
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jprune.evaluate.report.drawing import number

Json = Mapping[str, Any]


def document(title: str, body: Iterable[str], data: Any) -> str:
    """A whole HTML document; what it was made of goes with it, as JSON in a script of the id `data`."""
    asset = importlib.resources.files(__package__)
    written = json.dumps(data).replace("<", "\\u003c")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{asset.joinpath('page.css').read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>",
            *body,
            "</main>",
            f'<script type="application/json" id="data">{written}</script>',
            f"<script>\n{asset.joinpath('page.js').read_text(encoding='utf-8')}</script>\n</body>\n</html>\n",
        ]
    )


def sortable(columns: Sequence[str], rows: Sequence[str]) -> str:
    """A table that sorts by the column whose heading is pressed."""
    heads = "".join(f"<th scope=col><button>{html.escape(name)}</button></th>" for name in columns)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide" tabindex=0>{table}</div>'


def cell(value: float | None, text: str) -> str:
    """A cell that sorts by a value."""
    return f'<td data-value="{"" if value is None else value}">{text}</td>'


def measured(own: Json, form: str, scale: float = 1) -> str:
    """A cell with a value and its interval."""
    value = own["value"]
    ends = [own["low"], own["high"]]
    known = "" if None in ends else f"<small>[{', '.join(format(scale * x, form) for x in ends)}]</small>"
    shown = "-" if value is None else format(scale * value, form)
    return f'<td data-value="{"" if value is None else value}">{shown}{known}</td>'


def interval(own: Json, form: str) -> str:
    """A value and its interval in words."""
    ends = "" if own["low"] is None else f" [{own['low']:{form}}, {own['high']:{form}}]"
    return f"{number(own['value'], form)}{ends}"


def percent(own: Json) -> dict[str, float | None]:
    """By how many percent perplexity changes, of the change of its logarithm."""
    return {name: None if x is None else 100 * math.expm1(min(x, 700.0)) for name, x in own.items()}


def tells(own: Json) -> bool:
    """Whether an interval says that there is a difference: its ends are known, and zero lies outside."""
    return own["low"] is not None and not own["low"] <= 0 <= own["high"]

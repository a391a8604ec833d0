"""What a report draws: intervals as lines with a dot, and a number of every kernel as a map of layers by kinds.

Every mark has its value as a title, which browsers show on hover; a map is a table, so that it can be read without
colours too.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any


def whiskers(rows: Sequence[tuple[str, Mapping[str, float | None], str]], what: str) -> str:
    """A row for each (name, {value, low, high}, how that is written): a dot on a line from low to high, on a
    logarithmic axis that all share."""
    ends = [x for _, own, _ in rows for x in own.values() if x is not None and x > 0]
    if not ends:
        return ""
    low, high = math.log(min(ends)), math.log(max(ends))
    low, high = (low - 0.05, high + 0.05) if high - low < 1e-9 else (low, high)

    def place(x: float) -> float:
        return 100 * (math.log(x) - low) / (high - low)

    parts = [f'<div class="whiskers" role="group" aria-label="{html.escape(what)}">']
    for name, own, written in rows:
        said = html.escape(f"{name}: {written}")
        parts.append(f'<div>{html.escape(name)} <span class="soft">{html.escape(written)}</span></div>')
        parts.append(f'<div class="track" role="img" title="{said}" aria-label="{said}">')
        value, first, last = (own[key] for key in ("value", "low", "high"))
        if first and last:
            parts.append(f'<i style="left:{place(first):.2f}%;width:{place(last) - place(first):.2f}%"></i>')
        if value:
            parts.append(f'<b style="left:{place(value):.2f}%"></b>')
        parts.append("</div>")
    scale = f"<span>{math.exp(low):.4g}</span><span>{html.escape(what)}</span><span>{math.exp(high):.4g}</span>"
    return "\n".join([*parts, f'<div class="scale soft">{scale}</div></div>'])


def heat_map(values: Mapping[str, float], form: str, *, logarithmic: bool = False) -> str:
    """A table of layers by kinds of kernels, coloured from the least value to the most; where all are the same, a line.

    Args:
      values: by path of the kernel, ``blocks/LAYER/KIND/kernel``; others are left out.
      form: how a value is written.
      logarithmic: whether colours go by its logarithm.
    """
    cells: dict[int, dict[str, float]] = {}
    for path, value in values.items():
        if found := re.fullmatch(r"blocks/(\d+)/(.+?)(?:/kernel)?", path):
            cells.setdefault(int(found[1]), {})[found[2]] = value
    known = [x for row in cells.values() for x in row.values()]
    if len(known) > 1 and len({format(x, form) for x in known}) == 1:
        return f"<p>{format(known[0], form)} in each of {len(known)} kernels</p>"
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))
    shades = {x: math.log(x) if logarithmic and x > 0 else x for x in known}
    low, high = min(shades.values(), default=0), max(shades.values(), default=0)
    heads = "".join(f"<th>{html.escape(kind).replace('/', '/<wbr>')}</th>" for kind in kinds)
    parts = [f"<table><thead><tr><th>layer</th>{heads}</tr></thead>"]
    parts.append("<tbody>")
    for layer in sorted(cells):
        parts.append(f"<tr><th scope=row>{layer}</th>")
        for kind in kinds:
            if kind not in cells[layer]:
                parts.append("<td></td>")
                continue
            value = cells[layer][kind]
            share = (shades[value] - low) / (high - low) if high > low else 0.5
            written = format(value, form)
            title = html.escape(f"layer {layer}, {kind}: {written}")
            parts.append(f'<td tabindex=0 title="{title}" style="background:{_colour(share)}">{written}</td>')
        parts.append("</tr>")
    colours = ", ".join(_colour(step / 4) for step in range(5))
    ends = [format(x, form) for x in (min(known), max(known))] if known else ["", ""]
    bar = f'<i style="background:linear-gradient(90deg, {colours})"></i>'
    return "".join([*parts, f'</tbody></table><p class="key soft">{ends[0]}{bar}{ends[1]}</p>'])


def _colour(share: float) -> str:
    """Pale to strong."""
    return f"hsl({215 - 15 * share:.0f} {40 + 40 * share:.0f}% {88 - 58 * share:.0f}%)"


def number(value: Any, form: str) -> str:
    """A number as it is written, a dash where there is none."""
    return "-" if value is None else format(value, form)

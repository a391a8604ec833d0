"""Lines in a report, as SVG within the page: colours follow the page, every point tells its value when it is hovered
over, and below stand all values as a table, for those who do not see the picture or want the numbers."""

import dataclasses
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

WIDTH, HEIGHT = 760, 300
LEFT, TOP, RIGHT, BOTTOM = 64, 14, 14, 44
QUIET = 60
"""A line of more points than this shows a point only under the mouse."""
COLOURS = 6
"""How many the stylesheet has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A value at a place, with the ends of its interval where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    said: str = ""
    """What is told of it beside its numbers."""
    loose: bool = False
    """Whether it lies beside the line of its series."""


def lines(
    series: Mapping[str, Sequence[Point]],
    *,
    about: str,
    x: str,
    y: str,
    logarithmic: bool = False,
) -> str:
    """A plot with a line for each series, its legend, and its values as a table.

    Args:
      series: points by name, their x rising; those that are not finite are left out.
      about: what the plot shows, in a sentence, for those who do not see it.
      x: what lies along it.
      y: what goes up.
      logarithmic: whether y does so by its logarithm.
    """
    shown = {name: [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)] for name, points in series.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    across, up = _axis([p.x for points in shown.values() for p in points]), _upward(shown, logarithmic)

    def place(point: Point, value: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - RIGHT) * across(point.x), HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up(value)

    drawn = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(about)}">']
    drawn.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    drawn += _ticks(shown, across, up)
    drawn.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{html.escape(x)}</text>')
    for number, (name, points) in enumerate(shown.items()):
        quiet = " quiet" if len(points) > QUIET else ""
        drawn.append(f'<g class="c{number % COLOURS}{quiet}">')
        places = [place(p, p.y) for p in points]
        line = " ".join(f"{left:.1f},{top:.1f}" for p, (left, top) in zip(points, places) if not p.loose)
        drawn += [f'<polyline points="{line}"/>'] if line else []
        for p, (left, top) in zip(points, places, strict=True):
            said = html.escape(f"{name}, {x} {p.x:g}: {_number(p)}{p.said and f' ({p.said})'}")
            if p.low is not None and p.high is not None:
                bottom, upper = place(p, p.low)[1], place(p, p.high)[1]
                drawn.append(f'<path class="whisker" d="M{left:.1f} {bottom:.1f}V{upper:.1f}"/>')
            kind = ' class="loose"' if p.loose else ""
            at = f'cx="{left:.1f}" cy="{top:.1f}" r="4.5"'
            drawn.append(f'<circle{kind} {at} tabindex="0"><title>{said}</title></circle>')
        drawn.append("</g>")
    legend = "".join(f'<span class="c{i % COLOURS}">{html.escape(name)}</span>' for i, name in enumerate(shown))
    values = f"<details><summary>{html.escape(y)}: all values</summary>{_table(shown, x)}</details>"
    head = f'<div class="legend"><b>{html.escape(y)}</b>{legend}</div>'
    return "\n".join(['<figure class="plot">', head, *drawn, "</svg>", values, "</figure>"])


def thinned(points: Sequence[tuple[float, float]], most: int = 200) -> list[Point]:
    """At most so many points of a long series: means of as many neighbours each, which is said of them."""
    group = -(-len(points) // most) or 1
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    said = [f"mean of {len(part)}" if len(part) > 1 else "" for part in parts]
    return [Point(x=part[-1][0], y=sum(y for _, y in part) / len(part), said=words) for part, words in zip(parts, said)]


def _axis(values: Sequence[float]) -> Callable[[float], float]:
    """A function from values to [0, 1]."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(low), abs(high), 1.0):  # in the middle
        low, high = low - 0.5, high + 0.5
    return lambda value: (value - low) / (high - low)


def _upward(shown: Mapping[str, Sequence[Point]], logarithmic: bool) -> Callable[[float], float]:
    ends = [v for points in shown.values() for p in points for v in (p.low, p.y, p.high) if v is not None]
    if not logarithmic or min(ends) <= 0:
        return _axis(ends)
    inner = _axis([math.log(v) for v in ends])
    return lambda value: inner(math.log(value))


def _ticks(
    shown: Mapping[str, Sequence[Point]], across: Callable[[float], float], up: Callable[[float], float]
) -> Iterable[str]:
    places = sorted({p.x for points in shown.values() for p in points})
    if len(places) > 9:
        places = [places[round(i * (len(places) - 1) / 4)] for i in range(5)]
    for value in places:
        left = LEFT + (WIDTH - LEFT - RIGHT) * across(value)
        yield f'<text x="{left:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
    values = sorted({p.y for points in shown.values() for p in points})
    taken: list[float] = []
    for value in (values[0], values[-1], *values):
        top = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up(value)
        if all(abs(top - other) >= 24 for other in taken):
            taken.append(top)
            yield f'<text x="{LEFT - 8}" y="{top + 4:.1f}" text-anchor="end">{value:.4g}</text>'


def _table(shown: Mapping[str, Sequence[Point]], x: str) -> str:
    """All values: a row for each place, a column for each series."""
    rows = []
    for place in sorted({(p.x, p.said if p.loose else "") for points in shown.values() for p in points}):
        known = [[p for p in points if (p.x, p.said if p.loose else "") == place] for points in shown.values()]
        cells = [f"<td>{'; '.join(map(_number, found))}</td>" for found in known]
        rows.append(f"<tr><td>{place[0]:g} {html.escape(place[1])}</td>{''.join(cells)}</tr>")
    heads = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in (x, *shown))
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide" tabindex=0>{table}</div>'


def _number(point: Point) -> str:
    ends = "" if point.low is None or point.high is None else f" [{point.low:.4g}, {point.high:.4g}]"
    return f"{point.y:.4g}{ends}"

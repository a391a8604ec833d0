"""Plots what a training run measured: a panel for the losses, and one for everything else that its metrics hold.

    python scripts/plot_run.py RUN [--out run.svg]

RUN is a metrics.jsonl, or a folder with one: of a result, or of a run that still lasts (OUT.run). Metrics that are
called A/B share the panel A, so domains' losses, weights and epochs have one each, and so do expected sizes and
multipliers of learned masks; the learning rate and the norm of the gradient have their own. The plot is an SVG.
"""

import argparse
import html
import json
from collections.abc import Iterable
from pathlib import Path

from jprune.train import metrics

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d5a97", "#c17c00", "#4a4a4a", "#00838f", "#ad1457")
WIDTH, HEIGHT, COLUMNS = 520, 240, 2
LEFT, TOP, RIGHT, BOTTOM = 70, 36, 150, 36

Points = list[tuple[int, float]]


def draw(found: dict[str, dict[str, Points]]) -> str:
    """The panels as an SVG, two side by side."""
    size = f"{COLUMNS * WIDTH} {-(-len(found) // COLUMNS) * HEIGHT}"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    for i, (title, series) in enumerate(found.items()):
        parts.append(f'<g transform="translate({i % COLUMNS * WIDTH} {i // COLUMNS * HEIGHT})">')
        parts += [*panel(title, series), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(title: str, series: dict[str, Points]) -> Iterable[str]:
    """One panel at the origin."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    values = [value for points in series.values() for _, value in points]
    low, high = min(values), max(values)
    if low == high:  # in the middle
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    last = max(step for points in series.values() for step, _ in points)

    def place(step: int, value: float) -> str:
        return f"{LEFT + width * step / last:.1f},{TOP + height * (high - value) / (high - low):.1f}"

    yield f'<text x="{LEFT}" y="20" font-weight="bold">{html.escape(title.replace("_", " "))}</text>'
    yield f'<path d="M{LEFT} {TOP}v{height}h{width}" fill="none" stroke="black"/>'
    for share in (0.0, 0.5, 1.0):
        y = TOP + height * (1 - share)
        yield f'<text x="{LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{low + (high - low) * share:.4g}</text>'
        yield f'<text x="{LEFT + width * share:.0f}" y="{HEIGHT - 18}" text-anchor="middle">{last * share:.0f}</text>'
    for i, (name, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        line = " ".join(place(step, value) for step, value in points)
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        if len(points) == 1:
            x, y = place(*points[0]).split(",")
            yield f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'
        label = html.escape(name.replace("_", " "))
        yield f'<text x="{LEFT + width + 10}" y="{TOP + 12 + 15 * i}" fill="{colour}">{label}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("run.svg"))
    args = parser.parse_args()
    path = args.run / metrics.NAME if args.run.is_dir() else args.run
    found = metrics.panels(metrics.read(path))
    if not found:
        parser.error(f"{path} is no file with metrics")
    args.out.write_text(draw(found), encoding="utf-8")
    print(json.dumps({name: list(series) for name, series in found.items()}))


if __name__ == "__main__":
    main()

"""Tables and a plot of what bench_kernels.py measured.

python scripts/kernel_report.py docs/results/kernels_DEVICE.json [--plot FILE.svg]
"""

import argparse
import json
from pathlib import Path

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d5a97", "#c17c00")


def table(result: dict) -> str:
    """Markdown: speed-up over dense, a line a layer, format and sparsity, a column a batch size."""
    rows = result["rows"]
    batches = sorted({row["batch"] for row in rows})
    lines = [
        f"{result['device']}, backend {result['backend']}; speed-up over the dense bf16 matmul of the same run"
        + (" (INTERPRETED OR TINY: these times mean nothing)" if result["interpret"] or result["tiny"] else ""),
        "",
        "| layer | format | sparsity | byte limit | " + " | ".join(f"n = {n}" for n in batches) + " |",
        "| --- " * (4 + len(batches)) + "|",
    ]
    groups: dict = {}
    for row in rows:
        key = row["layer"], row["format"], row["sparsity"]
        groups.setdefault(key, {"limit": row["byte_limit"]})[row["batch"]] = row["speedup"]
    for (layer, format, sparsity), found in groups.items():
        cells = (f"{found[n]:.2f}" if n in found else "-" for n in batches)
        lines.append(f"| {layer} | {format} | {sparsity:.1%} | {found['limit']:.2f} | " + " | ".join(cells) + " |")
    for name, times in result.get("sweep", {}).items():
        ratio = times["reference_microseconds"] / times["microseconds"]
        lines.append(f"\nSparseGPT sweep, {name}: {times['microseconds']:.0f} us, {ratio:.2f}x over the reference")
    return "\n".join(lines)


def plot(result: dict) -> str:
    """An SVG: speed-up against sparsity on the first layer, a line a batch size, and the bytes' limit."""
    layer = result["rows"][0]["layer"]
    rows = [row for row in result["rows"] if row["layer"] == layer]
    width, height, left, top = 360, 260, 46, 34
    formats = {"bitmap": "bitmap", "capped": "capped:4, 3, 2"}
    most = max(2.0, *(row["byte_limit"] for row in rows), *(row["speedup"] for row in rows)) * 1.05
    low, high = 0.45, 0.85

    def point(panel, sparsity, speedup):
        x = panel * (width + 30) + left + (sparsity - low) / (high - low) * (width - left - 10)
        return f"{x:.1f},{top + (1 - speedup / most) * (height - top - 40):.1f}"

    def text(panel, sparsity, speedup, words, anchor="middle", dy=4, colour="#444"):
        x, y = point(panel, sparsity, speedup).split(",")
        return f'<text x="{x}" y="{y}" dy="{dy}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    parts = []
    for panel, (prefix, title) in enumerate(formats.items()):
        here = [row for row in rows if row["format"].startswith(prefix)]
        parts.append(text(panel, (low + high) / 2, most, f"{title}, {layer}, {result['device']}", dy=-12))
        for speedup in range(int(most) + 1):
            ends = f"{point(panel, low, speedup)} {point(panel, high, speedup)}"
            parts.append(f'<polyline points="{ends}" stroke="#ddd" fill="none"/>')
            parts.append(text(panel, low, speedup, f"{speedup}x", "end", 4))
        for sparsity in (0.5, 0.6, 0.7, 0.8):
            parts.append(text(panel, sparsity, 0, f"{sparsity:.0%}", dy=16))
        lines = {"bytes": sorted({(row["sparsity"], row["byte_limit"]) for row in here})}
        for n in sorted({row["batch"] for row in here}):
            lines[f"n = {n}"] = sorted((row["sparsity"], row["speedup"]) for row in here if row["batch"] == n)
        for i, (name, points) in enumerate(lines.items()):
            colour = "#888" if name == "bytes" else COLOURS[(i - 1) % len(COLOURS)]
            dash = ' stroke-dasharray="5 4"' if name == "bytes" else ""
            line = " ".join(point(panel, *p) for p in points)
            parts.append(f'<polyline points="{line}" stroke="{colour}" stroke-width="2" fill="none"{dash}/>')
            parts.append(text(panel, low + 0.01, most * (0.96 - 0.07 * i), name, "start", 4, colour))
    size = f'width="{2 * width + 30}" height="{height}"'
    style = 'font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    print(table(result))
    if args.plot:
        args.plot.write_text(plot(result))


if __name__ == "__main__":
    main()

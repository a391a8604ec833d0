"""Quality after one-shot pruning: methods by patterns by calibration seeds, on two texts.

    python scripts/reproduce_quality.py --texts pydoc other.txt [--methods sparsegpt alps] [--patterns 0.6 2:4]

Every method prunes the same model with the same windows, once for each seed. Of each result the perplexity on every
text, the divergence of its predictions from the dense model's on the first one (Kullback-Leibler, nats a token), the
seconds of the command's process, those of processor that it took, and its peak memory are kept; the table has means and
standard deviations over seeds. Calibration is on the first text's calibration part, unless --calibration says
otherwise: the other texts are of domains that the method never saw.

A row is written as soon as it is there, and a run that was stopped goes on after it. Pruned models are removed once
they were measured. On a GPU host: --model meta-llama/Llama-2-7b-hf --texts hf:wikitext hf:c4 --samples 128
--sequence-length 2048 --windows 0.
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench_prune import jprune
from machine import describe
from plot_run import draw

from jprune.checkpoints import Checkpoint, load
from jprune.data.for_model import evaluation_windows
from jprune.evaluate.distance import Reference

ADMM = ["admm", "--iterations", "10", "--damping", "0.1", "--dense-targets", "0.5"]
ALPS = ["alps", "--damping", "0.1", "--dense-targets", "0.5"]

METHODS: dict[str, list[str]] = {
    "magnitude": ["magnitude"],
    "wanda": ["wanda"],
    "sparsegpt": ["sparsegpt"],
    "sparsegpt, refit 4": ["sparsegpt", "--refit", "4", "--damping", "0.1"],
    "sparsegpt, refit": ["sparsegpt", "--refit", "10", "--damping", "0.1"],
    "sparsegpt, refit, dense targets": ["sparsegpt", "--refit", "10", "--damping", "0.1", "--dense-targets", "0.5"],
    "admm": ["admm", "--iterations", "10", "--damping", "0.1"],
    "admm, dense targets": [*ADMM],
    "admm, dense targets, dlp": [*ADMM, "--allocate", "dlp"],
    "admm, dense targets, loss": [*ADMM, "--allocate", "loss"],
    "admm, dense targets, reconstruct": [*ADMM, "--reconstruct", "8"],
    "alps, dense targets": [*ALPS],
    "alps, damping 0.2, dense targets": ["alps", "--damping", "0.2", "--dense-targets", "0.5"],
    "alps, dense targets, loss": [*ALPS, "--allocate", "loss"],
}
"""Words of `jprune prune` by the name of the row."""

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.6", "0.7", "2:4", "4:8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--texts", nargs="+", default=["pydoc"], help="the first is calibrated on")
    parser.add_argument("--calibration", help="by default the calibration part of the first text")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="of every text; 0 for all")
    parser.add_argument("--divergence-windows", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    args = parser.parse_args()
    chosen = ("methods", "patterns", "seeds")  # which rows there are, and not what is in them
    result: dict[str, Any] = {"machine": describe(), "options": {}, "dense": None, "rows": []}
    result["options"] = {k: v for k, v in vars(args).items() if k not in ("out", *chosen)}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if before["options"] != result["options"]:
            raise SystemExit(f"{args.out} has rows of other options; give another --out, or remove it")
        result = before
    result["dense"] = result["dense"] or {text: perplexity(args.model, text, args) for text in args.texts}
    known = {(row["method"], row["pattern"], row["seed"]) for row in result["rows"]}
    for seed in args.seeds:
        for pattern in args.patterns:
            for method in args.methods:
                if (method, pattern, seed) not in known:
                    row = {"method": method, "pattern": pattern, "seed": seed, **measure(method, pattern, seed, args)}
                    result["rows"].append(row)
                    print(json.dumps(row), flush=True)
                    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    args.out.with_suffix(".svg").write_text(plot(result), encoding="utf-8")


def measure(method: str, pattern: str, seed: int, args: argparse.Namespace) -> Row:
    """Prunes, and measures what came out."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "pruned"
        words = ["prune", *METHODS[method][:1], args.model, *METHODS[method][1:], "--seed", str(seed)]
        words += ["--pattern" if ":" in pattern else "--sparsity", pattern, "--out", str(out)]
        if method != "magnitude":
            words += ["--calibration", args.calibration or args.texts[0], "--samples", str(args.samples)]
            words += ["--sequence-length", str(args.sequence_length)]
        said = jprune(*words)
        row = {
            "perplexity": {text: perplexity(str(out), text, args) for text in args.texts},
            "divergence": divergence(load(args.model), load(out), args),
            "seconds": said["process_seconds"],
            "processor_seconds": said["processor_seconds"],
            "peak_memory_bytes": said["peak_memory_bytes"],
            "sparsity": said["sparsity"]["achieved"],
        }
        shutil.rmtree(out)
        return row


def perplexity(model: str, text: str, args: argparse.Namespace) -> float:
    words = ["eval", "perplexity", model, "--text", text, "--sequence-length", str(args.sequence_length)]
    return jprune(*words, *(["--windows", str(args.windows)] if args.windows else []))["perplexity"]


def divergence(dense: Checkpoint, pruned: Checkpoint, args: argparse.Namespace) -> float:
    """Mean over predicted tokens of KL(dense's predictions || the pruned model's), in nats."""
    length, count = args.sequence_length, args.divergence_windows
    windows = evaluation_windows(dense, args.texts[0], length=length, count=count).tokens
    return float(Reference(dense, windows).to(pruned).divergence.mean())


def summary(rows: list[Row], texts: list[str]) -> Row:
    """Means and standard deviations over seeds."""
    found: Row = {"seeds": len(rows)}
    columns = {text: [row["perplexity"][text] for row in rows] for text in texts}
    columns |= {
        name: [row[name] for row in rows]
        for name in ("divergence", "seconds", "processor_seconds", "peak_memory_bytes")
    }
    for name, values in columns.items():
        found[name] = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan
    return found


def by_method(result: Row) -> dict[tuple[str, str], Row]:
    """What was found of each pattern and method."""
    groups: dict[tuple[str, str], list[Row]] = {}
    methods = list(METHODS)
    for row in sorted(result["rows"], key=lambda row: (row["pattern"], methods.index(row["method"]), row["seed"])):
        groups.setdefault((row["pattern"], row["method"]), []).append(row)
    return {key: summary(rows, result["options"]["texts"]) for key, rows in groups.items()}


def table(result: Row) -> str:
    """Markdown, perplexities beside what they are of SparseGPT's."""
    texts = result["options"]["texts"]
    names = " | ".join(f"perplexity, {Path(text).name}" for text in texts)
    lines = [f"| | {names} | divergence | processor seconds | GB | seeds |"]
    lines.append("| --- " * (len(texts) + 5) + "|")
    lines.append("| dense | " + " | ".join(f"{result['dense'][text]:.2f}" for text in texts) + " | 0 | - | - | - |")
    for (pattern, method), row in by_method(result).items():
        cells = [spread(row[text], 2) + of_sparsegpt(result["rows"], method, pattern, text) for text in texts]
        cells += [spread(row["divergence"], 3), f"{row['processor_seconds'][0]:.0f}"]
        cells += [f"{row['peak_memory_bytes'][0] / 1e9:.2f}", str(row["seeds"])]
        lines.append(f"| {pattern}, {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_sparsegpt(rows: list[Row], method: str, pattern: str, text: str) -> str:
    """How far the mean is from SparseGPT's, in percent, over the seeds that both have; nothing where there is none."""
    of_pattern = [row for row in rows if row["pattern"] == pattern]
    ours = {row["seed"]: row["perplexity"][text] for row in of_pattern if row["method"] == method}
    base = {row["seed"]: row["perplexity"][text] for row in of_pattern if row["method"] == "sparsegpt"}
    shared = ours.keys() & base.keys()
    if method == "sparsegpt" or not shared:
        return ""
    share = sum(ours[seed] for seed in shared) / sum(base[seed] for seed in shared)
    seeds = "" if len(shared) == len(ours) else f", {len(shared)} of the seeds"
    return f" ({100 * (share - 1):+.1f} %{seeds})"


def spread(found: tuple[float, float], digits: int) -> str:
    """A mean, and the deviation where there are several seeds."""
    mean, deviation = (f"{x:.{digits}f}" for x in found)
    return mean if math.isnan(found[1]) else f"{mean} ± {deviation}"


def plot(result: Row) -> str:
    """Perplexity's logarithm over the sparsity, a line a method and a panel a text."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for text in result["options"]["texts"]:
        panel = panels.setdefault(f"log10 perplexity, {Path(text).name}, % zeros", {})
        for (pattern, method), row in by_method(result).items():
            if ":" not in pattern:
                panel.setdefault(method, [(0, math.log10(result["dense"][text]))])
                panel[method].append((round(100 * float(pattern)), math.log10(row[text][0])))
    return draw(panels)


if __name__ == "__main__":
    main()

"""What training wins back after pruning, by method: one-shot, one-shot and tuned, in rounds, structured, with LoRA.

    python scripts/reproduce_recovery.py [--steps 60] [--out docs/results/recovery.json]

Unstructured: one-shot SparseGPT and magnitude; the same, tuned afterwards for `--steps`; and Prune-and-Tune, whose
rounds share the same number of steps. Structured, as many heads and channels of every layer: LLM-Pruner, the same with
LoRA afterwards, and LoRAPrune, its frozen weights in float32 and in int8. All training is on `--data`, on as many
windows a step and tokens a window; perplexity is measured on `--text`. The two must share nothing: of `pydoc` and of
`hf:` sources each takes its own part.

Each command is a process of its own, so that peak memory is its own; a row that needs two has the sum of their seconds
and the higher of their peaks. A row is written as soon as it is there, and a run that was stopped, or is to have more
rows of the same options, goes on after it, with the models in --work, which stay. Beside --out lies a plot, .svg.

The defaults are for two CPU cores and the demo model. A host with a GPU would take the authors' model and texts:

    python scripts/reproduce_recovery.py --model facebook/opt-125m --data hf:wikitext --text hf:wikitext \\
        --calibration hf:c4 --samples 128 --sequence-length 2048 --rounds 0,0.1,0.3,0.5,0.7 --steps 500 \\
        --batch-size 16 --tune-length 512 --learning-rate 2e-5 --lora-learning-rate 1e-4 --windows 0
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench_prune import jprune
from machine import describe
from plot_run import draw

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pruners", nargs="*", default=["sparsegpt", "magnitude"])
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.5, 0.7])
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.2, 0.5], help="of heads and channels")
    parser.add_argument(
        "--rounds", nargs="*", default=["0.3,0.5,0.7", "0.5,0.6,0.7"], help="sparsities, one or more lists"
    )
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512, help="of calibration and evaluation")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--text", default="pydoc", help="perplexity is measured on it")
    parser.add_argument("--windows", type=int, default=24, help="of it; 0 for all")
    parser.add_argument("--steps", type=int, default=60, help="of training, over all rounds")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--tune-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--lora-learning-rate", type=float, default=5e-4)
    parser.add_argument("--work", type=Path, default=Path("recovery-models"), help="models are here while it runs")
    parser.add_argument("--out", type=Path, default=Path("recovery.json"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    table = Table(args)
    table.row("dense", 0.0, lambda: {"seconds": 0.0, "peak_memory_bytes": None, "model": args.model})
    for sparsity in args.sparsities:
        for pruner in args.pruners:
            one_shot = table.row(pruner, sparsity, partial(prune, pruner, sparsity, args))
            table.row(f"{pruner}, tuned", sparsity, partial(tune, one_shot, "full", args))
            for rounds in schedules(sparsity, args):
                name = f"prune-and-tune {rounds}, {pruner}"
                table.row(name, sparsity, partial(in_rounds, pruner, sparsity, rounds, args))
    for ratio in args.ratios:
        small = table.row("llm-pruner", ratio, partial(shrink, ratio, args))
        table.row("llm-pruner, lora", ratio, partial(tune, small, "lora", args))
        table.row("loraprune", ratio, partial(loraprune, ratio, "float32", args))
        table.row("loraprune, int8", ratio, partial(loraprune, ratio, "int8", args))
    table.show()
    args.out.with_suffix(".svg").write_text(plot(table.rows), encoding="utf-8")


class Table:
    """The rows that there are, in a file that is there after each."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        chosen = ("pruners", "sparsities", "ratios", "rounds")  # which rows there are, and not what is in them
        options = {k: v for k, v in vars(args).items() if k not in ("work", "out", *chosen)}
        self._result: dict[str, Any] = {"machine": describe(), "options": options, "rows": []}
        if args.out.exists():
            before = json.loads(args.out.read_text())
            if before["options"] != options:
                raise SystemExit(f"{args.out} has rows of other options; give another --out, or remove it")
            self._result = before

    @property
    def rows(self) -> list[Row]:
        return self._result["rows"]

    def row(self, method: str, sparsity: float, make: Callable[[], Row]) -> Row:
        """The row that is there, or a new one: what `make` says, and the perplexity of the model it names."""
        for row in self.rows:
            if (row["method"], row["sparsity"]) == (method, sparsity):
                return row
        row = {"method": method, "sparsity": sparsity, "tuning_steps": 0, **make()}
        row["perplexity"] = perplexity(row["model"], self._args)
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self._args.out.write_text(json.dumps(self._result, indent=2) + "\n")
        return row

    def show(self) -> None:
        """Prints all rows."""
        print(f"\n{'method':38} {'removed':>8} {'perplexity':>11} {'steps':>6} {'seconds':>8} {'peak GB':>8}")
        for row in self.rows:
            peak = f"{row['peak_memory_bytes'] / 1e9:.2f}" if row["peak_memory_bytes"] else "-"
            print(
                f"{row['method']:38} {100 * row['sparsity']:7.0f}% {row['perplexity']:11.3f} {row['tuning_steps']:6} "
                f"{row['seconds']:8.0f} {peak:>8}"
            )


def prune(pruner: str, sparsity: float, args: argparse.Namespace) -> Row:
    out = args.work / f"{pruner}-{sparsity:g}"
    return run(out, "prune", pruner, args.model, "--sparsity", str(sparsity), *calibration(args))


def shrink(ratio: float, args: argparse.Namespace) -> Row:
    out = args.work / f"llm-pruner-{ratio:g}"
    words = ["--ratio", str(ratio), "--uniform", "--calibration", args.calibration]
    words += ["--importance", "param_first", "--no-compensate"]  # as the authors do it, and as in docs/results.md
    return run(out, "prune", "llm-pruner", args.model, *words)


def schedules(sparsity: float, args: argparse.Namespace) -> list[str]:
    """The rounds to a target: of each list the sparsities below it, and itself; none of a single round."""
    lists = ([s for s in map(float, text.split(",")) if s < sparsity] for text in args.rounds)
    return list(dict.fromkeys(",".join(f"{s:g}" for s in [*below, sparsity]) for below in lists if below))


def in_rounds(pruner: str, sparsity: float, rounds: str, args: argparse.Namespace) -> Row:
    count = len(rounds.split(","))
    each = max(1, args.steps // count)
    row = run(
        args.work / f"rounds-{rounds}-{pruner}",
        *("prune", "prune-and-tune", args.model, "--sparsity", str(sparsity), "--rounds", rounds),
        *("--pruner", pruner, "--steps", str(each), "--batch-size", str(args.batch_size), "--data", args.data),
        *("--tune-length", str(args.tune_length), "--learning-rate", str(args.learning_rate), *calibration(args)),
        *("--checkpoint-every", str(each)),
    )
    return row | {"tuning_steps": each * count}


def tune(before: Row, way: str, args: argparse.Namespace) -> Row:
    """The row of a model that is tuned; what was spent on it before is part of it."""
    if not Path(before["model"]).exists():
        raise SystemExit(f"{before['model']} is gone; remove its row from {args.out}, or all of them")
    rate = args.lora_learning_rate if way == "lora" else args.learning_rate
    row = run(
        Path(f"{before['model']}-{way}"),
        *("tune", way, before["model"], "--steps", str(args.steps), *training(args), "--learning-rate", str(rate)),
    )
    return {
        **row,
        "tuning_steps": args.steps,
        "seconds": round(before["seconds"] + row["seconds"], 3),
        "peak_memory_bytes": max(before["peak_memory_bytes"], row["peak_memory_bytes"]),
    }


def loraprune(ratio: float, dtype: str, args: argparse.Namespace) -> Row:
    """LoRAPrune with its frozen weights in `dtype`."""
    every = max(1, min(10, args.steps // 10))  # a short run has to choose as often
    row = run(
        args.work / f"loraprune-{ratio:g}-{dtype}",
        *("prune", "loraprune", args.model, "--ratio", str(ratio), "--uniform", "--every", str(every)),
        *("--base-dtype", dtype),
        *("--steps", str(args.steps), *training(args), "--learning-rate", str(args.lora_learning_rate)),
    )
    return row | {"tuning_steps": args.steps}


def calibration(args: argparse.Namespace) -> list[str]:
    words = ["--calibration", args.calibration, "--samples", str(args.samples)]
    return [*words, "--sequence-length", str(args.sequence_length)]


def training(args: argparse.Namespace) -> list[str]:
    words = ["--data", args.data, "--batch-size", str(args.batch_size), "--sequence-length", str(args.tune_length)]
    return [*words, "--checkpoint-every", str(args.steps)]  # no time for what nobody resumes


def run(out: Path, *words: str) -> Row:
    """Runs a command; what its row says, with its rounds and the parameters that are left where it tells them."""
    said = jprune(*words, "--out", str(out), "--overwrite")
    if "parameters" in said:
        left = said["parameters"]
        said["parameters"] = left["after"] if isinstance(left, dict) else left
    return {
        "model": str(out),
        "seconds": said["process_seconds"],
        "peak_memory_bytes": said["peak_memory_bytes"],
        **{name: said[name] for name in ("rounds", "parameters") if name in said},
    }


def perplexity(model: str, args: argparse.Namespace) -> float:
    words = ["eval", "perplexity", model, "--text", args.text, "--sequence-length", str(args.sequence_length)]
    return jprune(*words, *(["--windows", str(args.windows)] if args.windows else []))["perplexity"]


def plot(rows: list[Row]) -> str:
    """Perplexity over what was removed, its logarithm: some methods are off by orders of magnitude."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows[1:]:
        structured = "lora" in row["method"] or "llm" in row["method"]
        title = f"log10 perplexity, {'% of heads and channels' if structured else '% zeros'}"
        start = [(0, math.log10(rows[0]["perplexity"]))]
        points = panels.setdefault(title, {}).setdefault(row["method"], start)
        points.append((round(100 * row["sparsity"]), math.log10(row["perplexity"])))
    return draw(panels)


if __name__ == "__main__":
    main()

"""Shearing a real model, against LLM-Pruner at as many parameters and against the same shape from random weights.

    python scripts/reproduce_shearing.py [--steps 200] [--train-steps 120] [--out docs/results/shearing_cpu.json]

The demo model is sheared to two thirds of its layers, heads, channels and hidden dimensions, and trained on.
LLM-Pruner's model, with at most as many parameters, and a model of the sheared shape with random weights are trained
for the tokens of both of shearing's phases. All training is on `--data`, all parameters; perplexity is measured on
`--text`, which must share nothing with it: of `pydoc` and of `hf:` sources each takes its own part. Each command is a
process of its own.

A row is written as soon as it is there, and a run that was stopped goes on after it, with the models in --work, which
stay. The defaults are for half an hour on two CPU cores. On a GPU host: --model meta-llama/Llama-2-7b-hf --data
hf:DATASET --text hf:wikitext --steps 3200 --train-steps 48000 --batch-size 32 --length 4096 --mask-momentum 0.9.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_prune import jprune
from machine import describe

from jprune import trees
from jprune.checkpoints import formats, load, record
from jprune.models import decoder
from jprune.structured.shape import Shape
from jprune.tuning.masked_model import shape_of

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--target", help="as of `jprune prune shearing`; by default two thirds of every size")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--text", default="pydoc", help="perplexity is measured on it")
    parser.add_argument("--windows", type=int, default=24, help="of it; 0 for all")
    parser.add_argument("--evaluate-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200, help="of the mask phase")
    parser.add_argument("--train-steps", type=int, default=120, help="afterwards")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--random-learning-rate", type=float, default=1e-3, help="from random weights")
    parser.add_argument("--mask-learning-rate", type=float, default=0.3)
    parser.add_argument("--mask-momentum", type=float, default=0.0)
    parser.add_argument("--work", type=Path, default=Path("shearing-models"))
    parser.add_argument("--out", type=Path, default=Path("shearing.json"))
    args = parser.parse_args()
    args.target = args.target or str(two_thirds(shape_of(load(args.model, weights=False))))
    args.work.mkdir(parents=True, exist_ok=True)
    table = Table(args)
    table.row("dense", lambda: {"model": args.model, "tokens": 0, "seconds": 0.0})
    masks = table.row("shearing, mask phase", lambda: shear(args))
    table.row("shearing", lambda: tune(masks, "sheared", args.train_steps, args.learning_rate, args))
    both = args.steps + args.train_steps
    cut = table.row("llm-pruner, not trained", lambda: llm_pruner(masks["parameters"]["after"], args))
    table.row("llm-pruner", lambda: tune(cut, "llm-pruner-trained", both, args.learning_rate, args))
    random = table.row("random weights, not trained", lambda: random_weights(masks, args))
    table.row("random weights", lambda: tune(random, "random-trained", both, args.random_learning_rate, args))
    table.show()


def two_thirds(source: Shape) -> Shape:
    """Of every size; a KV head goes with its query heads."""
    kv_heads = max(1, source.kv_heads * 2 // 3)
    return Shape(
        layers=max(1, source.layers * 2 // 3),
        hidden=source.hidden * 2 // 3,
        heads=source.heads // source.kv_heads * kv_heads,
        kv_heads=kv_heads,
        intermediate=source.intermediate * 2 // 3,
    )


class Table:
    """The rows that there are, in a file that is there after each."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        options = {name: value for name, value in vars(args).items() if name not in ("work", "out")}
        self._result: dict[str, Any] = {"machine": describe(), "options": options, "rows": []}
        if args.out.exists():
            before = json.loads(args.out.read_text())
            if before["options"] != options:
                raise SystemExit(f"{args.out} has rows of other options; give another --out, or remove it")
            self._result = before

    def row(self, name: str, make: Callable[[], Row]) -> Row:
        """The row that is there, or a new one, with the perplexity of the model that it names."""
        for row in self._result["rows"]:
            if row["name"] == name:
                return row
        row = {"name": name, **make()}
        row["perplexity"] = perplexity(row["model"], self._args)
        self._result["rows"].append(row)
        print(json.dumps(row), flush=True)
        self._args.out.write_text(json.dumps(self._result, indent=2) + "\n")
        return row

    def show(self) -> None:
        """Prints all rows."""
        print(f"\n{'model':28} {'parameters':>12} {'tokens':>10} {'perplexity':>11} {'seconds':>8}")
        for row in self._result["rows"]:
            count = row["parameters"]["after"] if "parameters" in row else "-"
            print(f"{row['name']:28} {count:>12} {row['tokens']:10} {row['perplexity']:11.2f} {row['seconds']:8.0f}")


def training(args: argparse.Namespace) -> list[str]:
    words = ["--data", args.data, "--batch-size", str(args.batch_size), "--sequence-length", str(args.length)]
    return [*words, "--schedule", "cosine"]


def shear(args: argparse.Namespace) -> Row:
    words = ["--target", args.target, "--steps", str(args.steps), "--learning-rate", str(args.learning_rate)]
    words += ["--mask-learning-rate", str(args.mask_learning_rate), "--mask-momentum", str(args.mask_momentum)]
    out = args.work / "masked"
    words += ["--checkpoint-every", str(max(1, args.steps // 2))]  # the state is twelve bytes a parameter
    said = jprune("prune", "shearing", args.model, *words, *training(args), "--resume", "--out", str(out))
    return {
        "model": str(out),
        "tokens": args.steps * args.batch_size * args.length,
        "seconds": said["process_seconds"],
        **{name: said[name] for name in ("parameters", "target", "expected", "peak_memory_bytes")},
    }


def llm_pruner(parameters: int, args: argparse.Namespace) -> Row:
    out = args.work / "llm-pruner"
    words = ["--parameters", str(parameters), "--uniform", "--calibration", args.data, "--overwrite"]
    words += ["--importance", "param_first", "--no-compensate"]  # as the authors do it, and as in docs/results.md
    said = jprune("prune", "llm-pruner", args.model, *words, "--out", str(out))
    return {
        "model": str(out),
        "tokens": 0,
        "seconds": said["process_seconds"],
        "parameters": said["parameters"],
        "sizes": said["sizes"][0],
    }


def random_weights(like: Row, args: argparse.Namespace) -> Row:
    """A model of the sheared shape as it is before any training."""
    checkpoint, out = load(like["model"]), args.work / "random"
    if not out.exists():
        out.mkdir()
        params = trees.flatten(decoder.init_params(checkpoint.config, jax.random.key(0)))
        with formats.writer(out, checkpoint, dtypes=dict.fromkeys(checkpoint.shapes, np.dtype("float32"))) as writer:
            for path in checkpoint.shapes:
                writer.write(path, np.asarray(params[path]))
        record.write(out, {"notices": ["random weights"]})
    return {"model": str(out), "tokens": 0, "seconds": 0.0, "parameters": like["parameters"]}


def tune(before: Row, name: str, steps: int, rate: float, args: argparse.Namespace) -> Row:
    """The row of a model that is trained; what was spent on it before is part of it."""
    out = args.work / name
    words = ["--steps", str(steps), "--learning-rate", str(rate), "--resume", "--out", str(out)]
    words += ["--checkpoint-every", str(steps)]
    said = jprune("tune", "full", before["model"], *words, *training(args))
    return {
        "model": str(out),
        "tokens": before["tokens"] + steps * args.batch_size * args.length,
        "seconds": round(before["seconds"] + said["process_seconds"], 3),
        "parameters": before["parameters"],
        "peak_memory_bytes": said["peak_memory_bytes"],
    }


def perplexity(model: str, args: argparse.Namespace) -> float:
    words = ["eval", "perplexity", model, "--text", args.text, "--sequence-length", str(args.evaluate_length)]
    return jprune(*words, *(["--windows", str(args.windows)] if args.windows else []))["perplexity"]


if __name__ == "__main__":
    main()

"""LLM-Pruner on the demo model: every importance at the same size, before recovery, and the best of them after it.

    python scripts/reproduce_llm_pruner.py [--parameter-ratio 0.2] [--tune-steps 150] [--keep FOLDER] [--out out.json]

Each model is pruned by a `jprune` process of its own, as a user would; perplexities are measured on the same held-out
windows (the evaluation part of `pydoc`). Recovery is `jprune tune lora` on the other part of `pydoc`, from which the
ten texts for importance are drawn as well. "random" is the mean of three seeds. On a GPU host, give the model, texts
and steps of the paper: --model, --data, --tune-steps.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from bench_prune import jprune
from machine import describe

IMPORTANCE = ["param_first", "param_second", "param_mix", "vectorize", "l1", "l2", "random"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--parameter-ratio", type=float, default=0.2)
    parser.add_argument("--importance", nargs="+", default=IMPORTANCE, choices=IMPORTANCE)
    parser.add_argument("--no-compensate", action="store_true", help="leave all weights as they are, as the authors do")
    parser.add_argument("--tune", nargs="*", default=["param_second"], help="which of them to recover")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--text", default="pydoc", help="perplexity is measured on it")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--tune-steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the tuning")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tune-length", type=int, default=256)
    parser.add_argument("--keep", type=Path, help="where the models stay; by default they are thrown away")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "keep")}
    result: dict[str, Any] = {"machine": describe(), "options": options, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(exist_ok=True, parents=True)
        dense = perplexity(args.model, args)
        add(result, args, {"importance": "none", "tuned": False, "perplexity": dense})
        for importance in args.importance:
            seeds = [0, 1, 2] if importance == "random" else [42]
            rows = [prune(folder / f"{importance}-{seed}", importance, seed, args) for seed in seeds]
            row = rows[0] | {"perplexity": sum(r["perplexity"] for r in rows) / len(rows)}
            if len(rows) > 1:
                row["perplexities"] = [r["perplexity"] for r in rows]
            add(result, args, row)
            if importance in args.tune:
                add(result, args, row | tune(folder / f"{importance}-{seeds[0]}", folder / f"{importance}-tuned", args))


def add(result: dict[str, Any], args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Shows a row and saves what there is so far."""
    result["rows"].append(row)
    print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def prune(out: Path, importance: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    said = jprune(
        *("prune", "llm-pruner", args.model, "--out", str(out), "--overwrite", "--calibration", args.data),
        *("--parameter-ratio", str(args.parameter_ratio), "--importance", importance, "--seed", str(seed)),
        *(["--no-compensate"] if args.no_compensate else []),
    )
    return {
        "importance": importance,
        "tuned": False,
        "parameters": said["parameters"],
        "perplexity": perplexity(str(out), args),
        "seconds": said["process_seconds"],
        "peak_memory_bytes": said["peak_memory_bytes"],
    }


def tune(model: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    said = jprune(
        *("tune", "lora", str(model), "--out", str(out), "--overwrite", "--data", args.data),
        *("--steps", str(args.tune_steps), "--batch-size", str(args.batch_size)),
        *("--sequence-length", str(args.tune_length), "--learning-rate", str(args.learning_rate)),
    )
    return {
        "tuned": True,
        "perplexity": perplexity(str(out), args),
        "tuning_steps": args.tune_steps,
        "tuning_tokens": args.tune_steps * args.batch_size * args.tune_length,
        "seconds": said["process_seconds"],
        "peak_memory_bytes": said["peak_memory_bytes"],
    }


def perplexity(model: str, args: argparse.Namespace) -> float:
    words = ["eval", "perplexity", model, "--text", args.text, "--sequence-length", str(args.sequence_length)]
    return jprune(*words)["perplexity"]


if __name__ == "__main__":
    main()

"""What `jprune compare` takes in memory, held against a block of each of the two models.

    python scripts/bench_compare.py [--shape llama-7b] [--layers 1 3] [--out compare_cpu.json]

Two models of a shape with random weights (`make_checkpoint`), half of the second one's zero, go through the command
in a process of its own, whose high-water mark is its peak. What the same command takes for two tiny models is the
process's own, and taken off. Two numbers of layers show that memory does not grow with depth.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import make_checkpoint
import numpy as np
from bench_packed import half_of_random
from machine import describe

from jprune.checkpoints import load

RUN = """import runpy
from jprune.runs.stopwatch import peak_memory_bytes
try:
    runpy.run_module("jprune", run_name="__main__")
finally:
    print(peak_memory_bytes())
"""
"""The command, and then its peak. What the parent would be told of it begins with the parent's own memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-7b", choices=make_checkpoint.WIDTHS)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--folder", type=Path, help="for the checkpoints, which are removed; by default /tmp")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name not in ("out", "folder")}
    result: dict[str, Any] = {"machine": describe(), "options": options, "rows": []}
    for dtype in args.dtypes:
        own = compare("tiny", 2, dtype, args)["peak_memory_bytes"]
        for layers in args.layers:
            row = compare(args.shape, layers, dtype, args)
            row |= {"own_bytes": own, "more_bytes": row["peak_memory_bytes"] - own}
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                args.out.write_text(json.dumps(result, indent=2) + "\n")


def compare(shape: str, layers: int, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run of the command: its peak, and what a block and a head of each model take."""
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        config = make_checkpoint.hf_config("llama", shape) | {"num_hidden_layers": layers}
        make_checkpoint.write(folder / "dense", make_checkpoint.random_checkpoint(config))
        half_of_random(folder / "pruned", shape, layers)
        length = min(args.sequence_length, config["max_position_embeddings"])
        tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (args.windows, length), dtype=np.int32)
        np.save(folder / "tokens.npy", tokens)
        words = ["compare", folder / "dense", folder / "pruned", "--text", folder / "tokens.npy", "--dtype", dtype]
        words += ["--sequence-length", length, "--out", folder / "report.html"]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", RUN, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True
        )
        model = load(folder / "dense")
        width = {"float32": 4, "bfloat16": 2}[dtype]
        block = [path for path in model.shapes if path.startswith("blocks/0/")]
        return {
            "shape": shape,
            "layers": layers,
            "dtype": dtype,
            "peak_memory_bytes": int(done.stdout.splitlines()[-1]),
            "blocks_bytes": 2 * width * model.count(block),
            "blocks_float32_bytes": 2 * 4 * model.count(block),
            "blocks_stored_bytes": 2 * sum(model.read(path).nbytes for path in block),
            "heads_bytes": 2 * width * model.count(["head/kernel"]),
            "seconds": time.perf_counter() - start,
        }


if __name__ == "__main__":
    main()

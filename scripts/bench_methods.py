"""What methods that solve for weights make of one block, and what they take for it: error, seconds, memory.

    python scripts/bench_methods.py [--shape llama-7b] [--methods sparsegpt alps] [--sparsity 0.6] [--out methods.json]

All prune the same random kernels with the same Gram matrices (lognormal scales plus a low-rank part, so inputs are
correlated), kernels that read one input together. Each method has a process of its own, which prunes the block once to
compile and then once more, timed; or with --once only once, for blocks beside which compiling is little. The error is
that of the outputs, ||X (W - W')||^2 over ||X W||^2, from the Gram matrix and measured by us for all of them alike.
Memory is the most that the process had, less what it had with everything loaded and nothing pruned.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from blocks_to_solve import SHAPES, random_gram, random_kernels
from machine import describe

METHODS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "sparsegpt": ("SparseGPT", {}),
    "sparsegpt, refit": ("SparseGPT", {"refit": 10}),
    "admm": ("Admm", {}),
    "alps": ("Alps", {}),
}
"""Classes of `jprune.methods` and their options, by the name of the row."""


def block(shape: str, only: Sequence[str]) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """A Gram matrix and kernels for every input of the block."""
    rng = np.random.default_rng(0)
    return [
        (random_gram(rng, d_in), random_kernels(rng, d_in, outputs))
        for d_in, outputs in SHAPES[shape]
        if not only or set(only) & set(outputs)
    ]


def measure(method: str, args: argparse.Namespace, answer: Any) -> None:
    """Prunes, in a process of its own."""
    import jax
    import jax.numpy as jnp

    from jprune import Unstructured, methods
    from jprune.runs.stopwatch import peak_memory_bytes
    from jprune.statistics import Gram

    name, options = METHODS[method]
    prunes = getattr(methods, name)(**options)
    inputs = [
        (jnp.asarray(gram), {name: jnp.asarray(x) for name, x in kernels.items()})
        for gram, kernels in block(args.shape, args.kernels)
    ]
    before = peak_memory_bytes()

    def run() -> list[dict[str, Any]]:
        found = []
        for gram, kernels in inputs:
            patterns = dict.fromkeys(kernels, Unstructured(args.sparsity))
            found.append(prunes.together(kernels, Gram(gram, jnp.int32(2048)), patterns, {}))
        return jax.block_until_ready(found)

    if not args.once:
        run()
    start, used = time.perf_counter(), time.process_time()
    pruned = run()
    seconds, processor = time.perf_counter() - start, time.process_time() - used
    peak = peak_memory_bytes()
    kernels = {}
    for (gram, dense), made in zip(inputs, pruned, strict=True):
        gram = np.asarray(gram)
        for name, kernel in dense.items():
            whole, lost = np.asarray(kernel), np.asarray(kernel) - np.asarray(made[name].kernel)
            kernels[name] = {
                "shape": whole.shape,
                "error": float(np.vdot(lost, gram @ lost) / np.vdot(whole, gram @ whole)),
                "zeros": float(np.mean(np.asarray(made[name].kernel) == 0)),
            }
    answer.send(
        {
            "method": method,
            "seconds": seconds,
            "processor_seconds": processor,
            "memory_bytes": peak - before,
            "kernels": kernels,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument(
        "--kernels", nargs="+", default=[], help="of these, and those that read the same; by default all"
    )
    parser.add_argument("--once", action="store_true", help="time the first call, which compiles too")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": describe(), "options": vars(args) | {"out": None}, "rows": []}
    context = multiprocessing.get_context("spawn")
    for method in args.methods:
        ours, theirs = context.Pipe()
        process = context.Process(target=measure, args=(method, args, theirs))
        process.start()
        theirs.close()
        row = ours.recv()  # EOFError, if the process failed, after it said why
        process.join()
        result["rows"].append(row)
        errors = ", ".join(f"{name} {own['error']:.4f}" for name, own in row["kernels"].items())
        print(
            f"{method:18} {row['seconds']:8.2f} s, {row['processor_seconds']:8.2f} of processor, "
            f"{row['memory_bytes'] / 1e9:.2f} GB more; error: {errors}",
            flush=True,
        )
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

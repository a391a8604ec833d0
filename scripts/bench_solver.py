"""Times the SparseGPT solver over the kernels of one block against plain PyTorch, in the same run.

    python scripts/bench_solver.py [--shapes smollm2-135m llama-7b] [--repeats 5] [--out results.json]

Both solve the same random kernels with the same Gram matrices (lognormal scales plus a low-rank part, so inputs are
correlated). jprune factorises once per distinct input and solves q, k, v and gate, up together; the baseline treats
each kernel by itself. Their losses and masks are compared too: the baseline prunes one more element per block of 128
inputs, so small differences are expected.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from blocks_to_solve import SHAPES, random_gram, random_kernels
from machine import describe
from torch_sparsegpt import prune_kernel

from jprune import Unstructured
from jprune.solvers.sparsegpt import factorise, sweep


def ours(gram: jax.Array, kernels: list[jax.Array], sparsity: float):
    return jax.block_until_ready(sweep(kernels, factorise(gram, 0.01), [Unstructured(sparsity)] * len(kernels)))


def bench(shapes: list, sparsity: float, repeats: int) -> dict:
    rng = np.random.default_rng(0)
    rows = []
    for d_in, outputs in shapes:
        gram = random_gram(rng, d_in)
        kernels = list(random_kernels(rng, d_in, outputs).values())
        on_device = [jnp.asarray(k) for k in kernels]
        start = time.perf_counter()
        results = ours(jnp.asarray(gram), on_device, sparsity)
        first = time.perf_counter() - start
        theirs = [torch.tensor(k.T.copy()) for k in kernels]
        jax_seconds, torch_seconds = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            ours(jnp.asarray(gram), on_device, sparsity)
            jax_seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            solved = [prune_kernel(w, torch.tensor(gram), sparsity) for w in theirs]
            torch_seconds.append(time.perf_counter() - start)
        row = {
            "kernels": {name: [d_in, d_out] for name, d_out in outputs.items()},
            "seconds": statistics.median(jax_seconds),
            "first_call_seconds": first,
            "torch_seconds": statistics.median(torch_seconds),
            "loss": [float(r.loss) for r in results],
            "torch_loss": [loss for _, loss in solved],
            "masks_equal": [
                float(np.mean(np.asarray(r.mask) == (w.T.numpy() != 0))) for r, (w, _) in zip(results, solved)
            ],
        }
        row["speedup"] = row["torch_seconds"] / row["seconds"]
        rows.append(row)
        print(
            f"{d_in:6} -> {list(outputs.values())}: {row['seconds']:.3f} s, torch {row['torch_seconds']:.3f} s, "
            f"{row['speedup']:.2f}x, losses {row['loss'][0]:.6g} / {row['torch_loss'][0]:.6g}",
            flush=True,
        )
    total, torch_total = sum(r["seconds"] for r in rows), sum(r["torch_seconds"] for r in rows)
    print(f"one block: {total:.3f} s, torch {torch_total:.3f} s, {torch_total / total:.2f}x")
    return {"kernels": rows, "seconds": total, "torch_seconds": torch_total, "speedup": torch_total / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2-135m", "llama-7b"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5, help="of SmolLM2's shapes; LLaMA's are run a third as often")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict = {"machine": describe(), "sparsity": args.sparsity, "blocks": {}}
    for name in args.shapes:
        print(name)
        repeats = max(1, args.repeats // 3) if name == "llama-7b" else args.repeats
        result["blocks"][name] = bench(SHAPES[name], args.sparsity, repeats)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

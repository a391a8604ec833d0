"""Times calibration of a block of experts that see what they are sent, against all of them seeing every token.

    python scripts/bench_calibrate_experts.py [--shape moe-30b-a3b] [--divide 4] [--repeats 3] [--out results.json]

The programs of `jprune prune` with Gram matrices, stage by stage, by turns in one process: sorted by expert, as a run
on one device has them, and in the form that runs on several devices keep. Random weights and tokens, float32. Memory
is what the largest program takes beside its operands and results, as XLA says.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import make_checkpoint
import numpy as np
from machine import describe

from jprune import devices, trees
from jprune.models import decoder, families
from jprune.pipeline.forecast import programs
from jprune.pipeline.forecast.programs import Spec
from jprune.statistics import Gram
from jprune.trace import matmuls


def calibrated(spec: Spec, params: dict, x: jax.Array, stacks: dict[str, tuple[int, ...]]) -> tuple[float, int, dict]:
    """Seconds of all stages, the most bytes that one takes, and the Grams."""
    carry, found, seconds, most = spec.start((x,)), {}, 0.0, 0
    for stage, own in enumerate(spec.stages().matmuls):
        ids = {m.input_id: m.path for m in own}
        zeros = {i: programs.zero_parts(Gram, 1, spec.sharding, *stacks[path])() for i, path in ids.items()}
        program = programs.observe(spec, stage, stage, True).lower((params,), carry, zeros).compile()
        most = max(most, program.memory_analysis().temp_size_in_bytes)
        start = time.perf_counter()
        carry, seen = jax.block_until_ready(program((params,), carry, zeros))
        seconds += time.perf_counter() - start
        found |= {path: jax.tree.map(np.asarray, seen[i]) for i, path in ids.items()}
    return seconds, most, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="moe-30b-a3b", choices=make_checkpoint.EXPERTS)
    parser.add_argument("--divide", type=int, default=4, help="widths of the shape are divided by this")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = {key: value for key, value in vars(args).items() if key != "out"}
    sizes = make_checkpoint.divided(make_checkpoint.hf_config("llama", args.shape), args.divide)
    config = families.config(sizes | {"num_hidden_layers": 1, "vocab_size": 8})
    params, block = decoder.init_params(config, jax.random.key(0))["blocks"]["0"], decoder.block(config, 0)
    x = jax.random.normal(jax.random.key(1), (args.samples, args.sequence_length, config.d_model))
    shapes = tuple((path, leaf.shape, leaf.dtype) for path, leaf in trees.flatten(params).items())
    stacks = {}
    for m in matmuls(block, params, x, where=lambda path: "router" not in path):
        shape = dict((path, shape) for path, shape, _ in shapes)[m.path]
        stacks[m.path] = (int(np.prod([shape[i] for i in m.in_axes])), *(shape[i] for i in m.batch_axes))
    ways = {
        way: Spec(block, shapes, frozenset(stacks), (x.shape, x.dtype), devices.one_device(), spread=way == "dense")
        for way in ("dense", "sorted")
    }
    row: dict = {way: {"seconds": float("inf")} for way in ways}
    grams: dict = {}
    for _ in range(args.repeats):
        for way, spec in ways.items():
            seconds, row[way]["temporary_bytes"], grams[way] = calibrated(spec, params, x, stacks)
            row[way]["seconds"] = min(row[way]["seconds"], seconds)
    gaps = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(*map(jax.tree.leaves, grams.values()), strict=True)]
    row |= {"difference": float(max(gaps)), "times_as_fast": row["dense"]["seconds"] / row["sorted"]["seconds"]}
    print(json.dumps(row))
    if args.out:
        result = {"machine": describe(), "options": options, "dtype": str(jnp.dtype(x.dtype)), **row}
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

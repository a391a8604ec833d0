"""What the jobs cost in forward passes of the same tokens: the unit that does not depend on the machine.

    python scripts/bench_passes.py [--model demo] [--samples 16] [--sequence-length 512] [--out passes.json]

wanda       calibration and solving, of a forward pass of the blocks; limit 1.2
sparsegpt   the same beyond the forward pass that it contains: Grams and solving; limit 0.45
perplexity  of the windows, head and loss included, of a forward pass of the blocks; limit 1.1
lora        a step of LoRA (all kernels, rank 8), of the perplexity of its windows; limit 3.3

Each is run twice in this process, and the second run counts; they take turns, so that whatever slows the machine down
slows all of them. A forward pass is that of the blocks, one after the other, in the batches that calibration takes.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe

import jprune
from jprune import SparseGPT, Unstructured, Wanda, data
from jprune.checkpoints import Checkpoint
from jprune.evaluate.perplexity import mean_nll
from jprune.models import decoder
from jprune.models.batching import windows_at_once
from jprune.pipeline import prune_model
from jprune.train.step import Functions, micro_batches
from jprune.tuning import Lora

LIMITS = {"wanda": 1.2, "sparsegpt": 0.45, "perplexity": 1.1, "lora": 3.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--step-windows", type=int, default=4, help="of a step of LoRA")
    parser.add_argument("--rounds", type=int, default=3, help="the first of which compiles, the best of the rest count")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    checkpoint = jprune.load(args.model)
    shape = {"samples": args.samples, "length": args.sequence_length}
    tokens = np.asarray(data.calibration("pydoc", checkpoint.tokenizer, **shape).tokens)
    few = tokens[: args.step_windows]
    jobs = {
        "forward": timed(forward(checkpoint, tokens)),
        "wanda": lambda: pruning(checkpoint, tokens, Wanda()),
        "sparsegpt": lambda: pruning(checkpoint, tokens, SparseGPT()),
        "perplexity": timed(lambda: mean_nll(checkpoint, tokens)),
        "perplexity of a step's windows": timed(lambda: mean_nll(checkpoint, few)),
        "lora": timed(lora(checkpoint, few)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(args.rounds):
        for name, job in jobs.items():
            took = job()
            if number:
                seconds[name].append(took)
    best = {name: min(values) for name, values in seconds.items()}
    passes = {
        "wanda": best["wanda"] / best["forward"],
        "sparsegpt": best["sparsegpt"] / best["forward"] - 1,
        "perplexity": best["perplexity"] / best["forward"],
        "lora": best["lora"] / best["perplexity of a step's windows"],
    }
    for name, value in passes.items():
        print(f"{name:12} {value:6.2f} (limit {LIMITS[name]:g})")
    result = {
        "machine": describe(),
        "options": vars(args) | {"out": None},
        "seconds": seconds,
        "passes": passes,
        "within": {name: bool(value <= LIMITS[name]) for name, value in passes.items()},
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def timed(job: Callable[[], Any]) -> Callable[[], float]:
    """The seconds that a job takes."""

    def run() -> float:
        start = time.perf_counter()
        job()
        return time.perf_counter() - start

    return run


def forward(checkpoint: Checkpoint, tokens: np.ndarray) -> Callable[[], Any]:
    """One pass of the windows through the blocks."""
    config, params = checkpoint.config, jax.tree.map(jnp.asarray, checkpoint.params())
    size = windows_at_once(tokens.shape[1])
    batches = [jnp.asarray(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    embed = jax.jit(decoder.embed(config))
    blocks = [jax.jit(decoder.block(config, i)) for i in range(config.layers)]

    def run() -> None:
        for batch in batches:
            x = embed(params, batch)
            for i, block in enumerate(blocks):
                x = block(params["blocks"][str(i)], x)
            jax.block_until_ready(x)

    return run


def pruning(checkpoint: Checkpoint, tokens: np.ndarray, method: Any) -> float:
    """Seconds of calibration and solving of a run."""
    with tempfile.TemporaryDirectory() as scratch:
        pattern = Unstructured(0.5)
        report = prune_model(checkpoint, Path(scratch) / "out", method=method, pattern=pattern, calibration=tokens)
    return report.seconds["calibration"] + report.seconds["solve"]


def lora(checkpoint: Checkpoint, tokens: np.ndarray) -> Callable[[], Any]:
    """A step: gradients of one micro-batch, and the update."""
    task = Lora().task(checkpoint, 100)
    functions = Functions(task.loss, task.optimizer, task.trainable, None)
    trainable, frozen = jax.tree.map(jnp.asarray, (task.trainable, task.frozen))
    batch = {"tokens": tokens, "weights": np.ones(tokens.shape, np.float32)}
    (whole,) = micro_batches(batch, None, None)
    state = [trainable, functions.init(trainable)]

    def run() -> None:
        total = functions.add(functions.zeros(), state[0], frozen, whole, jax.random.key(0))
        state[:] = functions.update(*state, total, frozen)
        jax.block_until_ready(state)

    return run


if __name__ == "__main__":
    main()

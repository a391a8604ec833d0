"""What the jobs cost in forward passes of the same tokens: the unit that does not depend on the machine.

    python scripts/bench_passes.py [--model demo] [--samples 64] [--sequence-length 512] [--out passes.json]

A pass goes from the tokens to the logits, in the batches that calibration takes.

wanda       calibration and solving; limit 1.2 passes
sparsegpt   the same beyond the pass that it contains: Grams and solving; limit 0.45
perplexity  of the windows, from the tokens to the loss; limit 1.1
lora        a step of LoRA (all kernels, rank 8), of a pass of its windows; limit 3.3
full        a step of all weights, of a pass of its windows

Each is run --rounds times in its process, and the best but for the first counts, which compiles. They take turns, so
that whatever slows the machine down slows all of them.
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
from jprune.tuning import Full, Lora

LIMITS = {"wanda": 1.2, "sparsegpt": 0.45, "perplexity": 1.1, "lora": 3.3}
STEPS = 3
"""Steps and passes of so few windows are short: so many are run, and the best counts."""
Seconds = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--step-windows", type=int, default=2, help="of a step of training")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name != "out"}
    result: dict[str, Any] = {"machine": describe(), "options": options, "seconds": measure(args)}
    passes = in_passes(result["seconds"])
    result |= {"passes": passes, "within": {name: bool(passes[name] <= limit) for name, limit in LIMITS.items()}}
    show(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def in_passes(seconds: Seconds) -> Seconds:
    """The jobs' seconds in forward passes."""
    whole = {name: seconds[f"{name}: calibration"] + seconds[f"{name}: solving"] for name in ("wanda", "sparsegpt")}
    return {
        "wanda": whole["wanda"] / seconds["forward"],
        "sparsegpt": whole["sparsegpt"] / seconds["forward"] - 1,
        "perplexity": seconds["perplexity"] / seconds["forward"],
        "lora": seconds["lora"] / seconds["forward of a step"],
        "full": seconds["full"] / seconds["forward of a step"],
    }


def show(result: dict[str, Any]) -> None:
    for name, value in result["passes"].items():
        limit = f" (limit {LIMITS[name]:g})" if name in LIMITS else ""
        print(f"{name:22} {value:6.2f} passes{limit}")
    for name, seconds in result["seconds"].items():
        print(f"{name:22} {seconds:8.2f} s")


def measure(args: argparse.Namespace) -> Seconds:
    """The best seconds of each job in this process."""
    checkpoint = jprune.load(args.model)
    shape = {"samples": args.samples, "length": args.sequence_length}
    tokens = np.asarray(data.calibration("pydoc", checkpoint.tokenizer, **shape).tokens)
    few = tokens[: args.step_windows]
    jobs: dict[str, Callable[[], Seconds]] = {
        "forward": timed(forward(checkpoint, tokens)),
        "wanda": lambda: pruning(checkpoint, tokens, Wanda()),
        "sparsegpt": lambda: pruning(checkpoint, tokens, SparseGPT()),
        "perplexity": timed(lambda: mean_nll(checkpoint, tokens)),
        "forward of a step": timed(forward(checkpoint, few), STEPS),
        "lora": timed(training(checkpoint, few, Lora()), STEPS),
        "full": timed(training(checkpoint, few, Full()), STEPS),
    }
    seconds: dict[str, list[float]] = {}
    for number in range(args.rounds):
        for name, job in jobs.items():
            for part, took in job().items():
                if number:
                    seconds.setdefault(f"{name}: {part}" if part else name, []).append(took)
    return {name: min(values) for name, values in seconds.items()}


def timed(job: Callable[[], Any], times: int = 1) -> Callable[[], Seconds]:
    """The seconds that a job takes, the best of some calls in a row."""

    def run() -> Seconds:
        took = []
        for _ in range(times):
            start = time.perf_counter()
            job()
            took.append(time.perf_counter() - start)
        return {"": min(took)}

    return run


def forward(checkpoint: Checkpoint, tokens: np.ndarray) -> Callable[[], Any]:
    """One pass of the windows, from tokens to logits."""
    config, params = checkpoint.config, jax.tree.map(jnp.asarray, checkpoint.params())
    size = windows_at_once(tokens.shape[1])
    batches = [jnp.asarray(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    embed, head = jax.jit(decoder.embed(config)), jax.jit(decoder.head(config))
    blocks = [jax.jit(decoder.block(config, i)) for i in range(config.layers)]

    def run() -> None:
        for batch in batches:
            x = embed(params, batch)
            for i, block in enumerate(blocks):
                x = block(params["blocks"][str(i)], x)
            jax.block_until_ready(head(params, x))

    return run


def pruning(checkpoint: Checkpoint, tokens: np.ndarray, method: Any) -> Seconds:
    """Seconds of calibration and solving of a run."""
    with tempfile.TemporaryDirectory() as scratch:
        pattern = Unstructured(0.5)
        report = prune_model(checkpoint, Path(scratch) / "out", method=method, pattern=pattern, calibration=tokens)
    return {"calibration": report.seconds["calibration"], "solving": report.seconds["solve"]}


def training(checkpoint: Checkpoint, tokens: np.ndarray, method: Any) -> Callable[[], Any]:
    """A step: gradients of one micro-batch, and the update."""
    task = method.task(checkpoint, 100)
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

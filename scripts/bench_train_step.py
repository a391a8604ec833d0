"""What masks cost in a training step: AdamW alone, with `keep_masked`, `gradual` and shearing, on the demo's sizes.

    python scripts/bench_train_step.py [--layers 30] [--rounds 5] [--out train_step.json]

A step is jitted as a whole: loss, gradient and update of all parameters, float32, by the decoder of the demo model with
random weights. They take turns in the same process, a step each, so that what disturbs one disturbs all. `gradual`
runs at its default interval: a step that chooses masks is timed by itself, and counts one in `every` (100). Limits:
`keep_masked` at most 5 % more than AdamW alone, `gradual` at most 10 % more, and shearing (masks drawn over layers,
heads, channels and hidden dimensions, with the Lagrangian of two thirds of each) at most 15 % more.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import describe

import jprune
from jprune import trees
from jprune.checkpoints import Checkpoint
from jprune.models import decoder, loss, stacked
from jprune.structured.shape import Shape
from jprune.train import schedules
from jprune.train.optimizer import AdamW
from jprune.train.shearing import lagrangian
from jprune.tuning.masked_model import MaskedModel, shape_of
from jprune.tuning.masked_training import masked_loss, sample, start

EVERY = 100
"""The default interval of `gradual`."""
LIMITS = {"keep_masked": 0.05, "gradual": 0.10, "shearing": 0.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="fewer than the demo model's 30 for a short trial")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each kind that are timed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    checkpoint, params = model(args.layers)
    config = checkpoint.config
    keep = {
        path: np.random.default_rng(0).random(x.shape) >= args.sparsity
        for path, x in trees.flatten(params).items()
        if path.endswith("kernel")
    }
    growth = schedules.linear(args.sparsity, end=1_000_000)  # always under way
    adamw = optax.adamw(1e-5)
    optimizers = {
        "adamw": adamw,
        "keep_masked": optax.chain(adamw, jprune.keep_masked(keep)),
        "gradual": optax.chain(adamw, jprune.gradual(growth, every=EVERY)),
    }
    shape = (args.windows, args.length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocab, jnp.int32)
    batch = {"tokens": tokens, "weights": jnp.ones(shape, jnp.float32)}
    language_model = loss.causal_lm(config)
    runs = {}
    for name, optimizer in optimizers.items():
        runs[name] = Run(optimizer, lambda p: language_model(p, batch)[0] / batch["weights"].size, params)
    runs["shearing"] = shearing(checkpoint, params, batch)
    seconds: dict[str, list[float]] = {name: [] for name in (*runs, "gradual, choosing")}
    seconds["gradual, choosing"].append(runs["gradual"].first)  # its step 0 chooses, after compilation
    for _ in range(args.rounds):
        for name, run in runs.items():
            seconds[name].append(run.step())
    typical = {name: statistics.median(values) for name, values in seconds.items()}
    amortised = typical["gradual"] + max(typical["gradual, choosing"] - typical["gradual"], 0) / EVERY
    more = {
        "keep_masked": typical["keep_masked"] / typical["adamw"] - 1,
        "gradual": amortised / typical["adamw"] - 1,
        "shearing": typical["shearing"] / typical["adamw"] - 1,
    }
    for name, value in typical.items():
        print(f"{name:20} {value:8.3f} s a step")
    for name, value in more.items():
        print(f"{name:20} {100 * value:+7.2f} % (limit {100 * LIMITS[name]:g} %)")
    result = {
        "machine": describe(),
        "options": {k: v for k, v in vars(args).items() if k != "out"} | {"every": EVERY},
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "seconds": seconds,
        "more": more,
        "within": {name: bool(value <= LIMITS[name]) for name, value in more.items()},
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: round(value, 4) for name, value in more.items()}))


class Run:
    """One optimizer with parameters of its own."""

    def __init__(self, optimizer: optax.GradientTransformation, f: Callable[[Any], jax.Array], params: Any):
        def step(params: Any, state: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(jax.grad(f)(params), state, params)
            return optax.apply_updates(params, updates), state

        self._params = jax.tree.map(jnp.array, params)
        self._state = jax.jit(optimizer.init)(self._params)
        self._step = jax.jit(step, donate_argnums=(0, 1)).lower(self._params, self._state).compile()
        self.first = self.step()

    def step(self) -> float:
        """Seconds of the next step."""
        start = time.perf_counter()
        self._params, self._state = jax.block_until_ready(self._step(self._params, self._state))
        return time.perf_counter() - start


def shearing(checkpoint: Checkpoint, params: Any, batch: dict[str, jax.Array]) -> Run:
    """A step under masks, to two thirds of every size."""
    whole = shape_of(checkpoint)
    kv_heads = whole.kv_heads * 2 // 3
    target = Shape(
        layers=max(1, whole.layers * 2 // 3),
        hidden=whole.hidden * 2 // 3,
        heads=whole.heads // whole.kv_heads * kv_heads,
        kv_heads=kv_heads,
        intermediate=whole.intermediate * 2 // 3,
    )
    masked = MaskedModel(checkpoint, target)
    sums, each = masked_loss(masked, jnp.dtype(jnp.float32)), AdamW(learning_rate=1e-5, clip=0.0)
    optimizer = lagrangian.optimizer(each, each, each, targets=masked.targets, steps=1000, warmup=200)

    def f(trainable: Any) -> jax.Array:
        key = jax.random.key_data(jax.random.key(0)) + trainable["multipliers"]["hidden"][0].astype(jnp.uint32)
        masks = sample(trainable["log_alpha"], jax.random.wrap_key_data(key))  # drawn in every step
        return sums(trainable["model"], masks, batch)[0] / batch["weights"].size

    return Run(optimizer, f, {"model": params, **start(masked)})


def model(layers: int | None) -> tuple[Checkpoint, Any]:
    """The demo model (its first layers), and random parameters with equal blocks stacked."""
    checkpoint = jprune.load("demo")
    checkpoint = checkpoint if layers is None else checkpoint.select({}, range(layers))
    params = decoder.init_params(checkpoint.config, jax.random.key(0))
    flat = {path: np.asarray(x) for path, x in trees.flatten(params).items()}
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flat.items()}
    return checkpoint, stacked.stack(trees.unflatten(flat), stacked.runs(checkpoint.config, shapes))


if __name__ == "__main__":
    main()

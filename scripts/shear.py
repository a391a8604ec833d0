"""Shears a model on a GPU or TPU host with the settings of a recipe: the mask phase, then training of what is left.

    python scripts/shear.py meta-llama/Llama-2-7b-hf --recipe scripts/recipes/sheared-llama-1.3b.toml --out sheared \\
        --data cc=cc.npy --data github=github.npy ... --fsdp 8

Each phase is a `jprune` command, which is printed; both resume where they have stopped. OUT/pruned is what the mask
phase leaves, OUT/trained the end. With --cost nothing is run: for a folder that may hold nothing but a config.json, it
compiles one training step under masks for a mesh of --devices virtual devices, and prints parameters, floating-point
operations and bytes a device, without a weight in memory. (Of a loop, over layers for one, XLA counts the operations of
one turn.)
"""

import argparse
import json
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jprune.checkpoints import Checkpoint, load
from jprune.models import stacked
from jprune.train import sharding
from jprune.tuning.masked_model import MaskedModel
from jprune.tuning.masked_training import masked_loss, sample, start
from jprune.tuning.shearing import Shearing

RUN_OPTIONS = ("sequence_length", "evaluate_every")
"""Of a recipe's tables: those of the command, not of the method."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--data", action="append", default=[], help="NAME=SOURCE, one for each domain of the recipe")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--phase", choices=["prune", "train", "both"], default="both")
    parser.add_argument("--steps", type=int, help="of each phase, for a trial")
    parser.add_argument("--micro-batch", type=int, help="windows at once, over all devices")
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--devices", type=int, default=8, help="with --cost")
    args = parser.parse_args()
    recipe = tomllib.loads(args.recipe.read_text(encoding="utf-8"))
    if args.cost:
        jax.config.update("jax_num_cpu_devices", args.devices)
        devices = np.asarray(jax.devices("cpu")).reshape(1, -1)
        mesh = Mesh(devices, ("data", "fsdp"))
        print(json.dumps(cost(load(args.model, weights=False), recipe, mesh, rows=args.micro_batch or args.devices)))
        return
    if args.out is None or not args.data:
        parser.error("give --out and --data NAME=SOURCE (or --cost)")
    for phase in ("prune", "train"):
        if args.phase in (phase, "both"):
            words = command(phase, args.model, recipe, args.out, args.data, args.fsdp, args.micro_batch, args.steps)
            print(shlex.join(["jprune", *words]), flush=True)
            subprocess.run([sys.executable, "-m", "jprune", *words], check=True)


def command(
    phase: str,
    model: str,
    recipe: dict[str, Any],
    out: Path,
    data: Sequence[str],
    fsdp: int = 1,
    micro_batch: int | None = None,
    steps: int | None = None,
) -> list[str]:
    """The words of a phase's command, after `jprune`."""
    words = ["prune", "shearing", model] if phase == "prune" else ["tune", "full", str(out / "pruned")]
    words += [word for source in data for word in ("--data", source)]
    options = recipe[phase] | ({} if steps is None else {"steps": steps, "warmup": 0})
    if phase == "prune" and steps is not None:
        options.pop("target_warmup", None)
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    if recipe.get("proportions"):
        words += ["--proportions", _named(recipe["proportions"])]
    if recipe.get("reference_loss"):
        words += ["--dynamic-loading", "--reference-loss", _named(recipe["reference_loss"])]
    if micro_batch is not None:
        words += ["--micro-batch", str(micro_batch)]
    return [*words, "--fsdp", str(fsdp), "--resume", "--out", str(out / ("pruned" if phase == "prune" else "trained"))]


def _named(values: dict[str, float]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())


def method(recipe: dict[str, Any]) -> Shearing:
    """The recipe's mask phase."""
    return Shearing(**{name: value for name, value in recipe["prune"].items() if name not in RUN_OPTIONS})


def cost(
    checkpoint: Checkpoint, recipe: dict[str, Any], mesh: Mesh, *, rows: int, length: int | None = None
) -> dict[str, Any]:
    """What one step of the mask phase takes, gradient and update of a micro-batch of `rows` windows, in bfloat16."""
    shearing = method(recipe)
    masked = MaskedModel(checkpoint, shearing.shape(checkpoint))
    length = length or recipe["prune"]["sequence_length"]
    sums = masked_loss(masked, jnp.dtype(jnp.bfloat16))
    optimizer = shearing.optimizer(masked.targets, shearing.steps or 1)

    def step(trainable: Any, state: Any, batch: Any, key: jax.Array) -> tuple[Any, Any]:
        def mean(trainable: Any) -> jax.Array:
            total, weight = sums(trainable["model"], sample(trainable["log_alpha"], key), batch)
            return total / weight

        updates, state = optimizer.update(jax.grad(mean)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    def placed(tree: Any) -> Any:
        where = sharding.state_tree(mesh, tree)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)

    shapes = {path: jax.ShapeDtypeStruct(x.shape, jnp.float32) for path, x in checkpoint.shapes.items()}
    model = stacked.stack(shapes, stacked.runs(checkpoint.config, shapes))
    trainable = placed({"model": model, **jax.eval_shape(lambda: start(masked))})
    state = placed(jax.eval_shape(optimizer.init, trainable))
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding.batch(mesh))
        for name, dtype in (("tokens", jnp.int32), ("weights", jnp.float32))
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(trainable, state, batch, key).compile()
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "parameters": {"before": checkpoint.parameters, "after": masked.smaller.parameters},
        "target": str(masked.target),
        "masks": {kind: list(shape) for kind, shape in masked.shapes.items()},
        "devices": mesh.size,
        "tokens": rows * length,
        "flops_per_device": analysis["flops"],
        "argument_bytes_per_device": memory.argument_size_in_bytes,
        "temporary_bytes_per_device": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    main()

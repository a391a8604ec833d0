"""Removing experts of a small mixture that was trained until they differ, or channels inside all: loss by score.

    python scripts/reproduce_experts.py [--seeds 3] [--steps 400] [--work DIR] [--out results.json]

For each seed a mixture of four layers with 16 experts, two for each token, is trained on the bytes of Python's
language reference. Loads are balanced as DeepSeek-V3's are: after every step what corrects the router's scores goes up
for experts that were sent few tokens, and down for the others. Then a quarter and a half of the experts go by each
score, as `jprune prune experts` does it, and a quarter and a half of the channels of every expert, as `jprune prune
llm-pruner --heads none --uniform` does it, which are as many parameters of experts. The loss is measured on topics that
neither training nor scores have seen.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import describe

from jprune import trees
from jprune.checkpoints import Checkpoint, formats, load
from jprune.data import sources
from jprune.evaluate.perplexity import mean_nll
from jprune.models import decoder, experts, families
from jprune.pipeline.shrink.run import shrink_model
from jprune.structured import LLMPruner, RemoveExperts
from jprune.structured.selection import Target

LENGTH, BATCH, EXPERTS = 128, 16, 16
CONFIG = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
    "use_qk_norm": True,
}
SCORES = ("reap", "ean", "frequency", "random")
INSIDE: dict[str, dict[str, Any]] = {
    "param_second, refitted": {},
    "param_second": {"compensate": False},
    "random, refitted": {"importance": "random"},
    "random": {"importance": "random", "compensate": False},
}
"""How channels inside experts are chosen, and options of `LLMPruner` beside those that all have."""
BALANCE = 0.01
"""How much a correction moves in a step."""
CALIBRATION, EVALUATION = 128, 256
"""Windows."""


def windows(split: sources.Split) -> np.ndarray:
    """The bytes of a part of the text, [n, LENGTH]; what is not ASCII is one byte of its own."""
    source = sources.read("pydoc", split)
    assert isinstance(source, sources.Stream)
    ids = np.minimum(np.frombuffer(source.text.encode("latin-1", "replace"), np.uint8), 127).astype(np.int32)
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def trained(seed: int, steps: int, text: np.ndarray) -> tuple[Any, float]:
    """Parameters, and the mean loss of the last 50 steps."""
    config = families.config(CONFIG)
    params = decoder.init_params(config, jax.random.key(seed))
    corrections = jnp.zeros((config.layers, EXPERTS))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, steps, 3e-4), b2=0.98, weight_decay=0.1),
    )

    def corrected(params: Any, corrections: jax.Array) -> Any:
        leaves = trees.flatten(params)
        leaves |= {f"blocks/{i}/mlp/router/correction": own for i, own in enumerate(corrections)}
        return trees.unflatten(leaves)

    @jax.jit
    def step(
        params: Any, corrections: jax.Array, state: Any, batch: jax.Array
    ) -> tuple[Any, jax.Array, Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            with experts.watched() as seen:
                logits = decoder.apply(config, corrected(params, corrections), batch[:, :-1])
            loads = jnp.stack([jnp.bincount(one.routes.experts.reshape(-1), length=EXPERTS) for one in seen])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])), loads

        (value, loads), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        few = jnp.sign(jnp.mean(loads, axis=1, keepdims=True) - loads)
        return params, corrections + BALANCE * few, state, value

    state, losses = optimizer.init(params), []
    order = np.random.default_rng(seed)
    for _ in range(steps):
        batch = jnp.asarray(text[order.integers(0, len(text), BATCH)])
        params, corrections, state, value = step(params, corrections, state, batch)
        losses.append(value)
    return corrected(params, corrections), float(jnp.mean(jnp.stack(losses[-50:])))


def written(params: Any, folder: Path) -> Checkpoint:
    """The model as a checkpoint."""
    (folder / "shape").mkdir(parents=True)
    (folder / "shape" / "config.json").write_text(json.dumps(CONFIG))
    shape = load(folder / "shape", weights=False)
    (folder / "model").mkdir()
    with formats.writer(folder / "model", shape) as writer:
        for path, value in trees.flatten(params).items():
            writer.write(path, np.asarray(value))
    return load(folder / "model")


def loss_of(checkpoint: Checkpoint, tokens: np.ndarray) -> float:
    """Nats a byte."""
    return float(np.mean(mean_nll(checkpoint, tokens)))


def rows_of(seed: int, options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    text, held_out = windows("calibration"), windows("evaluation")[:EVALUATION]
    start = time.perf_counter()
    params, last = trained(seed, options.steps, text)
    checkpoint = written(params, work / str(seed))
    rows: list[dict[str, Any]] = [
        {"seed": seed, "removed": 0, "loss": loss_of(checkpoint, held_out), "training_loss": last}
        | {"training_seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
    ]
    print(json.dumps(rows[0]), flush=True)
    calibration = text[np.random.default_rng(seed).permutation(len(text))[:CALIBRATION]]
    for removed in (EXPERTS // 4, EXPERTS // 2):
        for by in SCORES:
            out = work / f"{seed}-{by}-{removed}"
            method = RemoveExperts(remove=removed, by=by, seed=seed)
            report = shrink_model(checkpoint, out, method=method, calibration=calibration)
            tokens = [own.tokens for own in report.experts if own.tokens is not None]
            rows.append({"seed": seed, "removed": removed, "by": by, "loss": loss_of(load(out), held_out)})
            if by == "reap":
                rows[-1]["loads"] = {"least": min(map(min, tokens)), "most": max(map(max, tokens))}
            print(json.dumps(rows[-1]), flush=True)
    for share in (0.25, 0.5):
        for by, own in INSIDE.items():
            out = work / f"{seed}-{by}-{share}"
            method = LLMPruner(heads="none", uniform=True, seed=seed, **own)
            report = shrink_model(checkpoint, out, method=method, target=Target(units=share), calibration=calibration)
            assert {sizes["d_expert"] for sizes in report.sizes} == {int(128 * (1 - share))}
            rows.append({"seed": seed, "channels": share, "by": by, "loss": loss_of(load(out), held_out)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--work", type=Path, help="where models are kept; by default nowhere")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        rows = [row for seed in range(options.seeds) for row in rows_of(seed, options, work)]
    if options.out:
        settings = {"steps": options.steps, "batch": BATCH, "length": LENGTH, "config": CONFIG}
        settings |= {"calibration_windows": CALIBRATION, "evaluation_windows": EVALUATION}
        options.out.write_text(json.dumps({"machine": describe(), **settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

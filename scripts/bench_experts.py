"""Times experts that compute what they are sent against experts that compute every token, in one run.

    python scripts/bench_experts.py [--repeats 3] [--out results.json]

512 hidden dimensions, experts 256 wide, float32, random weights and routes. Memory is what the compiled program takes
beside its operands and results, as XLA says.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe

from jprune.models import experts, routing
from jprune.models.modules import _expert

D_MODEL, D_EXPERT = 512, 256
CASES = ((32, 4, 8192, False), (128, 8, 8192, False), (32, 4, 2048, True), (128, 8, 1024, True), (128, 8, 1, False))
"""Experts, those of each token, tokens, and whether gradients are computed too."""


def operands(count: int, per_token: int, tokens: int) -> tuple:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) / np.sqrt(shape[-2]))

    kernels = {name: normal(count, D_MODEL, D_EXPERT) for name in ("gate", "up")}
    kernels["down"] = normal(count, D_EXPERT, D_MODEL)
    logits = jnp.asarray(rng.standard_normal((1, tokens, count), np.float32))
    return (
        kernels,
        normal(1, tokens, D_MODEL),
        routing.route(logits, routing.Routing(per_token=per_token, normalise=True)),
    )


def compiled(way: str, count: int, gradients: bool, given: tuple) -> jax.stages.Compiled:
    run = functools.partial({"dense": experts.dense, "routed": experts.mix}[way], _expert("silu"), count=count)

    def squares(kernels: dict, x: jax.Array, routes: routing.Routes) -> jax.Array:
        return jnp.sum(run(kernels, x, routes) ** 2)

    return jax.jit(jax.grad(squares, (0, 1)) if gradients else run).lower(*given).compile()


def difference(a: object, b: object) -> float:
    """The largest, as a share of the largest number."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for count, per_token, tokens, gradients in CASES:
        given = operands(count, per_token, tokens)
        programs = {way: compiled(way, count, gradients, given) for way in ("dense", "routed")}
        results = {way: jax.block_until_ready(program(*given)) for way, program in programs.items()}
        error = difference(results["routed"], results["dense"])
        del results
        seconds = dict.fromkeys(programs, float("inf"))
        for _ in range(options.repeats):
            for way, program in programs.items():  # by turns, since other programs come and go
                start = time.perf_counter()
                jax.block_until_ready(program(*given))
                seconds[way] = min(seconds[way], time.perf_counter() - start)
        row = {"experts": count, "per_token": per_token, "tokens": tokens, "gradients": gradients, "difference": error}
        for way, program in programs.items():
            row[way] = {"seconds": seconds[way], "temporary_bytes": program.memory_analysis().temp_size_in_bytes}
        rows.append(row | {"times_as_fast": seconds["dense"] / seconds["routed"]})
        print(json.dumps(rows[-1]))
    if options.out:
        shape = {"d_model": D_MODEL, "d_expert": D_EXPERT, "dtype": "float32", "repeats": options.repeats}
        options.out.write_text(json.dumps({"machine": describe(), **shape, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

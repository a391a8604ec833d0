"""Times attention with one head of one sequence at a time against all heads together, and its gradients, in one run.

    python scripts/bench_attention.py [--repeats 5] [--out results.json]

Sizes are those of SmolLM2-135M: 9 heads and 3 key/value heads of 64.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe

from jprune.models import attention

SHAPES = ((1, 128), (2, 512), (8, 512), (1, 2048))
"""Sequences and their tokens."""


def compiled(operands: list[jax.Array], *, one_by_one: bool, gradients: bool) -> jax.stages.Compiled:
    attention._one_by_one = lambda time: one_by_one

    def squares(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attention.attend(q, k, v) ** 2)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.attend(q, k, v)

    return jax.jit(jax.grad(squares, (0, 1, 2)) if gradients else attend).lower(*operands).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for batch, length in SHAPES:
        rng = np.random.default_rng(0)
        operands = [jnp.asarray(rng.normal(size=(batch, length, h, 64)), jnp.float32) for h in (9, 3, 3)]
        for gradients in (False, True):
            programs = {way: compiled(operands, one_by_one=way, gradients=gradients) for way in (False, True)}
            seconds = dict.fromkeys(programs, float("inf"))
            for _ in range(options.repeats):
                for way, program in programs.items():  # by turns, since other programs come and go
                    start = time.perf_counter()
                    jax.block_until_ready(program(*operands))
                    seconds[way] = min(seconds[way], time.perf_counter() - start)
            rows.append({"sequences": batch, "tokens": length, "gradients": gradients,
                         "together_ms": 1e3 * seconds[False], "one_by_one_ms": 1e3 * seconds[True]})  # fmt: skip
            print({key: round(value, 1) if isinstance(value, float) else value for key, value in rows[-1].items()})
    if options.out:
        options.out.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Times decoding with a whole model of LLaMA's sizes and random packed weights, on the GPU that is here.

    python scripts/bench_decode.py [--models llama-7b llama-13b] [--ways dense capped:4 ...] [--batches 1 8 32]
        [--backend pallas|triton] [--seconds 200] [--out docs/results] [--tiny]

Half of the weights are zero, 4 of each 8 inputs, so that every way of storing them has the same weights: "dense" has
the zeros in place. Every layer has its own copy of the same kernels, so that none is left in a cache. A program decodes
`--tokens` tokens greedily, after `--context` that are taken for known; what counts is its median time. The first
logits are compared with those of dense. Embedding and head stay dense. Needs jax and numpy; where there is no GPU, jax
multiplies, which takes a `--tiny` model.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from bench_kernels import driver, result_name, seconds_of
from jax import lax
from machine import describe

import pallas_kernels as pk
from pallas_kernels import backends


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a LLaMA."""

    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int = 32000

    @property
    def kernels(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of a layer's."""
        square, wide = (self.hidden, self.hidden), (self.hidden, self.inner)
        return {"q": square, "k": square, "v": square, "o": square, "gate": wide, "up": wide, "down": wide[::-1]}


MODELS = {
    "llama-7b": Model(32, 4096, 11008, 32),
    "llama-13b": Model(40, 5120, 13824, 40),
    "tiny": Model(1, 64, 88, 2, 50),
}
WAYS = ("dense", "capped:4", "bitmap", "capped:4 int8", "bitmap int8")
EXACT = 0.1
"""Relative difference of the first logits from dense ones, above which values of 16 bits are wrong: they are sums in
another order, rounded to bfloat16, through all layers."""


@functools.partial(jax.jit, static_argnums=1)
def random_half(key, shape: tuple[int, int]):
    """A bfloat16 kernel with 4 of each 8 inputs, at random; what it gives has about the size of what it takes."""
    values, places = jax.random.split(key)
    kernel = jax.random.normal(values, shape, jnp.bfloat16)
    kernel = jnp.where(kernel == 0, jnp.bfloat16(1), kernel) / jnp.bfloat16((shape[0] / 2) ** 0.5)
    order = jax.random.uniform(places, (shape[0] // 8, 8, shape[1]))
    return jnp.where((order >= jnp.sort(order, axis=1)[:, 4:5]).reshape(shape), kernel, jnp.bfloat16(0))


def make_layer(model: Model, way: str) -> dict:
    """Kernels of one layer, stored in one way."""
    format, _, values = way.partition(" ")
    found = {}
    for i, (name, shape) in enumerate(model.kernels.items()):
        kernel = random_half(jax.random.key(i), shape)
        found[name] = kernel if format == "dense" else pk.pack(kernel, format, values=values or None)
    return found


def make_params(model: Model, way: str) -> dict:
    """All parameters; every layer has memory of its own."""
    layer = make_layer(model, way)
    embedding = jax.random.normal(jax.random.key(99), (model.vocabulary, model.hidden), jnp.bfloat16)
    head = embedding.T / jnp.bfloat16(model.hidden**0.5)
    return {
        "embedding": embedding,
        "head": head,
        "layers": [jax.tree.map(jnp.copy, layer) for _ in range(model.layers)],
    }


def norm(x):
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)).astype(x.dtype)


def rotate(x, position):
    """Rotary embedding of `[batch, heads, dim]`."""
    half = x.shape[-1] // 2
    angle = position.astype(jnp.float32) * 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)]
    return jnp.concatenate(turned, -1).astype(x.dtype)


def step(params, cache, tokens, position, *, model: Model, multiply):
    """Logits `[batch, vocabulary]` after one token of each sequence, and the cache with it."""
    x = params["embedding"][tokens]
    batch, filled = x.shape[0], []
    for layer, (keys, values) in zip(params["layers"], cache):

        def heads(name, h, layer=layer):
            return multiply(h, layer[name]).reshape(batch, model.heads, -1)

        h = norm(x)
        q, k = rotate(heads("q", h), position), rotate(heads("k", h), position)
        keys = lax.dynamic_update_slice_in_dim(keys, k[:, None], position, 1)
        values = lax.dynamic_update_slice_in_dim(values, heads("v", h)[:, None], position, 1)
        filled.append((keys, values))
        scores = jnp.einsum("bhd,bthd->bht", q, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.arange(keys.shape[1]) <= position, scores * q.shape[-1] ** -0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, -1).astype(x.dtype)
        attended = jnp.einsum("bht,bthd->bhd", weights, values).reshape(batch, -1)
        x = x + multiply(attended, layer["o"])
        h = norm(x)
        x = x + multiply(jax.nn.silu(multiply(h, layer["gate"])) * multiply(h, layer["up"]), layer["down"])
    return (norm(x) @ params["head"]).astype(jnp.float32), filled


def program(model: Model, way: str, batch: int, context: int, count: int, **options):
    """A jitted function of the parameters: (tokens `[count, batch]`, the first logits)."""
    multiply = jnp.matmul if way == "dense" else functools.partial(pk.matmul, **options)
    one = functools.partial(step, model=model, multiply=multiply)

    @jax.jit
    def decode(params):
        key = jax.random.key(7)
        shape = (batch, context + count, model.heads, model.hidden // model.heads)
        known = jax.random.normal(key, shape, jnp.bfloat16)
        cache = [(known, known) for _ in range(model.layers)]
        tokens = jnp.arange(batch) % model.vocabulary

        def body(i, state):
            tokens, cache, out, first = state
            logits, cache = one(params, cache, tokens, context + i)
            tokens = jnp.argmax(logits, -1).astype(tokens.dtype)
            return tokens, cache, out.at[i].set(tokens), jnp.where(i == 0, logits, first)

        out, first = jnp.zeros((count, batch), tokens.dtype), jnp.zeros((batch, model.vocabulary), jnp.float32)
        return lax.fori_loop(0, count, body, (tokens, cache, out, first))[2:]

    return decode


def relative(found, expected) -> float:
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def measure(name: str, way: str, batch: int, params, expected, args) -> tuple[dict, jax.Array]:
    """A row of the result, and the first logits."""
    decode = program(MODELS[name], way, batch, args.context, args.tokens, backend=args.backend)
    start = time.perf_counter()
    compiled = decode.lower(params).compile()
    compiling = time.perf_counter() - start
    logits = compiled(params)[1]
    seconds = seconds_of(compiled, (params,), args.tokens, 1 if args.tiny else 5)
    row = {
        "model": name,
        "way": way,
        "batch": batch,
        "milliseconds_a_step": seconds * 1e3,
        "tokens_a_second": batch / seconds,
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"])),
        "compile_seconds": compiling,
        "difference_of_logits": 0.0 if expected is None else relative(logits, expected),
    }
    return row, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-7b", "llama-13b"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="dense is always there")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--backend", choices=backends.NAMES, default="pallas")
    parser.add_argument("--seconds", type=float, default=200, help="stop beginning new work after so long")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for decode_DEVICE.json")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: only to see that this works")
    args = parser.parse_args()
    if args.tiny:
        args.models, args.batches, args.context, args.tokens = ["tiny"], [2], 3, 2
        args.ways = ["capped:4", "bitmap int8"]
    begin, rows, skipped, dense = time.perf_counter(), [], [], {}
    for name in args.models:
        for way in ("dense", *(way for way in args.ways if way != "dense")):
            params = None
            for batch in args.batches:
                if time.perf_counter() - begin > args.seconds:
                    skipped.append([name, way, batch])
                    continue
                params = params or make_params(MODELS[name], way)
                row, logits = measure(name, way, batch, params, dense.get((name, batch), (None, None))[0], args)
                dense.setdefault((name, batch), (logits, row["milliseconds_a_step"]))
                row["speedup"] = dense[name, batch][1] / row["milliseconds_a_step"]
                rows.append(row)
                print(
                    f"{name} {way:14} batch {batch:2}: {row['milliseconds_a_step']:8.2f} ms a step, "
                    f"{row['tokens_a_second']:8.1f} tokens a second, {row['speedup']:.2f}x dense, "
                    f"{row['weight_bytes'] / 1e9:.2f} GB, logits differ by {row['difference_of_logits']:.1%}",
                    flush=True,
                )
    wrong = [row for row in rows if "int8" not in row["way"] and not row["difference_of_logits"] < EXACT]
    result = {"machine": {**describe(), "driver": driver()}, "device": jax.devices()[0].device_kind}
    result |= {"backend": args.backend, "tiny": args.tiny, "sparsity": 0.5}
    result |= {"context": args.context, "tokens": args.tokens, "rows": rows, "not_reached": skipped}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{result_name('decode', args.backend)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    if args.tiny:
        print("TINY: these times mean nothing")
    if wrong:
        sys.exit(f"logits are not those of dense: {', '.join(row['way'] for row in wrong)}")


if __name__ == "__main__":
    main()

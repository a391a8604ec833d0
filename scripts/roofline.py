"""Where the time of a SparseGPT run goes, held against what the machine can do: `bench_prune.py --roofline`.

Every phase runs by itself, compiled, on the arrays that the run has: one micro-batch through one block stage by stage,
the Gram matrices of its inputs, the factorisation and the sweep of its kernels, the head with the loss, and the files.
A phase can be no faster than its operations at the peak of a matmul, nor than its bytes (parameters, what comes in and
what goes out, each once) at the memory's bandwidth; `share` is the larger of the two times over the measured one.
"""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jprune
from jprune import devices, trees
from jprune.anatomy.parts import parts
from jprune.evaluate import perplexity
from jprune.models import decoder
from jprune.models.batching import windows_at_once
from jprune.pipeline.forecast import programs
from jprune.pipeline.forecast.programs import Spec
from jprune.solvers.sparsegpt import factorise
from jprune.statistics import Gram, update_in_parts

Row = dict[str, Any]
LEAST = 0.3
"""Seconds that a phase is repeated for, at least, for each of `REPEATS` times, of which the best counts."""
REPEATS = 3


def seconds(step: Callable[[Any], Any], state: Any = None) -> float:
    """Of one step, from the state that the one before it left."""
    state = jax.block_until_ready(step(state))  # compiled now
    best, count = math.inf, 1
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        for _ in range(count):
            state = step(state)
        jax.block_until_ready(state)
        each = (time.perf_counter() - start) / count
        if count > 1 or each > LEAST:
            best = min(best, each)
        count = max(2, math.ceil(LEAST / each))
    return best


_dot = jax.jit(jnp.dot)


def machine(tokens: int, d_model: int, d_ff: int) -> Row:
    """The most operations a second of a matmul in float32, by XLA and by NumPy's BLAS, and bytes a second of memory."""
    found: Row = {}
    for n, k, m in [(tokens, d_model, d_ff), (tokens, d_ff, d_model), (tokens, d_model, d_model), (2048, 2048, 2048)]:
        a, b = np.ones((n, k), np.float32), np.ones((k, m), np.float32)
        x, y = jnp.asarray(a), jnp.asarray(b)
        for name, taken in (
            ("xla", seconds(lambda _, x=x, y=y: _dot(x, y))),
            ("blas", seconds(lambda _, a=a, b=b: a @ b)),
        ):
            found.setdefault(name, {})[f"{n} x {k} x {m}"] = round(2 * n * k * m / taken / 1e9, 1)
    large = jnp.ones(2**26, jnp.float32)
    found["bandwidth"] = round(2 * large.nbytes / seconds(lambda x: jax.jit(lambda x: x + 1)(x), large) / 1e9, 2)
    found["peak"] = max(v for name in ("xla", "blas") for v in found[name].values())
    return found


def phases(samples: int, length: int) -> list[Row]:
    """What the run does: seconds, operations and bytes of all micro-batches and blocks together."""
    checkpoint = jprune.load("demo")
    config, mesh = checkpoint.config, devices.make_mesh()
    size = windows_at_once(length)
    batches, tokens = math.ceil(samples / size), size * length
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    windows = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab, (size, length), dtype=np.int32))
    rows: list[Row] = []

    def row(name: str, taken: float, times: float, flops: float, nbytes: float) -> None:
        rows.append({"phase": name, "seconds": taken * times, "flops": flops * times, "bytes": nbytes * times})

    embed = programs.forward(decoder.embed(config), devices.batch(mesh, size))
    x = embed(params, windows)
    row("embedding", seconds(lambda _: embed(params, windows)), batches, 0, 2 * x.nbytes)

    part = next(part for part in parts(checkpoint) if part.name == "blocks/0")
    block, blocks = params["blocks"]["0"], config.layers
    flat = trees.flatten(block)
    shapes = tuple((path, value.shape, value.dtype) for path, value in flat.items())
    chosen = frozenset(matmul.path for matmul in part.matmuls(config.d_model))
    spec = Spec(part.function, shapes, chosen, (x.shape, x.dtype), mesh)
    cut = spec.stages()
    carry = cut.start(x)
    pair = length * (length + 1) / 2  # a query and a key that it sees
    attention = 4 * size * pair * config.heads * config.head_dim
    for s, segment in enumerate(cut.segments):
        paths = [m.path for m in cut.matmuls[s - 1]] if s else []
        run = jax.jit(segment)
        after = run(block, carry)
        name = ", ".join(p.split("/")[-2] for p in paths) + ("; attention" if s == 1 else "") if paths else "first norm"
        flops = sum(2 * tokens * flat[p].size for p in paths) + (attention if s == 1 else 0)
        moved = sum(flat[p].nbytes for p in paths) + sum(a.nbytes for a in (*carry, *after))
        row(name, seconds(lambda _, run=run, carry=carry: run(block, carry)), batches * blocks, flops, moved)
        carry = after
        if s < len(cut.matmuls):
            for i, read in cut.inputs(s, carry).items():
                d_in = read.shape[-1]
                update = jax.jit(lambda g, read: update_in_parts(g, read, mesh), donate_argnums=0)
                zero = jax.tree.map(lambda leaf: leaf[None], Gram.zeros(d_in))
                taken = seconds(lambda g, read=read, update=update: update(g, read), zero)
                names = ", ".join(m.path.split("/")[-2] for m in cut.matmuls[s] if m.input_id == i)
                # Each half of a symmetric matrix once.
                row(f"Gram of {names}", taken, batches * blocks, tokens * d_in**2, read.nbytes + 8 * d_in**2)
                kernels = {m.path: trees.to_matrix(flat[m.path], m.in_axes) for m in cut.matmuls[s]}
                solve_rows(row, read, kernels, blocks)
    nll = perplexity._jit_nll(decoder.head(config), decoder.head_of, mesh)
    row(
        "head and loss (evaluation)",
        seconds(lambda _: nll(params, x, windows)),
        batches,
        2 * size * (length - 1) * config.d_model * config.vocab,
        x.nbytes + 4 * config.d_model * config.vocab,
    )
    files(row, checkpoint, blocks)
    return rows


def solve_rows(row: Callable[..., None], read: jax.Array, kernels: dict[str, jax.Array], blocks: int) -> None:
    """Factorisation of one Gram matrix, and the sweep over the kernels that read its input."""
    gram = Gram.zeros(read.shape[-1]).update(jnp.concatenate([read, 0.1 * jnp.eye(read.shape[-1])]))
    d_in, names = gram.d_in, ", ".join(path.split("/")[-2] for path in kernels)
    method = jprune.SparseGPT()
    patterns = dict.fromkeys(kernels, jprune.Unstructured(0.5))
    factor = seconds(lambda _: factorise(gram.total, method.damping))
    whole = seconds(lambda _: method.together(kernels, gram, patterns, {}))
    d_out = sum(kernel.shape[1] for kernel in kernels.values())
    row(f"factorise for {names}", factor, blocks, d_in**3 / 3, 8 * d_in**2)
    row(f"sweep of {names}", max(whole - factor, 0.0), blocks, d_in**2 * d_out, 4 * d_in**2 + 8 * d_in * d_out)


def files(row: Callable[..., None], checkpoint: Any, blocks: int) -> None:
    """A block read, and written; the bytes are those of the file."""
    from safetensors.numpy import save_file

    paths = [path for path in checkpoint.shapes if path.startswith("blocks/0/")]
    values = checkpoint.read_many(paths)
    size = sum(value.nbytes for value in values.values())
    row("read", seconds(lambda _: checkpoint.read_many(paths)), blocks, 0, size)
    with tempfile.TemporaryDirectory() as folder:
        whole = {path.replace("/", "."): np.ascontiguousarray(value) for path, value in values.items()}
        taken = seconds(lambda _: save_file(whole, Path(folder) / "block.safetensors"))
    row("write", taken, blocks, 0, size)


def measure(samples: int, length: int) -> Row:
    """The machine, and every phase with its share of what the machine can do."""
    config = jprune.load("demo").config
    limits = machine(windows_at_once(length) * length, config.d_model, config.d_ff)
    rows = phases(samples, length)
    for row in rows:
        least = max(row["flops"] / limits["peak"], row["bytes"] / limits["bandwidth"]) / 1e9
        row["share"] = least / row["seconds"] if row["seconds"] else 1.0
        row["gflops_per_second"] = row["flops"] / row["seconds"] / 1e9 if row["seconds"] else 0.0
    return {"limits": limits, "phases": rows}


def show(found: Row) -> None:
    """The table, the most seconds first."""
    limits = found["limits"]
    print(f"peak {limits['peak']} GFLOP/s (XLA {limits['xla']}, BLAS {limits['blas']}), {limits['bandwidth']} GB/s")
    print(f"{'phase':34} {'seconds':>8} {'GFLOP':>8} {'GFLOP/s':>8} {'share':>6}")
    for row in sorted(found["phases"], key=lambda row: -row["seconds"]):
        numbers = f"{row['seconds']:8.2f} {row['flops'] / 1e9:8.0f} {row['gflops_per_second']:8.1f} {row['share']:6.0%}"
        print(f"{row['phase']:34} {numbers}")
    taken = sum(row["seconds"] for row in found["phases"])
    least = sum(row["seconds"] * row["share"] for row in found["phases"])
    print(f"{'all':34} {taken:8.2f} {'':8} {'':8} {least / taken:6.0%}")


def draw(found: Row, path: Path) -> None:
    """Operations a second over operations a byte, below the roof; the area of a point is its time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    limits = found["limits"]
    figure, axes = pyplot.subplots(figsize=(9, 6))
    x = np.logspace(-1, 3.5, 200)
    axes.loglog(x, np.minimum(limits["peak"], x * limits["bandwidth"]), color="#4a4a4a")
    for row in found["phases"]:
        if row["flops"]:
            at = row["flops"] / row["bytes"], row["gflops_per_second"]
            axes.scatter(*at, s=20 + 40 * row["seconds"], alpha=0.5)
            axes.annotate(row["phase"], at, fontsize=7, xytext=(4, -8), textcoords="offset points")
    axes.set(xlabel="operations per byte", ylabel="GFLOP/s", title="SparseGPT on the demo model, phase by phase")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, bbox_inches="tight")

"""Times the packed kernels against the dense bf16 matmul of the same run, on the GPU that is here.

    python scripts/bench_kernels.py [--backend pallas|triton] [--seconds 300] [--out docs/results]
                                    [--plot docs/images] [--tiny --interpret]

Every number is the median of many runs of one program that multiplies several times, each time by another copy of the
kernel, so that no copy is left in the second-level cache. Work is done in order of interest until the seconds are used
up; what was not reached is listed in the result. Random data throughout. Needs jax and numpy, for the backend "triton"
jax-triton too; its result has its name.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from kernel_report import plot, table
from machine import describe

import pallas_kernels as pk
from pallas_kernels import backends, formats, sweep

# (d_in, d_out) of the layers, the most interesting first.
SHAPES = {
    "llama-70b gate": (8192, 28672),
    "llama-70b down": (28672, 8192),
    "llama-7b gate": (4096, 11008),
    "llama-7b down": (11008, 4096),
    "llama-7b qkvo": (4096, 4096),
    "llama-70b qo": (8192, 8192),
    "opt-30b up": (7168, 28672),
    "opt-66b up": (9216, 36864),
    "opt-175b up": (12288, 49152),
    "opt-30b qkv": (7168, 21504),
    "opt-30b o": (7168, 7168),
    "opt-30b down": (28672, 7168),
    "opt-66b qkv": (9216, 27648),
    "opt-66b o": (9216, 9216),
    "opt-66b down": (36864, 9216),
    "opt-175b qkv": (12288, 36864),
    "opt-175b o": (12288, 12288),
    "opt-175b down": (49152, 12288),
}
TINY = {"tiny": (200, 136)}
BATCHES = (16, 1, 64, 32, 8)
SPARSITIES = (0.5, 0.6, 0.75, 0.625, 0.7, 0.8)
CAPPED = {0.5: 4, 0.625: 3, 0.75: 2}
COLD_BYTES = 300e6
"""All copies together are at least this large: several times any second-level cache."""
CALLS = 16
"""Multiplications of one program."""


@dataclass(frozen=True)
class Task:
    """One kernel with one mask, multiplied in several batch sizes."""

    shape: str
    format: str
    sparsity: float
    batches: tuple[int, ...]


TINY_TASKS = (Task("tiny", "capped:4", 0.5, (16, 1)), Task("tiny", "bitmap", 0.6, (16,)))


def tasks(shapes: dict) -> Iterator[Task]:
    """The largest layer whole, then a look at every layer, then what is left."""
    first, *others = shapes
    looks = (0.5, 0.6, 0.75)

    def of(shape, sparsities, batches):
        for sparsity in sparsities:
            if sparsity in CAPPED:
                yield Task(shape, f"capped:{CAPPED[sparsity]}", sparsity, batches)
            yield Task(shape, "bitmap", sparsity, batches)

    yield from of(first, SPARSITIES, BATCHES)
    for shape in others:
        yield from of(shape, looks, BATCHES[:1])
    for shape in others:
        yield from of(shape, looks, BATCHES[1:])
        yield from of(shape, [s for s in SPARSITIES if s not in looks], BATCHES)


def random_kernel(key, shape, format: str, sparsity: float):
    """A bf16 kernel with random non-zeros: as many in each group of 8 inputs as `capped` holds, or anywhere."""

    @jax.jit
    def make(key):
        values, places = jax.random.split(key)
        kernel = jax.random.normal(values, shape, jnp.bfloat16)
        kernel = jnp.where(kernel == 0, jnp.bfloat16(1), kernel)
        if format == "bitmap":
            return jnp.where(jax.random.uniform(places, shape) >= sparsity, kernel, 0)
        order = jax.random.uniform(places, (-(-shape[0] // 8), 8, shape[1]))
        best = jnp.sort(order, axis=1)[:, -int(format[-1])][:, None]
        return jnp.where((order >= best).reshape(-1, shape[1])[: shape[0]], kernel, 0)

    return make(key)


def copies_of(nbytes: int, tiny: bool) -> int:
    """Copies of a kernel that make the cache cold."""
    return 1 if tiny else min(CALLS, max(2, -(-int(COLD_BYTES) // nbytes)))


def seconds_of(compiled, arguments, calls: int, repeats: int) -> float:
    """Median seconds of one multiplication."""
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times) / calls


class Bench:
    """Times dense and packed kernels, and remembers the dense ones."""

    def __init__(self, *, interpret: bool, tiny: bool, backend: str = "pallas"):
        self.interpret, self.tiny, self.backend = interpret, tiny, backend
        self.calls, self.repeats = (1, 1) if tiny else (CALLS, 15)
        self.dense: dict = {}
        self.pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def x(self, n: int, d_in: int):
        return jax.random.normal(jax.random.key(n), (n, d_in), jnp.bfloat16)

    def compile_all(self, function, kernels, batches, d_in):
        """Programs of all batch sizes, compiled side by side: `calls` multiplications by the copies in turn."""

        def program(x, kernels):
            return [function(x, kernels[i % len(kernels)]) for i in range(self.calls)]

        def compile_one(n):
            return jax.jit(program).lower(jax.ShapeDtypeStruct((n, d_in), jnp.bfloat16), kernels).compile()

        return dict(zip(batches, self.pool.map(compile_one, batches)))

    def times(self, function, kernel, nbytes: int, batches, d_in: int) -> dict[int, float]:
        copies = [jax.tree.map(jnp.copy, kernel) for _ in range(copies_of(nbytes, self.tiny))]
        programs = self.compile_all(function, copies, batches, d_in)
        return {n: seconds_of(programs[n], (self.x(n, d_in), copies), self.calls, self.repeats) for n in batches}

    def dense_times(self, shape, batches) -> dict[int, float]:
        missing = tuple(n for n in batches if (shape, n) not in self.dense)
        if missing:
            kernel = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
            found = self.times(jnp.dot, kernel, kernel.nbytes, missing, shape[0])
            self.dense |= {(shape, n): seconds for n, seconds in found.items()}
        return {n: self.dense[shape, n] for n in batches}

    def run(self, task: Task, shape: tuple[int, int], copy_rate: float) -> list[dict]:
        """Rows of the result, one a batch size."""
        kernel = random_kernel(jax.random.key(1), shape, task.format, task.sparsity)
        stored = int(jnp.count_nonzero(kernel))
        packed = pk.pack(kernel, task.format)
        del kernel
        dense = self.dense_times(shape, task.batches)

        def multiply(x, packed):
            return pk.matmul(x, packed, backend=self.backend, interpret=self.interpret)

        packed_times = self.times(multiply, packed, packed.nbytes, task.batches, shape[0])
        return [
            {
                "layer": task.shape,
                "shape": list(shape),
                "format": task.format,
                "sparsity": task.sparsity,
                "measured_sparsity": 1 - stored / (shape[0] * shape[1]),
                "batch": n,
                "microseconds": packed_times[n] * 1e6,
                "dense_microseconds": dense[n] * 1e6,
                "speedup": dense[n] / packed_times[n],
                "bytes": packed.nbytes,
                "byte_limit": 2 * shape[0] * shape[1] / packed.nbytes,
                "share_of_copy": packed.nbytes / packed_times[n] / copy_rate,
                "dense_share_of_copy": 2 * shape[0] * shape[1] / dense[n] / copy_rate,
            }
            for n in task.batches
        ]


def copy_bytes_per_second(tiny: bool) -> float:
    """Of a large copy on the device, bytes read and written."""
    x = jnp.ones(2**16 if tiny else 2**29, jnp.float32)
    copy = jax.jit(lambda x: x + 1).lower(x).compile()
    return 2 * x.nbytes / seconds_of(copy, (x,), 1, 1 if tiny else 15)


def bench_sweep(*, interpret: bool, tiny: bool) -> dict:
    """The SparseGPT sweep of one block of 128 inputs against its reference on the same device."""
    block, d_out = (16, 40) if tiny else (128, 4096)
    rng = np.random.default_rng(0)
    inverse = jnp.asarray(np.triu(rng.standard_normal((block, block)) * 0.02) + np.eye(block), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((block, d_out)), jnp.float32)
    keep = jnp.asarray(rng.random((block, d_out)) < 0.5)
    found = {}
    for name, nm in (("given mask", None), ("2:4", (2, 4))):
        kernel = jax.jit(lambda *a, nm=nm: pk.sparsegpt_sweep(*a, nm=nm, interpret=interpret))
        reference = jax.jit(lambda *a, nm=nm: sweep.sweep_reference(*a, nm=nm))
        arguments = (weights, inverse, keep)
        repeats = 1 if tiny else 20
        found[name] = {
            "shape": [block, d_out],
            "microseconds": seconds_of(kernel, arguments, 1, repeats) * 1e6,
            "reference_microseconds": seconds_of(reference, arguments, 1, repeats) * 1e6,
        }
    return found


def driver() -> str | None:
    """The GPU's driver, where nvidia-smi is there to ask."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def result_name(kind: str, backend: str) -> str:
    """Of a file, by what was measured on which GPU; the default backend has no name in it."""
    device = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
    return f"{kind}_{device}" + ("" if backend == "pallas" else f"_{backend}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=backends.NAMES, default="pallas")
    parser.add_argument("--seconds", type=float, default=300, help="stop beginning new work after so long")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for kernels_DEVICE.json")
    parser.add_argument("--plot", type=Path, help="folder for kernels_DEVICE.svg")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, one run each: only to see that it works")
    parser.add_argument("--interpret", action="store_true", help="in Pallas' interpreter: no times of interest")
    args = parser.parse_args()
    start = time.perf_counter()
    shapes = TINY if args.tiny else SHAPES
    device = jax.devices()[0]
    result: dict = {
        "machine": {**describe(), "driver": driver()},
        "device": device.device_kind,
        "backend": args.backend,
        "interpret": args.interpret,
        "tiny": args.tiny,
        "format_version": formats.VERSION,
        "copy_bytes_per_second": copy_bytes_per_second(args.tiny),
        "rows": [],
        "not_reached": [],
    }
    bench = Bench(interpret=args.interpret, tiny=args.tiny, backend=args.backend)
    for task in TINY_TASKS if args.tiny else tasks(shapes):
        if time.perf_counter() - start > args.seconds:
            result["not_reached"].append([task.shape, task.format, task.sparsity, list(task.batches)])
            continue
        rows = bench.run(task, shapes[task.shape], result["copy_bytes_per_second"])
        result["rows"] += rows
        for row in rows:
            print(
                f"{row['layer']:16} {row['format']:9} {row['sparsity']:.3f} n={row['batch']:2} "
                f"{row['microseconds']:9.1f} us, dense {row['dense_microseconds']:9.1f} us, {row['speedup']:.2f}x "
                f"of at most {row['byte_limit']:.2f}x",
                flush=True,
            )
    if args.backend == "pallas":  # which alone has it
        result["sweep"] = bench_sweep(interpret=args.interpret, tiny=args.tiny)
    result["seconds"] = time.perf_counter() - start
    name = result_name("kernels", args.backend)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        (args.plot / f"{name}.svg").write_text(plot(result))
    print(table(result))


if __name__ == "__main__":
    main()

"""Finds the fastest configuration of the kernels on the GPU that is here and writes it into the package's table.

    python scripts/tune_kernels.py [--backend pallas|triton] [--formats capped:4 bitmap] [--values bfloat16]
        [--batches 16 64] [--seconds 400] [--table pallas_kernels/table.json] [--tiny --interpret]

For every class of calls (format, values, rows of x, large or small kernel; backend) all candidates are timed as by
bench_kernels.py; the best goes into the table with its time and that of the dense matmul in the same run.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import jax
from bench_kernels import Bench, random_kernel

import pallas_kernels as pk
from pallas_kernels import backends, formats, tiles

SHAPES = {"large": (8192, 28672), "small": (4096, 4096)}
CANDIDATES = [
    {"rows": rows, "warps": warps, "stages": stages, "resident": resident}
    for rows, warps, stages, resident in itertools.product((128, 64), (4, 8), (1, 2, 3), (2, 4, 8))
]


def multiply_with(packed, entry: dict, n: int, bench: Bench):
    """The matmul with one configuration, and the configuration."""
    kind, cores = tiles.device()
    del kind
    rows = min(entry["rows"], packed.tile[0])
    split = tiles.split_of(packed, n, rows, entry["resident"] * cores)
    tile = tiles.Tile(rows=rows, warps=entry["warps"], stages=entry["stages"], split=split)
    kernels = backends.load(bench.backend, interpret=bench.interpret)

    def multiply(x, packed):
        y = kernels.multiply(x, packed, tile, interpret=bench.interpret).sum(0)[:, : packed.shape[1]]
        return (y if packed.scale is None else y * packed.scale).astype(x.dtype)

    return multiply, tile


def tune(bench: Bench, format: str, values: str, shape, n: int, candidates) -> dict:
    """The best candidate with its times; those that do not compile or run are left out."""
    sparsity = 0.5 if format == "bitmap" else 1 - int(format[-1]) / 8
    kernel = random_kernel(jax.random.key(1), shape, format, sparsity)
    packed = pk.pack(kernel, format, values=values if values in formats.QUANTISED else None)
    dense = bench.dense_times(shape, (n,))[n]
    found, seen = [], set()
    for entry in candidates:
        multiply, tile = multiply_with(packed, entry, n, bench)
        if tile in seen:
            continue
        seen.add(tile)
        try:
            seconds = bench.times(multiply, packed, packed.nbytes, (n,), shape[0])[n]
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            print(f"  {tile}: {str(error).splitlines()[0][:100]}")
            continue
        print(f"  {tile}: {seconds * 1e6:.1f} us, {dense / seconds:.2f}x", flush=True)
        found.append((seconds, entry))
    if not found:
        return {}
    seconds, best = min(found, key=lambda pair: pair[0])
    return {**best, "microseconds": seconds * 1e6, "dense_microseconds": dense * 1e6, "shape": list(shape)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=backends.NAMES, default="pallas")
    parser.add_argument("--formats", nargs="+", default=["capped:4", "bitmap", "capped:2", "capped:3"])
    parser.add_argument("--values", nargs="+", default=["bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64, 32])
    parser.add_argument("--seconds", type=float, default=400, help="stop beginning new classes after so long")
    parser.add_argument("--table", type=Path, default=Path("pallas_kernels/table.json"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--interpret", action="store_true")
    args = parser.parse_args()
    start = time.perf_counter()
    bench = Bench(interpret=args.interpret, tiny=args.tiny, backend=args.backend)
    shapes = {"small": (256, 256)} if args.tiny else SHAPES
    candidates = CANDIDATES[:2] if args.tiny else CANDIDATES
    table = json.loads(args.table.read_text())
    classes = table["devices"].setdefault(jax.devices()[0].device_kind, {}).setdefault("classes", {})
    for (size, shape), format, values, n in itertools.product(shapes.items(), args.formats, args.values, args.batches):
        if time.perf_counter() - start > args.seconds:
            print(f"time is up before {format} {values} n={n} {size}")
            break
        print(f"{format} {values} n={n} {size}")
        best = tune(bench, format, values, shape, n, candidates)
        if best:
            classes[tiles.class_name(format, values, shape[0] * shape[1], n, args.backend)] = best
            args.table.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()

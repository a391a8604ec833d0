"""Checks every kernel against the dense product on the GPU that is here (or, with --interpret, in the interpreter).

    python scripts/check_kernels.py [--backend pallas|triton] [--interpret --tiny]

Random data, odd sizes, every format, dtype and batch size; relative error ||y - y_ref|| / ||y_ref|| with the reference
in float64 by NumPy, and the same bits when run twice. Ends with exit code 1 if anything is off. Needs jax and numpy,
for the backend "triton" jax-triton too (interpreted: triton, and TRITON_INTERPRET=1).
"""

import argparse
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels import backends, sweep

FORMATS = ("capped:1", "capped:2", "capped:3", "capped:4", "bitmap")
DTYPES = (
    ("bfloat16", None),
    ("float16", "float8_e4m3fn"),
    ("float16", None),
    ("float32", None),
    ("bfloat16", "int8"),
    ("float16", "int8"),
    ("bfloat16", "float8_e4m3fn"),
)
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5}


def make(rng, shape, format, dtype):
    d_in, d_out = shape
    mask = rng.random(shape) < 0.45
    if format.startswith("capped"):
        order = rng.random((-(-d_in // 8), 8, d_out))
        best = np.sort(order, axis=1)[:, -int(format[-1])][:, None]
        mask &= (order >= best).reshape(-1, d_out)[:d_in]
    mask[:, 0] = False
    kernel = np.where(mask, rng.standard_normal(shape), 0)
    return kernel.astype(np.dtype(getattr(jnp, dtype)))


def error(found, expected) -> float:
    found = np.asarray(found).astype(np.float64)
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def check_matmul(rng, shape, format, dtype, values, batches, **options):
    packed = jax.tree.map(jnp.asarray, pk.pack(make(rng, shape, format, dtype), format, values=values))
    exact = np.asarray(pk.unpack(packed)).astype(np.float64)
    tolerance = max(TOLERANCE[dtype], 5e-3 if values else 0)  # unpacking rounds quantised values to the kernel's dtype
    for n in batches:
        x = jnp.asarray(rng.standard_normal((n, shape[0])), jnp.dtype(dtype))
        y = pk.matmul(x, packed, **options)
        wrong = error(y, np.asarray(x).astype(np.float64) @ exact)
        again = np.asarray(pk.matmul(x, packed, **options)).view(np.uint8)
        same = np.array_equal(np.asarray(y).view(np.uint8), again)
        good = wrong < tolerance and same
        yield f"{format} {dtype} {values or ''} {shape} n={n}", wrong, good


def check_sweep(rng, block, d_out, interpret):
    inverse = jnp.asarray(np.triu(rng.standard_normal((block, block)) * 0.05) + np.eye(block), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((block, d_out)), jnp.float32)
    for nm, kept in ((None, 0.5), ((2, 4), 0.9), ((1, 2), 0.9), ((4, 8), 0.9))[: 1 if block < 128 else 4]:
        keep = jnp.asarray(rng.random((block, d_out)) < kept)
        found = pk.sparsegpt_sweep(weights, inverse, keep, nm=nm, interpret=interpret)
        with jax.default_matmul_precision("highest"):
            expected = sweep.sweep_reference(weights, inverse, keep, nm=nm)
        differing = float(np.mean(np.asarray(found[1]) != np.asarray(expected[1])))
        wrong = max(error(found[0], np.asarray(expected[0]).astype(np.float64)), differing)
        yield f"sweep {nm} [{block}, {d_out}]", wrong, wrong < 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=backends.NAMES, default="pallas")
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="one small shape and batch of each")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.interpret:
        sys.exit(f"the kernels run on a GPU; JAX has {device.platform} here (see --interpret)")
    print(f"{device.device_kind}, jax {jax.__version__}, backend {args.backend}")
    shapes = [(200, 150)] if args.tiny else [(1000, 700), (4096, 1024)]
    batches = (7,) if args.tiny else (1, 7, 8, 16, 33, 64, 100, 200)
    checks = []
    for shape, format in itertools.product(shapes, FORMATS[3:] if args.tiny else FORMATS):
        for dtype, values in DTYPES[:2] if args.tiny else DTYPES:
            # One dtype in every batch size; the others in two, which is a kernel with one block and with several.
            some = batches if values is None and dtype == "bfloat16" else batches[:1] + batches[4:5]
            options = {"backend": args.backend, "interpret": args.interpret}
            checks.append(check_matmul(rng, shape, format, dtype, values, some, **options))
    if args.backend == "pallas":  # which alone has it
        checks.append(check_sweep(rng, 16 if args.tiny else 128, 40 if args.tiny else 4000, args.interpret))
    count, failures = 0, []
    for name, wrong, good in itertools.chain.from_iterable(checks):
        count += 1
        if not good:
            failures.append(name)
            print(f"WRONG {name}: relative error {wrong:.2e}, or not the same twice", flush=True)
    print(f"{count} checks, {len(failures)} wrong")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

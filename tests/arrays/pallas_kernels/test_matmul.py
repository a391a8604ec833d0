"""matmul: the kernels in their interpreter and the reference, against dense products in float64.

Pallas' kernels and interpreter; those of the backend "triton" where TRITON_INTERPRET=1 is set, and `triton` is there.
"""

import dataclasses
import importlib
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_kernels import random_kernel, random_mask

import pallas_kernels as pk
from pallas_kernels import backends, tiles
from pallas_kernels.tiles import Tile

BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "pallas"
kernels = backends.load(BACKEND, interpret=True)
module = importlib.import_module("pallas_kernels.matmul")  # the package has a function of this name

TOLERANCE = {"float32": 1e-6, "bfloat16": 6e-3, "float16": 8e-4}  # half a unit of the result's last place, and sums


def matmul(x, packed, *, interpret=True, **options):
    """`pk.matmul`, interpreted if not said otherwise."""
    return pk.matmul(x, packed, backend=BACKEND if interpret else "pallas", interpret=interpret, **options)


def dense_product(x, packed) -> np.ndarray:
    """x @ what is packed, quantised values not rounded to the kernel's dtype again."""
    exact = dataclasses.replace(packed, dtype="float32")
    return np.asarray(x).astype(np.float64) @ np.asarray(pk.unpack(exact)).astype(np.float64)


def assert_close(y, expected, dtype="float32"):
    assert y.shape == expected.shape
    error = np.abs(np.asarray(y).astype(np.float64) - expected).max()
    assert error <= TOLERANCE[dtype] * np.abs(expected).max(), error


CASES = [
    ("capped:1", "bfloat16", None),
    ("capped:2", "float16", None),
    ("capped:3", "bfloat16", None),
    ("capped:4", "bfloat16", None),
    ("capped:3", "float32", None),
    ("capped:1", "bfloat16", "int8"),
    ("capped:2", "float16", "float8_e4m3fn"),
    ("capped:3", "float16", "int8"),
    ("capped:4", "bfloat16", "float8_e4m3fn"),
    ("bitmap", "bfloat16", None),
    ("bitmap", "float32", None),
    ("bitmap", "float16", "int8"),
    ("bitmap", "bfloat16", "int8"),
    ("bitmap", "bfloat16", "float8_e4m3fn"),
    ("bitmap", "float16", "float8_e4m3fn"),
]


@pytest.mark.parametrize(("format", "dtype", "values"), CASES)
def test_kernel_against_dense(rng, format, dtype, values):
    """Odd sizes, an empty output and input range, explicit zeros; two shares of the inputs."""
    mask = random_mask(rng, 200, 150, format)
    mask[:, 3], mask[128:136] = False, False
    kernel = random_kernel(rng, mask, dtype)
    kernel[::7] = 0
    packed = pk.pack(kernel, format, mask=mask, values=values)
    x = jnp.asarray(rng.standard_normal((7, 200)).astype(kernel.dtype))
    partial = kernels.multiply(x, packed, Tile(rows=64, split=2), interpret=True)
    assert partial.shape == (2, 7, 256)
    expected = dense_product(x, packed)
    y = np.asarray(partial).sum(0)[:, :150] * (1 if values is None else packed.scale)
    assert_close(y, expected, "float32")
    assert np.all(y[:, 3] == 0)
    assert_close(pk.matmul(x, packed), expected, dtype)  # the reference


@pytest.mark.parametrize(("format", "split"), [("capped:1", 3), ("bitmap", 4)])
def test_no_share_reads_beyond_the_last_tile(rng, monkeypatch, format, split):
    """Where shares are of unequal size, and where some are empty; what is read a step early counts."""
    packed = pk.pack(random_kernel(rng, random_mask(rng, 150, 40, format), "bfloat16"), format)
    steps = packed.grid[1]
    assert (steps, split) in [(2, 3), (3, 4)]
    seen = []
    readers = [kernels._CappedReader, kernels._BitmapReader] if BACKEND == "pallas" else []
    for reader, method in itertools.product(readers, ("ahead", "read")):
        original = getattr(reader, method)

        def noting(self, k, *ahead, original=original):
            jax.debug.callback(lambda k: seen.append(int(k)), k)
            return original(self, k, *ahead)

        monkeypatch.setattr(reader, method, noting)
    x = jnp.asarray(rng.standard_normal((3, 150)), jnp.bfloat16)
    partial = kernels.multiply(x, packed, Tile(split=split), interpret=True)
    assert_close(np.asarray(partial).sum(0)[:, :40], dense_product(x, packed))
    jax.effects_barrier()
    # Triton's interpreter is made to look at addresses itself.
    assert set(seen) == set(range(steps)) or BACKEND == "triton"


@pytest.mark.skipif(BACKEND == "pallas", reason="of Triton's interpreter: set TRITON_INTERPRET=1")
def test_the_interpreter_sees_what_lies_outside(rng):
    from pallas_kernels import interpreter

    packed = pk.pack(random_kernel(rng, random_mask(rng, 150, 40, "bitmap"), "bfloat16"), "bitmap")
    x = np.ones((3, 192), jnp.bfloat16)
    launch = kernels.launch_multiply(x, packed, Tile(), asm=False)
    assert interpreter.run(launch, *launch.arrays).shape == (1, 3, 128)
    for wrong in ({"STEPS": 4}, {"N": 4}, {"ROWS": 64}):  # tiles and rows of x that there are not; half of the outputs
        bad = dataclasses.replace(launch, constants={**launch.constants, **wrong})
        if wrong == {"ROWS": 64}:  # twice as many programs
            bad = dataclasses.replace(bad, grid=(4, 1, 1))
        with pytest.raises(Exception, match="outside of its arrays"):
            interpreter.run(bad, *bad.arrays)


@pytest.mark.parametrize("n", [1, 8, 16, 33, 64])
@pytest.mark.parametrize("format", ["capped:4", "bitmap"])
def test_batches(rng, format, n):
    mask = random_mask(rng, 130, 40, format)
    packed = pk.pack(random_kernel(rng, mask, "bfloat16"), format)
    x = jnp.asarray(rng.standard_normal((n, 130)), jnp.bfloat16)
    y = matmul(x, packed)
    assert y.dtype == jnp.bfloat16
    assert_close(y, dense_product(x, packed), "bfloat16")


@pytest.mark.parametrize("format", ["capped:2", "bitmap", "tiled_csl"])
def test_large_batches_decode_to_dense(rng, monkeypatch, format):
    monkeypatch.setattr(module, "DENSE_BYTES", 1)  # chunks of one row of tiles
    packed = pk.pack(random_kernel(rng, random_mask(rng, 130, 300, format), "bfloat16"), format)
    x = jnp.asarray(rng.standard_normal((200, 130)), jnp.bfloat16)
    monkeypatch.setattr(kernels, "multiply", None)  # not for this batch
    for interpret in (False, True):
        assert_close(matmul(x, packed, interpret=interpret), dense_product(x, packed), "bfloat16")
    jax.clear_caches()


def test_between_one_block_and_the_threshold(rng):
    packed = pk.pack(random_kernel(rng, random_mask(rng, 64, 40, "capped:2"), "float32"), "capped:2")
    x = jnp.asarray(rng.standard_normal((100, 64)), jnp.float32)
    assert 64 < 100 <= tiles.decode_above()
    assert_close(matmul(x, packed), dense_product(x, packed))


@pytest.mark.parametrize("format", ["capped:4", "bitmap"])
def test_empty_and_full_tiles(rng, format):
    kernel = np.zeros((256, 128), np.float32)
    x = jnp.asarray(rng.standard_normal((3, 256)), jnp.float32)
    assert np.all(np.asarray(matmul(x, pk.pack(kernel, format))) == 0)
    full = rng.standard_normal(kernel.shape).astype(np.float32)
    full[128:] = 0
    if format == "capped:4":
        full.reshape(-1, 8, 128)[:, 4:] = 0
    packed = pk.pack(full, format)
    assert_close(matmul(x, packed), dense_product(x, packed))


def test_mixed_dtypes_multiply_in_float32(rng):
    packed = pk.pack(random_kernel(rng, random_mask(rng, 72, 40, "bitmap"), "bfloat16"), "bitmap")
    x = jnp.asarray(rng.standard_normal((3, 72)), jnp.float32)
    for interpret in (False, True):
        y = matmul(x, packed, interpret=interpret)
        assert y.dtype == jnp.float32
        assert_close(y, dense_product(x, packed))


def test_leading_axes(rng):
    packed = pk.pack(random_kernel(rng, random_mask(rng, 72, 40, "bitmap"), "float32"), "bitmap")
    x = rng.standard_normal((2, 3, 72)).astype(np.float32)
    y = pk.matmul(x, packed)
    assert_close(y.reshape(6, 40), dense_product(x.reshape(6, 72), packed))
    np.testing.assert_array_equal(pk.matmul(x[0, 0], packed), pk.matmul(x[:1, 0], packed)[0])
    assert pk.matmul(x[:0], packed).shape == (0, 3, 40)


@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("format", ["capped:3", "bitmap"])
def test_gradients(rng, format, interpret):
    mask = random_mask(rng, 72, 40, format)
    kernel = random_kernel(rng, mask, "float32")
    packed = pk.pack(jnp.asarray(kernel), format)
    x = jnp.asarray(rng.standard_normal((3, 72)), jnp.float32)

    def ours(x, values):
        return jnp.sum(jnp.sin(matmul(x, packed, values=values, interpret=interpret)))

    def dense(x, kernel):
        return jnp.sum(jnp.sin(jnp.matmul(x, kernel, precision="highest")))

    dx, dvalues = jax.grad(ours, (0, 1))(x, pk.values(packed))
    expected_dx, dkernel = jax.grad(dense, (0, 1))(x, jnp.asarray(kernel))
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-4, atol=1e-4)
    placed = pk.unpack(pk.with_values(packed, dvalues))
    np.testing.assert_allclose(placed, np.where(mask, dkernel, 0), rtol=1e-4, atol=1e-4)


def test_gradient_of_csl_values_and_of_scales(rng):
    mask = random_mask(rng, 72, 40, "capped:4")
    kernel = random_kernel(rng, mask, "float16")
    x = jnp.asarray(rng.standard_normal((3, 72)), jnp.float16)
    csl = pk.pack(kernel, "tiled_csl")
    dvalues = jax.grad(lambda v: pk.matmul(x, csl, values=v).astype(jnp.float32).sum())(jnp.asarray(pk.values(csl)))
    expected = np.where(mask, np.asarray(x).astype(np.float32).sum(0)[:, None], 0)
    np.testing.assert_allclose(pk.unpack(pk.with_values(csl, dvalues)).astype(np.float32), expected, rtol=1e-3)

    packed = pk.pack(kernel.astype(np.float32), "capped:4", values="int8")
    x = x.astype(jnp.float32)

    def scaled(scale):
        return jnp.sum(pk.matmul(x, dataclasses.replace(packed, scale=scale)) ** 2)

    stored = pk.unpack(packed).astype(np.float64) / packed.scale
    products = np.asarray(x).astype(np.float64) @ stored
    expected = 2 * packed.scale * (products**2).sum(0)
    np.testing.assert_allclose(jax.grad(scaled)(jnp.asarray(packed.scale)), expected, rtol=1e-4)


def test_vmap(rng):
    kernel = random_kernel(rng, random_mask(rng, 72, 40, "capped:2"), "float32")
    packed = pk.pack(kernel, "capped:2")
    x = jnp.asarray(rng.standard_normal((4, 3, 72)), jnp.float32)
    expected = dense_product(x.reshape(12, 72), packed).reshape(4, 3, 40)
    for interpret in (False, True):
        assert_close(jax.vmap(lambda x: matmul(x, packed, interpret=interpret))(x), expected)  # noqa: B023
    # Of x's gradient, and over packed kernels.
    dx = jax.vmap(jax.grad(lambda x: pk.matmul(x, packed).sum()))(x)
    np.testing.assert_allclose(dx, np.broadcast_to(kernel.sum(1), x.shape), rtol=1e-4, atol=1e-5)
    shards = pk.pack_shards(kernel, "capped:2", 2)
    y = jax.vmap(lambda p: pk.matmul(x[0], p))(shards)
    assert_close(np.concatenate(list(np.asarray(y)), axis=1), expected[0])


@pytest.mark.parametrize("format", ["capped:4", "bitmap", "tiled_csl"])
def test_shards_on_four_devices(rng, format):
    mask = random_mask(rng, 72, 40, format)
    mask[:, :10] = False  # the shards' streams differ in length
    kernel = random_kernel(rng, mask, "float16")
    shards = pk.pack_shards(kernel, format, 4)
    assert shards.shape == (72, 10)
    mesh = jax.make_mesh((4,), ("model",))
    x = jnp.asarray(rng.standard_normal((2, 3, 72)), jnp.float16)
    options = {"interpret": True, "backend": BACKEND} if format == "bitmap" else {}
    y = pk.matmul_shards(x, shards, mesh, "model", **options)
    assert y.sharding.spec == jax.sharding.PartitionSpec(None, None, "model")
    expected = np.asarray(x).astype(np.float64).reshape(6, 72) @ kernel.astype(np.float64)
    assert_close(np.asarray(y).reshape(6, 40), expected, "float16")
    with pytest.raises(pk.FormatError, match="4 shards on the 2 devices of mesh axis 'model'"):
        pk.matmul_shards(x, shards, jax.make_mesh((2,), ("model",)), "model")
    with pytest.raises(pk.FormatError, match="40 outputs cannot be cut into 3"):
        pk.pack_shards(kernel, format, 3)


def test_donated_buffers(rng):
    kernel = random_kernel(rng, random_mask(rng, 64, 64, "bitmap"), "float32")
    packed = pk.pack(kernel, "bitmap")
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    expected = dense_product(x, packed)
    y = jax.jit(lambda x: pk.matmul(x, packed), donate_argnums=0)(x)
    assert x.is_deleted()
    assert_close(y, expected)


def test_same_bits_every_time(rng):
    packed = pk.pack(random_kernel(rng, random_mask(rng, 640, 40, "bitmap"), "float32"), "bitmap")
    x = jnp.asarray(rng.standard_normal((5, 640)), jnp.float32)
    first = matmul(x, packed)
    np.testing.assert_array_equal(first, matmul(x, packed))


def test_bad_arguments(rng):
    packed = pk.pack(random_kernel(rng, random_mask(rng, 16, 8, "bitmap"), "float32"), "bitmap")
    with pytest.raises(pk.FormatError, match=r"\[\.\.\., 16\].*got shape \(2, 15\)"):
        pk.matmul(np.zeros((2, 15), np.float32), packed)
    with pytest.raises(pk.FormatError, match="got int32"):
        pk.matmul(np.zeros((2, 16), np.int32), packed)
    with pytest.raises(pk.FormatError, match="version 2, newer than 1"):
        pk.matmul(np.zeros((2, 16), np.float32), dataclasses.replace(packed, version=2))
    with pytest.raises(pk.FormatError, match="pallas or triton; got 'mosaic'"):
        pk.matmul(np.zeros((2, 16), np.float32), packed, backend="mosaic")
    quantised = pk.pack(np.eye(16, 8, dtype=np.float32), "bitmap", values="int8")
    with pytest.raises(pk.FormatError, match="cannot be trained"):
        pk.matmul(np.zeros((2, 16), np.float32), quantised, values=jnp.zeros(3))

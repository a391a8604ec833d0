"""Packed kernels with adapters beside them, and over several devices, against dense products."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import devices, trees
from jprune.errors import JpruneError
from jprune.models.kernels import Kernel, flatten, multiply
from jprune.sparse import PackedKernel, Packing, on_backend
from jprune.sparse.beside import Adapted, with_adapters
from jprune.sparse.shards import ShardedKernel, shard
from pallas_kernels import backends


def packed(rng, shape, inputs=1, *, format="bitmap", values=None):
    """A kernel packed, and the array that it stands for."""
    kernel = rng.standard_normal(shape, np.float32)
    kernel[rng.random(shape) < 0.6] = 0
    if format != "bitmap":
        kernel.reshape(-1, 8, *shape[1:])[:, 4:] = 0
    (found,) = Packing(format=format, values=values).pack(kernel[None], inputs, "here")
    return found, found.dense()


def test_adapters_beside_packed_kernels(rng):
    """What they add, and the gradients of both of their factors; the packed kernel has none."""
    kernel, dense = packed(rng, (4, 32, 64), 2)
    params = {"blocks": {"0": {"attn": {"o": {"kernel": kernel}}}}, "embed": {"embedding": jnp.ones((3, 4))}}
    adapters = {"blocks/0/attn/o/kernel/a": rng.standard_normal((4, 32, 2), np.float32)}
    adapters["blocks/0/attn/o/kernel/b"] = rng.standard_normal((2, 64), np.float32)
    x = jnp.asarray(rng.standard_normal((5, 4, 32), np.float32))

    def beside(adapters):
        both = with_adapters(params, trees.unflatten(adapters), alpha=6)
        assert both["embed"]["embedding"] is params["embed"]["embedding"]
        return multiply(x, both["blocks"]["0"]["attn"]["o"]["kernel"], 2)

    def merged(adapters):
        a, b = adapters.values()
        return jnp.einsum("bhd,hdo->bo", x, dense + 3 * jnp.einsum("hdr,ro->hdo", a, b))

    np.testing.assert_allclose(beside(adapters), merged(adapters), rtol=1e-4, atol=1e-3)
    got, want = (jax.jit(jax.grad(lambda p, f=f: jnp.square(f(p)).sum()))(adapters) for f in (beside, merged))
    for path in adapters:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-3, atol=1e-2 * np.abs(want[path]).max())
    (one,) = flatten(
        with_adapters(
            {"kernel": kernel},
            {"kernel/a": adapters["blocks/0/attn/o/kernel/a"], "kernel/b": adapters["blocks/0/attn/o/kernel/b"]},
            alpha=6,
        )
    ).values()
    assert isinstance(one, Adapted)
    assert one.shape == (4, 32, 64)
    np.testing.assert_allclose(multiply(x, one.stack([one])[1], 2), merged(adapters), rtol=1e-4, atol=1e-3)
    with pytest.raises(JpruneError, match="adapter for 'other' but no such"):
        with_adapters({"kernel": kernel}, {"other": {"a": np.ones((4, 1)), "b": np.ones((1, 4))}}, alpha=1)
    with pytest.raises(JpruneError, match="kernel: the adapter is of a kernel"):
        with_adapters({"kernel": kernel}, {"kernel": {"a": np.ones((4, 1)), "b": np.ones((1, 4))}}, alpha=1)


@pytest.mark.parametrize(("format", "values"), [("bitmap", None), ("bitmap", "int8"), ("capped:4", "int8")])
def test_outputs_shared_out_over_devices(rng, format, values):
    kernel, dense = packed(rng, (72, 4, 128), format=format, values=values)
    uneven, _ = packed(rng, (72, 4, 96), format=format, values=values)
    mesh = devices.make_mesh(4, devices=jax.devices())
    found = shard({"even": {"kernel": kernel.with_room(kernel.words + 99)}, "uneven": {"kernel": uneven}}, mesh)
    shared = found["even"]["kernel"]
    assert isinstance(shared, ShardedKernel)
    assert isinstance(shared, Kernel)
    assert shared.shape == kernel.shape
    assert len(shared.packed.bits.addressable_shards[0].data) == 1
    np.testing.assert_array_equal(shared.dense(), dense)
    x = jnp.asarray(rng.standard_normal((3, 72), np.float32))
    y = jax.jit(lambda x, kernel: multiply(x, kernel))(x, shared)
    np.testing.assert_allclose(y, np.einsum("bi,iho->bho", x, dense), rtol=1e-4, atol=1e-3)
    assert type(found["uneven"]["kernel"]) is PackedKernel


@pytest.mark.parametrize("how", ["alone", "of a stack", "beside an adapter", "shared out"])
def test_the_backend_that_multiplies_on_a_gpu(rng, monkeypatch, how):
    """Of what is traced: the branch for a GPU asks for the kernels of the backend that was chosen, and no other."""
    kernel, dense = packed(rng, (64, 128))
    if how == "of a stack":
        kernel = kernel.stack([kernel])
    if how == "beside an adapter":
        kernel = Adapted(kernel, np.zeros((64, 1), np.float32), np.zeros((1, 128), np.float32), 1.0)
    chosen = on_backend({"o": {"kernel": kernel}, "scale": np.ones(3)}, "pallas")
    with monkeypatch.context() as patch:
        patch.setattr(backends, "load", lambda name, **options: None)  # its packages need not be here
        chosen = on_backend(chosen, "triton")
    assert isinstance(chosen["scale"], np.ndarray)
    if how == "shared out":
        chosen = shard(chosen, devices.make_mesh(2, devices=jax.devices()[:2]))
    asked, pallas = [], backends.load("pallas")
    monkeypatch.setattr(backends, "load", lambda name, **options: asked.append(name) or pallas)
    x = jnp.asarray(rng.standard_normal((3, 64), np.float32))
    y = jax.jit(lambda x, kernel: multiply(x, kernel[1] if how == "of a stack" else kernel))(x, chosen["o"]["kernel"])
    np.testing.assert_allclose(y, x @ dense, rtol=1e-4, atol=1e-3)
    assert set(asked) == {"triton"}


def test_a_backend_that_cannot_run_here(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JpruneError, match="needs triton and jax-triton, which are not installed"):
        on_backend({}, "triton")

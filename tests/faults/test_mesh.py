"""The same code on one and on several devices: the same masks, and weights that differ by no more than sums do."""

import functools
import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import NM, Gram, Magnitude, Moments, SparseGPT, SquaredNorm, Unstructured, Wanda, devices, masks
from jprune.errors import JpruneError
from jprune.evaluate.perplexity import mean_nll
from jprune.pipeline.forecast.forecast import Forecast
from jprune.pipeline.forecast.layout import Layout, hidden_specs
from jprune.pipeline.job import Job
from jprune.pipeline.options import Machine
from jprune.pipeline.recipe import Recipe
from jprune.runs.activations import Batches, Room
from jprune.statistics import merge_parts, update_in_parts, zeros


def mesh(data, model=1):
    return devices.make_mesh(model, devices=jax.devices()[: data * model])


prune_model = functools.partial(jprune.prune_model, micro_batch=2)
"""Two windows a device at a time."""


def assert_alike(folder, other):
    """Weights within 1e-5, and zeros in the same places."""
    one, many = jprune.load(folder), jprune.load(other)
    for path in one.shapes:
        a, b = one.read(path), many.read(path)
        np.testing.assert_array_equal(a == 0, b == 0, err_msg=path)
        np.testing.assert_allclose(b, a, atol=1e-5, rtol=0, err_msg=path)


@pytest.mark.parametrize(
    ("method", "pattern", "meshes"),
    [
        (Magnitude(), Unstructured(0.5), [(4, 1)]),
        (Wanda(), Unstructured(0.5), [(2, 1), (4, 1), (2, 2)]),
        (Wanda(), NM(2, 4), [(4, 1)]),
        (SparseGPT(), Unstructured(0.5), [(4, 1), (2, 2)]),
        (SparseGPT(), NM(2, 4), [(4, 1)]),
        (SparseGPT(dense_targets=0.5, refit=2), NM(2, 4), [(2, 2)]),
    ],
    ids=str,
)
def test_one_two_and_four_devices(tiny_model, token_file, tmp_path, method, pattern, meshes):
    folder, tokens = tiny_model(num_hidden_layers=2), token_file(8)
    options = {"method": method, "pattern": pattern, "calibration": tokens}
    one = prune_model(folder, tmp_path / "1", mesh=mesh(1), **options)
    for data, model in meshes:
        many = prune_model(folder, tmp_path / f"{data}x{model}", mesh=mesh(data, model), **options)
        assert_alike(tmp_path / "1", tmp_path / f"{data}x{model}")
        assert many.sparsity == one.sparsity


def test_windows_that_are_left_over(tiny_model, token_file, tmp_path):
    folder, tokens = tiny_model(num_hidden_layers=2), token_file(7)
    options = {"method": Wanda(), "pattern": Unstructured(0.5), "calibration": tokens, "evaluate": tokens}
    one = prune_model(folder, tmp_path / "1", mesh=mesh(1), **options)
    many = prune_model(folder, tmp_path / "4", mesh=mesh(4), **options)
    assert_alike(tmp_path / "1", tmp_path / "4")
    assert many.before.value == pytest.approx(one.before.value, rel=1e-6)
    assert many.after.value == pytest.approx(one.after.value, rel=1e-5)
    assert one.after.value != pytest.approx(one.before.value, rel=1e-3)


@pytest.mark.parametrize("method", [Magnitude(), Wanda()], ids=lambda m: type(m).__name__)
def test_experts(tiny_model, token_file, tmp_path, method):
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    folder = tiny_model(architectures=["MixtralForCausalLM"], model_type="mixtral", **sizes)
    options = {"method": method, "pattern": Unstructured(0.5), "calibration": token_file(6), "expert_tokens": 40}
    one = prune_model(folder, tmp_path / "1", mesh=mesh(1), **options)
    many = prune_model(folder, tmp_path / "4", mesh=mesh(4), **options)
    assert_alike(tmp_path / "1", tmp_path / "4")
    assert [k.few_tokens for k in one.kernels] == [k.few_tokens for k in many.kernels]


def test_every_scope_and_old_zeros(rng):
    """The masks of sharded kernels are exact, ties included, whatever competes with what."""
    values = rng.integers(-3, 4, (40, 24)).astype(np.float32)  # many ties, and zeros
    gram = np.eye(40, dtype=np.float32) * rng.uniform(1, 2, 40).astype(np.float32)[:, None]
    for pattern in (Unstructured(0.3, "kernel"), Unstructured(0.3, "output"), Unstructured(0.3, "block"), NM(1, 4)):
        masks = []
        for own in (mesh(1), mesh(2, 2)):
            spread = devices.spread_columns(own, {"a": jnp.asarray(values), "b": jnp.asarray(values[:, :8])})
            statistic = Gram(jax.device_put(gram, devices.replicated(own)), jax.device_put(7, devices.replicated(own)))
            keeps = {name: x != 0 for name, x in spread.items()}
            done = SparseGPT(block_size=16).together(spread, statistic, dict.fromkeys(spread, pattern), keeps)
            masks.append({name: np.asarray(result.mask) for name, result in done.items()})
            assert len(done["a"].kernel.sharding.device_set) == own.size
        for name in ("a", "b"):
            np.testing.assert_array_equal(masks[0][name], masks[1][name])
            assert not masks[0][name][np.asarray(spread[name]) == 0].any()


def exchanged(program):
    """Dtype and shape of all that devices exchange."""
    kinds = "all-gather|all-reduce|collective-permute|all-to-all"
    return re.findall(rf"= \(?(\w+)\[([\d,]*)\]\S* (?:{kinds})", program.compile().as_text())


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "block"), Unstructured(0.5, "output"), NM(2, 4)], ids=str)
def test_the_sweep_moves_no_weights(pattern):
    """Devices exchange counts, and booleans of one block of inputs where scores are equal."""
    module = importlib.import_module("jprune.solvers.sparsegpt")
    sizes, own = {"a": (384, 256), "b": (384, 64)}, mesh(4)
    kernels = devices.spread_columns(own, {name: jnp.ones(size) for name, size in sizes.items()})
    factor = jax.device_put(module.factorise(jnp.eye(384), 0.01), devices.replicated(own))
    kinds, given, quotas = zip(*(module._prepare(k, factor, pattern, None, 128) for k in kernels.values()))
    pieces = devices.pieces_of_columns(list(kernels.values()))
    assert pieces == 4
    arrays = tuple(kernels.values()), factor, given, jnp.stack(quotas, 1)
    program = module.sweep_blocks.lower(*arrays, kinds, 128, pieces)
    moved = exchanged(program)
    if pattern == Unstructured(0.5, "block"):
        assert ("s32", "") in moved
    for dtype, shape in moved:
        size = math.prod(map(int, shape.split(","))) if shape else 1
        assert size == 1 or (dtype == "pred" and size <= 128 * 256), (dtype, shape)


def test_a_search_in_every_output_moves_nothing():
    """Only whether all are done; also where one device would take wide kernels in chunks of columns."""
    scores = devices.spread_columns(mesh(4), {"a": jnp.ones((5001, 256))})["a"]
    program = jax.jit(lambda scores: masks.without_lowest(scores, 2500, per="output")).lower(scores)
    assert {shape for _, shape in exchanged(program)} == {""}


def test_a_factorisation_happens_once(rng):
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    seen = []

    def f(x, scale):
        seen.append(len(x.sharding.device_set))
        return {"double": x * scale}

    for own in (mesh(1), mesh(4)):
        everywhere = jax.device_put(x, devices.replicated(own))
        got = devices.on_one_device(f, everywhere, 2.0)["double"]
        assert got.sharding == everywhere.sharding
        np.testing.assert_array_equal(got, 2 * x)
    assert seen == [1, 1]


@pytest.mark.parametrize("kind", [Gram, SquaredNorm, Moments])
@pytest.mark.parametrize("rows", [24, 23])
def test_statistics_in_parts(rng, kind, rows):
    x = rng.normal(size=(2, rows, 5)).astype(np.float32)
    own = mesh(2, 2)
    count = devices.pieces_of_rows(own, rows)
    assert count == (4 if rows == 24 else 1)
    parts = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), zeros(kind, 5))
    parts = jax.device_put(parts, devices.parts(own) if count > 1 else devices.replicated(own))
    for batch in x:
        parts = jax.jit(lambda p, x: update_in_parts(p, x, own))(parts, batch)
    seen = jax.jit(merge_parts)(parts)
    flat = x.reshape(-1, 5).astype(np.float64)
    want = {"Gram": flat.T @ flat, "SquaredNorm": (flat**2).sum(0), "Moments": flat.var(0)}[kind.__name__]
    got = seen.variance if kind is Moments else seen.total
    assert seen.tokens == 2 * rows
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("windows", [1, 2, 8])
@pytest.mark.parametrize("n", [1, 3, 4, 7, 16, 17])
@pytest.mark.parametrize("data", [1, 2, 4])
def test_every_window_is_in_one_micro_batch(data, n, windows):
    specs = [x for (x,) in hidden_specs(8, (n, 5), Layout(windows=windows * data), np.float32, mesh(data))]
    counts = [x.shape[0] for x in specs]
    assert sum(counts) == n
    cut = [x.shape[0] for x in specs if x.shape[0] % data == 0]
    assert sum(cut) == n // data * data
    assert max((count // data for count in cut), default=0) <= windows
    assert max((count for count in counts if count % data), default=0) <= windows
    assert len(set(cut)) <= 2
    for x in specs:
        assert x.sharding.is_fully_replicated == (data == 1 or x.shape[0] % data != 0)


@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_batches_come_back_to_their_devices(rng, tmp_path, place):
    own = mesh(2, 2)
    spread = jax.device_put(rng.normal(size=(4, 3)).astype(np.float32), devices.batch(own, 4))
    whole = jax.device_put(rng.normal(size=(3, 3)).astype(np.float32), devices.batch(own, 3))
    specs = [(jax.ShapeDtypeStruct(spread.shape, jnp.float32), jax.ShapeDtypeStruct(whole.shape, jnp.float32))]
    room = {"device": Room(device=999, host=0), "host": Room(device=0, host=999), "file": Room(device=0, host=0)}[place]
    batches = Batches(specs, room, tmp_path / "file.bin")
    left = room.left
    batches.put(0, (spread, whole))
    assert (tmp_path / "file.bin").exists() == (place == "file")
    for got, want in zip(batches.take(0), (spread, whole), strict=True):
        assert got.sharding == want.sharding
        np.testing.assert_array_equal(got, want)
    assert room.left == left


def test_perplexity_of_odd_numbers_of_windows(tiny_model, rng):
    model, tokens = jprune.load(tiny_model(num_hidden_layers=1)), rng.integers(0, 96, (5, 9), dtype=np.int32)
    one = mean_nll(model, tokens, mesh=mesh(1))
    for own in (mesh(4), mesh(1, 4)):
        np.testing.assert_allclose(mean_nll(model, tokens, mesh=own), one, rtol=1e-6)


@pytest.mark.parametrize("model", [0, -1, 3, 8])
def test_a_mesh_that_does_not_fit(model, four_devices):
    with (
        four_devices(),
        pytest.raises(JpruneError, match=rf"got {model}, and there are 4 devices; give one of 1, 2, 4"),
    ):
        devices.make_mesh(model)


def test_what_cannot_be_cut_evenly_is_whole():
    own = mesh(2, 2)
    assert devices.kernel(own, (6, 4, 4), (1, 2)).spec == jax.sharding.PartitionSpec(None, "model")
    assert devices.kernel(own, (6, 3, 4), (1, 2)).is_fully_replicated  # heads are not cut
    assert devices.kernel(own, (6, 4), ()).is_fully_replicated
    spread = devices.spread_columns(own, {"a": jnp.ones((2, 8)), "b": jnp.ones((2, 6))})
    assert devices.pieces_of_columns(list(spread.values())) == 2
    spread = devices.spread_columns(own, {"a": jnp.ones((2, 8)), "b": jnp.ones((2, 5))})
    assert devices.pieces_of_columns(list(spread.values())) == 1


def test_memory_of_several_devices(tiny_model):
    """On a CPU every device takes of the host's memory; activations are shared out and not multiplied."""
    checkpoint = jprune.load(tiny_model())
    recipe = Recipe(pattern=NM(2, 4), samples=8, sequence_length=24)
    jobs = (Job.planned(checkpoint, Wanda(), recipe, mesh(n)) for n in (1, 4))
    one, four = (Forecast(job, Machine(memory=10**10)) for job in jobs)
    assert one.memory(Layout(windows=2)).hidden == four.memory(Layout(windows=8)).hidden == 8 * 24 * 32 * 4
    peaks = [max(f.working(Layout(windows=2 * f.job.mesh.size), exact=False)) for f in (one, four)]
    assert peaks[0] == peaks[1]  # two windows on each device, as on one
    weights = max(cost.weights for cost in one.costs(Layout(windows=2)))
    more = four.memory(Layout(windows=8)).host_fixed - four.base - (one.memory(Layout(windows=2)).host_fixed - one.base)
    assert more == 3 * (weights + peaks[0])

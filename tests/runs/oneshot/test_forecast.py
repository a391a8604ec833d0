"""What a run will take, and how it is laid out for the memory there is."""

import dataclasses
import functools
import itertools

import pytest

import jprune
from jprune import Magnitude, Method, SparseGPT, Unstructured, Wanda, devices
from jprune.methods import masked
from jprune.pipeline import plan_run
from jprune.pipeline.forecast import forecast, speed
from jprune.pipeline.forecast.costs import UnitCost
from jprune.pipeline.forecast.forecast import Forecast
from jprune.pipeline.forecast.layout import Layout
from jprune.pipeline.job import Job
from jprune.pipeline.options import Machine
from jprune.pipeline.recipe import Recipe
from jprune.statistics import Gram

SHAPE = (6, 24)


@pytest.fixture
def made(tiny_model):
    """A function that makes a forecast of a tiny model, of a process that takes no memory by itself."""

    names = (f"model-{i}" for i in itertools.count())

    def make(method=None, *, limit=10**9, shape=SHAPE, reconstruct=0, **options):
        checkpoint = jprune.load(tiny_model(next(names), **options))
        samples, length = shape
        recipe = Recipe(pattern=Unstructured(0.5), samples=samples, sequence_length=length, reconstruct=reconstruct)
        job = Job.planned(checkpoint, method or SparseGPT(), recipe, devices.one_device())
        found = Forecast(job, Machine(memory=limit))
        found.base = 0
        return found

    return make


def test_enough_memory(made, tmp_path):
    layout, found = made().choose(tmp_path)
    assert layout == Layout(windows=6)
    assert found.fits
    assert found.hidden == 6 * 24 * 32 * 4
    assert found.carry == 6 * 24 * (32 + 56) * 4  # the residual stream, and what the last matmul reads
    assert found.left == 10**9 - found.host_fixed


def test_smaller_micro_batches_before_it_does_not_fit(made, tmp_path):
    options = {"method": Wanda(), "shape": (8, 64)}
    exact = {n: made(**options).memory(Layout(windows=n), exact=True).host_fixed for n in (1, 4, 8)}
    assert exact[1] < exact[4] < exact[8]
    assert made(**options, limit=exact[8]).choose(tmp_path)[0].windows == 8
    layout, found = made(**options, limit=exact[8] - 1).choose(tmp_path)
    assert layout == Layout(windows=4)
    assert found.fits
    layout, found = made(**options, limit=exact[1] - 1).choose(tmp_path)
    assert layout.windows == 1
    assert not found.fits


def test_what_does_not_fit_is_spilled_or_recomputed(made, tmp_path, monkeypatch):
    limit = made().memory(Layout(windows=6), exact=True).host_fixed + 6 * 24 * 32 * 4 + 100
    assert made(limit=limit).choose(tmp_path)[0].carry_limit is None  # there is room on the disk
    monkeypatch.setattr(forecast, "_free_disk", lambda folder: 1000)
    layout, found = made(limit=limit).choose(tmp_path)
    assert layout.carry_limit == 100  # beside the activations between blocks
    assert not layout.keeps(found.carry)


def test_the_peak_does_not_depend_on_the_number_of_blocks(made):
    few, many = (made(num_hidden_layers=layers).memory(Layout(windows=2), exact=True) for layers in (2, 7))
    assert dataclasses.asdict(few) == dataclasses.asdict(many)


@pytest.mark.parametrize(
    "method", [SparseGPT(dense_targets=0.5), Wanda(refit=10), Magnitude()], ids=lambda m: type(m).__name__
)
def test_the_rough_bound_is_one(made, method):
    trains = 2 if isinstance(method, Wanda) else 0
    sizes = dict(hidden_size=128, intermediate_size=384, head_dim=32)
    found = made(method, shape=(4, 128), reconstruct=trains, **sizes)
    layout = Layout(windows=2)
    rough, exact = (found.working(layout, exact=e) for e in (False, True))
    assert all(0 < e <= r for e, r in zip(exact, rough, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LooksAtValues(Method):
    statistic = Gram

    def __call__(self, kernel, statistic, pattern, keep=None):
        return masked(kernel, abs(kernel) > float(statistic.total[0, 0]))


def test_a_method_that_cannot_be_traced(made):
    assert all(taken > 0 for taken in made(LooksAtValues()).working(Layout(windows=2), exact=True))


def test_seconds_of_wide_kernels(monkeypatch):
    """Of the time of a narrow kernel, what its products do not explain goes with the elements."""
    narrow, wide = SparseGPT().flops(16, 16), SparseGPT().flops(64, 32)
    cost = functools.partial(UnitCost, weights=0, carry=0, forward_flops=0.0, statistic_flops=0.0)
    for gram_seconds in (1e-3, 1e6):
        times = iter((1.0, gram_seconds, 2.0))
        monkeypatch.setattr(speed, "_time", lambda *_, times=times: next(times))
        rates = speed.measure(SparseGPT(), d_model=16, d_ff=16, dtype="float32")
        assert rates.seconds(cost(solve_flops=narrow, solve_elements=256)) == pytest.approx(2.0)
        products = max(rates.statistic, narrow / 2)
        want = wide / products + 8 * (2 - narrow / products)
        assert rates.seconds(cost(solve_flops=wide, solve_elements=8 * 256)) == pytest.approx(want)
    assert want == pytest.approx(wide / narrow * 2)  # where Gram matrices are slower than solving


def test_the_plan_of_every_block(tiny_model, token_file):
    plan = plan_run(tiny_model(), method=SparseGPT(), pattern=Unstructured(0.5), calibration=token_file())
    assert [unit.name for unit in plan.units] == ["blocks/0", "blocks/1", "blocks/2"]
    first = plan.units[0]
    weights = 4 * (2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 56)
    assert first.bytes_read == weights
    tokens = 6 * 24
    gram = 4 / 3 * tokens * (3 * 32**2 + 56**2)
    solve = (32**3 / 3 + 32 * 2048) + (32**3 / 3 + 32 * 1024) + (32**3 / 3 + 32 * 3584) + (56**3 / 3 + 56 * 1792)
    assert first.flops == pytest.approx(2 * tokens * weights / 4 + gram + solve)
    assert plan.flops == pytest.approx(3 * first.flops)
    assert plan.seconds == pytest.approx(sum(unit.seconds for unit in plan.units))
    assert plan.seconds > 0
    assert plan.peak_device_memory_bytes is None
    assert plan.peak_memory_bytes >= max(unit.peak_memory_bytes for unit in plan.units)
    assert (plan.activations, plan.intermediates, plan.fits) == ("memory", "kept", True)


def test_refitting_needs_data_and_products_with_the_gram_matrix(made):
    plain, refitted = made(Wanda()), made(Magnitude(refit=10))
    layout = Layout(windows=2)
    assert made(Magnitude()).hidden(layout) == []
    assert refitted.hidden(layout) == plain.hidden(layout)
    (before, *_), (after, *_) = plain.costs(layout), refitted.costs(layout)
    assert after.statistic_flops == pytest.approx(4 / 3 * 6 * 24 * (3 * 32**2 + 56**2))
    products = 12 * 2 * (32**2 * (64 + 32 + 112) + 56**2 * 32)
    assert after.solve_flops - before.solve_flops == pytest.approx(products)


def test_reconstruction_passes_through_the_block_many_times(made):
    layout = Layout(windows=2)
    plain, trained = made(Wanda()), made(Wanda(), reconstruct=3)
    (before, *_), (after, *_) = plain.costs(layout), trained.costs(layout)
    hidden = 4 * 6 * 24 * 32
    assert after == dataclasses.replace(before, training_flops=11 * before.forward_flops, carry=before.carry + hidden)
    rough = [max(found.working(layout, exact=False)) for found in (plain, trained)]
    assert rough[1] - rough[0] > 0


def test_the_dense_model_beside_the_pruned_one(made):
    """Twice the activations and the matmuls, a whole product more of every input, and the block's kernels once more."""
    alone, both = made(), made(SparseGPT(dense_targets=0.5))
    layout = Layout(windows=2)
    one, two = (found.memory(layout, exact=False) for found in (alone, both))
    assert (two.hidden, two.carry) == (2 * one.hidden, 2 * one.carry)
    kernels = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 56)
    assert two.host_fixed - one.host_fixed > kernels
    (first, *_), (second, *_) = alone.costs(layout), both.costs(layout)
    assert first.beside is None
    assert second.beside.weights == kernels
    assert second.forward_flops == 2 * first.forward_flops == 2 * second.beside.forward_flops
    crossing = 2 * 6 * 24 * (3 * 32**2 + 56**2 + (32 + 56) * 32)  # inputs, and what o and down add to
    assert second.statistic_flops - first.statistic_flops == second.beside.statistic_flops == crossing


def test_a_plan_that_does_not_fit_says_what_helps(tiny_model, token_file):
    options = {"pattern": Unstructured(0.5), "calibration": token_file(), "memory": 1000}
    plan = plan_run(tiny_model(), method=SparseGPT(dense_targets=0.5), **options)
    assert not plan.fits
    # In memory there is room for nothing but the kernels that are there twice; half of what is on the disk is dense.
    assert plan.dense_model.memory_bytes == 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 56)
    assert plan.dense_model.disk_bytes == plan.disk_bytes // 2 == 2 * 6 * 24 * 4 * (32 + 32 + 56)
    assert 0 < plan.dense_model.seconds < plan.seconds
    assert (plan.activations, plan.intermediates) == ("disk", "disk")
    text = " ".join(plan.advice)
    words = ("`sequence_length`", "`dtype` bfloat16", "`skip` mlp/down", "wanda", "more memory", "`dense_targets` 0")
    for word in words:
        assert word in text


def test_a_method_without_data_has_no_activations(tiny_model):
    plan = plan_run(tiny_model(), method=Magnitude(), pattern=Unstructured(0.5))
    assert (plan.tokens, plan.activations, plan.intermediates, plan.disk_bytes) == (0, "none", "none", 0)


def test_out_of_memory_gives_the_advice_of_the_plan(tiny_model, token_file, tmp_path, monkeypatch):
    from jprune.errors import JpruneError
    from jprune.pipeline import prune_model
    from jprune.pipeline.oneshot import stages as stagewise

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(stagewise.PartRun, "_solve", fail)
    with pytest.raises(JpruneError, match=r"out of memory; what helps is a shorter `sequence_length`.*`skip` mlp/down"):
        prune_model(
            tiny_model(), tmp_path / "out", method=SparseGPT(), pattern=Unstructured(0.5), calibration=token_file()
        )

"""A pattern, a statistic and a method of one's own go through everything, and forecasts are right for them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import Magnitude, Method, SparseGPT, Wanda, devices, patterns, statistics, trees
from jprune.methods import masked
from jprune.pipeline import plan_run, prune_model


@dataclasses.dataclass(frozen=True)
class Runs(patterns.Pattern):
    """Keeps every other run of k consecutive inputs of each output, the better half of them."""

    k: int

    def zeros(self, d_in, d_out):
        return d_in // self.k // 2 * self.k * d_out

    def select(self, scores, keep=None):
        scores = scores if keep is None else jnp.where(keep, scores, 0)
        runs = scores.reshape(-1, self.k, scores.shape[1]).sum(1)
        best = jnp.argsort(jnp.argsort(runs, axis=0), axis=0) >= len(runs) // 2
        return jnp.repeat(best, self.k, axis=0)


def is_in_runs(mask, k):
    runs = np.asarray(mask).reshape(-1, k, mask.shape[1])
    return (runs.all(1) | ~runs.any(1)).all() and (runs.all(1).sum(0) == len(runs) // 2).all()


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()], ids=lambda m: type(m).__name__)
def test_a_pattern_of_ones_own(method, rng, tiny_model, token_file, tmp_path):
    params = {"up": {"kernel": jnp.asarray(rng.normal(size=(24, 12)), jnp.float32)}}
    x = jnp.asarray(rng.normal(size=(90, 24)), jnp.float32)
    seen = {"up/kernel": method.statistic.zeros(24).update(x)} if method.statistic else None
    pruned, masks = jprune.prune(params, seen, method, Runs(4), in_axes={"up/kernel": (0,)})
    assert is_in_runs(masks["up/kernel"], 4)
    assert jprune.sparsity(pruned).zeros == Runs(4).zeros(24, 12)

    report = prune_model(tiny_model(), tmp_path / "out", method=method, pattern=Runs(4), calibration=token_file())
    assert report.sparsity.zeros == sum(k.zeros for k in report.kernels)
    result = jprune.load(tmp_path / "out")
    assert is_in_runs(result.read("blocks/0/mlp/up/kernel") != 0, 4)
    assert jprune.checkpoints.record.read(tmp_path / "out")["recipe"]["pattern"] == {"pattern": "Runs", "k": 4}
    assert patterns.from_json({"pattern": "Runs", "k": 4}) == Runs(4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cubes:
    """Three matrices, and no word on what they cost."""

    total: Any

    @classmethod
    def zeros(cls, d_in):
        return cls(jnp.zeros((3, d_in, d_in), jnp.float32))

    @property
    def d_in(self):
        return self.total.shape[1]

    def update(self, x):
        return Cubes(self.total + jnp.einsum("ti,tj->ij", x, x))

    def merge(self, other):
        return Cubes(self.total + other.total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heavy(Method):
    statistic = Cubes

    def __call__(self, kernel, statistic, pattern, keep=None):
        return masked(kernel, jprune.masks.select(jnp.abs(kernel), pattern, keep=keep))

    def flops(self, d_in, d_out):
        return 7.0 * d_in**3

    def nbytes(self, d_in, d_out):
        return 1000.0 * d_in * d_in


def test_a_forecast_for_a_method_and_a_statistic_of_ones_own(tiny_model, token_file):
    from jprune.anatomy.kernels import choose_kernels
    from jprune.anatomy.parts import parts
    from jprune.pipeline.forecast.costs import rough_working, unit_cost

    assert statistics.nbytes(Cubes, 10) == 3 * 4 * 100
    assert statistics.flops(Cubes, 5, 10) == 2 * 5 * 300
    for kind in (jprune.SquaredNorm, jprune.Gram, jprune.Moments):
        assert statistics.nbytes(kind, 10) == sum(leaf.nbytes for leaf in jax.tree.leaves(kind.zeros(10)))
    checkpoint = jprune.load(tiny_model())
    first = next(part for part in parts(checkpoint) if part.name == "blocks/0")
    kernels = [k for k in choose_kernels(checkpoint, jprune.Unstructured(0.5)) if k.unit == first.name]
    x = jax.ShapeDtypeStruct((2, 24, 32), jnp.float32, sharding=devices.replicated(devices.one_device()))
    cost = unit_cost(first, kernels, Heavy(), [x, x])
    inputs = {(k.stage, k.d_in): k.d_in for k in kernels}.values()
    assert cost.solve_flops == sum(7.0 * d_in**3 for d_in in inputs)
    assert cost.statistic_flops == sum(2.0 * 2 * 48 * 3 * d_in**2 for d_in in inputs)
    assert rough_working(first, kernels, Heavy(), x) >= 1000 * 56**2 + 3 * 4 * 56**2
    plan = plan_run(checkpoint, method=Heavy(), pattern=jprune.Unstructured(0.5), calibration=token_file())
    assert all(unit.flops > 0 for unit in plan.units)
    assert trees.count_zeros(np.zeros(3, np.float32)) == 3

"""Zeros shared out over the blocks of a tiny model: by a pass over it, kept with the run, and as the plan says."""

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import NM, Magnitude, SquaredNorm, Unstructured, trees
from jprune.checkpoints import record
from jprune.errors import JpruneError
from jprune.models import decoder
from jprune.pipeline import plan_run
from jprune.pipeline.oneshot import allocate

PATTERN = Unstructured(0.6)


def outliers(folder, tokens):
    """OWL's D of every block, of a run of the dense model."""
    model = jprune.load(folder)
    x = compiled.embed(model.config)(model.params(), jnp.asarray(tokens))
    observed = jax.jit(jprune.observe(decoder.block(model.config, 0), SquaredNorm))
    found = []
    for i in range(model.config.layers):
        params = model.params(f"blocks/{i}")
        x, seen = observed(jax.tree.map(jnp.asarray, params), x)
        kernels = {path: np.asarray(value) for path, value in trees.flatten(params).items() if path in seen}
        bag = np.concatenate(
            [
                (np.abs(x.reshape(seen[path].d_in, -1)) * np.sqrt(np.asarray(seen[path].total))[:, None]).ravel()
                for path, x in kernels.items()
            ]
        )
        found.append((bag > 5 * bag.mean()).mean())
    return np.array(found)


def test_a_run_shares_out_and_resumes(tiny_model, token_file, tmp_path, monkeypatch):
    folder, tokens = tiny_model(), token_file()
    recipe = dict(method=Magnitude(), pattern=PATTERN, calibration=tokens, allocate="owl", micro_batch=2)
    report = jprune.prune_model(folder, tmp_path / "whole", **recipe)
    uniform = jprune.prune_model(folder, tmp_path / "uniform", **recipe | {"allocate": "uniform"})
    assert report.sparsity == uniform.sparsity

    importance = outliers(folder, np.load(tokens))
    density = (importance - importance.min()) / np.ptp(importance) * 0.16
    density += 0.4 - density.mean()
    shares = report.allocation["sparsities"]
    assert list(shares) == ["blocks/0", "blocks/1", "blocks/2"]
    np.testing.assert_allclose(list(shares.values()), 1 - density, atol=1e-3)  # roundings of few elements
    kernels = [kernel for kernel in report.kernels if kernel.path.startswith("blocks/1/")]
    assert sum(k.zeros for k in kernels) / sum(k.size for k in kernels) == shares["blocks/1"]
    assert record.read(tmp_path / "whole")["allocation"]["sparsities"] == shares

    def stop(step):
        if step.phase == "prune" and step.done >= 1.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jprune.prune_model(folder, tmp_path / "out", **recipe, progress=stop)
    with pytest.raises(JpruneError, match="--allocate"):
        jprune.prune_model(folder, tmp_path / "out", **recipe | {"allocate": "owl=0.1"}, resume=True)
    monkeypatch.setattr(allocate, "_scores", lambda *_: pytest.fail("the blocks are scored twice"))
    jprune.prune_model(folder, tmp_path / "out", **recipe, resume=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_plan_says_what_sharing_out_takes(tiny_model, token_file):
    folder, recipe = tiny_model(), dict(method=Magnitude(), pattern=PATTERN, calibration=token_file())
    plan = plan_run(folder, **recipe, allocate="dlp")
    first, *blocks = plan.units
    assert [first.name, *(unit.name for unit in blocks)] == ["allocation", "blocks/0", "blocks/1", "blocks/2"]
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 56
    assert first.flops > 3 * 2 * 6 * 24 * weights > sum(unit.flops for unit in blocks)
    assert plan.seconds == first.seconds + sum(unit.seconds for unit in blocks)
    assert plan.allocation == {"allocation": "dlp", "band": 0.15}

    tried = plan_run(folder, **recipe, allocate="loss").units[0].flops - first.flops
    assert tried == 2 * (2 * 24) * (2 + 3 + 4) * (weights + 2 * 32)  # the dense model, and one for each block so far

    line = plan_run(folder, **recipe, allocate="linear=0.2")
    shares = line.allocation["sparsities"].values()
    np.testing.assert_allclose(list(shares), [0.4, 0.6, 0.8], atol=1e-3)
    assert sum(kernel.zeros for kernel in line.kernels) == line.sparsity.zeros


def test_what_all_blocks_must_have_is_not_shared_out(tiny_model):
    with pytest.raises(JpruneError, match=r"2:4 .*use N:8 \(as 4:8\), an unstructured sparsity, or the uniform"):
        plan_run(tiny_model(), method=Magnitude(), pattern=NM(2, 4), allocate="linear")

"""Local reconstruction: blocks are trained towards the dense ones, and are never worse for it."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jprune
from jprune import NM, Magnitude, SparseGPT, Unstructured, Wanda, devices
from jprune.errors import JpruneError
from jprune.models import decoder
from jprune.pipeline.oneshot import stages as stagewise
from jprune.pipeline.oneshot.reconstruct import held_out
from jprune.train import locally

OPTIONS = {"pattern": NM(2, 4)}
prune_model = functools.partial(jprune.prune_model, **OPTIONS)


def test_what_is_held_out():
    assert [held_out(n) for n in (2, 5, 8, 17)] == [[1], [4], [7], [7, 15]]


def test_a_step_keeps_zeros_and_goes_down(rng):
    pruned = {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.bfloat16).at[::2].set(0)}
    wanted = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)

    def loss(kernels):
        return jnp.sum(jnp.square(kernels["w"].astype(jnp.float32) - wanted))

    state = locally.begin(pruned)
    losses = [float(loss(pruned))]
    for _ in range(30):
        state = locally.step(loss, state, pruned, jnp.float32(0.05))
        now = locally.of_dtypes(state.weights, pruned)
        assert now["w"].dtype == jnp.bfloat16
        assert not np.asarray(now["w"][::2]).any()
        losses.append(float(loss(now)))
    assert losses[-1] < 0.8 * losses[0]
    first = locally.step(loss, locally.begin(pruned), pruned, jnp.float32(0.05)).weights["w"]
    size = np.sqrt(np.mean(np.square(np.asarray(pruned["w"][1::2], np.float32))))
    moved = np.abs(np.asarray(first) - np.asarray(pruned["w"], np.float32))[1::2]
    np.testing.assert_allclose(moved, 0.05 * size, rtol=1e-3)  # Adam's first step has the size that is asked for


@pytest.fixture
def runs(tiny_model, token_file, tmp_path):
    """A function that prunes a model with and without; returns the two folders, and the report of the one with."""

    def run(method, passes=3, **options):
        folder, tokens = tiny_model(num_hidden_layers=2, **options), token_file(9)
        prune_model(folder, tmp_path / "plain", method=method, calibration=tokens)
        report = prune_model(folder, tmp_path / "trained", method=method, calibration=tokens, reconstruct=passes)
        return folder, tmp_path / "plain", tmp_path / "trained", report

    return run


def test_held_out_error_falls_and_masks_stay(runs, token_file):
    """By hand: of what leaves the first block for the held-out window, with dense and with pruned kernels."""
    folder, plain, trained, report = runs(Wanda())
    models = {where: jprune.load(where) for where in (folder, plain, trained)}
    shares = {kernel.path: kernel.reconstructed for kernel in report.kernels}
    assert all(0 < share <= 1 for share in shares.values())
    for kernel in report.kernels[:7]:  # what comes before is the same, and so are the masks
        np.testing.assert_array_equal(*(models[where].read(kernel.path) == 0 for where in (plain, trained)))
    for kernel in report.kernels:
        new = models[trained].read(kernel.path)
        assert kernel.zeros == (new == 0).sum() == new.size / 2
    for path in models[trained].shapes:
        if not path.endswith("kernel") or path.startswith("head"):
            np.testing.assert_array_equal(models[plain].read(path), models[trained].read(path))
    assert json.loads((trained / "jprune.json").read_text())["recipe"]["reconstruct"] == 3

    model, rows = models[folder], np.load(token_file(9))
    x = decoder.embed(model.config)({"embed": jax.tree.map(jnp.asarray, model.params("embed"))}, jnp.asarray(rows[[7]]))
    block = jax.jit(decoder.block(model.config, 0))
    outputs = {
        where: np.asarray(block(jax.tree.map(jnp.asarray, own.params("blocks/0")), x), np.float64)
        for where, own in models.items()
    }
    before, after = (np.mean((outputs[where] - outputs[folder]) ** 2) for where in (plain, trained))
    assert after < 0.99 * before
    assert [shares[kernel.path] for kernel in report.kernels[:7]] == pytest.approx([after / before] * 7, rel=1e-4)


def test_it_is_gone_on_with_to_the_same_bits(tiny_model, token_file, tmp_path, monkeypatch):
    """After a failure in the second block, the first is gone through with what has become of it; in bfloat16."""
    recipe = dict(method=Wanda(), calibration=token_file(9), reconstruct=2)
    folder = tiny_model(num_hidden_layers=2, dtype=ml_dtypes.bfloat16, torch_dtype="bfloat16")
    report = prune_model(folder, tmp_path / "whole", **recipe)
    assert all(0 < kernel.reconstructed <= 1 for kernel in report.kernels)
    real = stagewise.PartRun._reconstruct

    def fails(self, *args):
        if self._index == 1:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(stagewise.PartRun, "_reconstruct", fails)
        with pytest.raises(KeyboardInterrupt):
            prune_model(folder, tmp_path / "out", **recipe)
    for saved in (tmp_path / "out.run" / "hidden").iterdir():
        saved.unlink()
    prune_model(folder, tmp_path / "out", **recipe, resume=True)
    whole, out = jprune.load(tmp_path / "whole"), jprune.load(tmp_path / "out")
    for path in whole.shapes:
        np.testing.assert_array_equal(whole.read(path), out.read(path), err_msg=path)


EXPERTS = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 3}


@pytest.mark.parametrize(
    ("method", "sizes", "options"),
    [
        (SparseGPT(dense_targets=0.5, refit=2), {}, {"allocate": "owl", "mesh": True}),
        (Wanda(), {**EXPERTS, "num_experts_per_tok": 1}, {"keep_zeros": True}),
    ],
    ids=["two models, shared out, on a mesh", "experts, further"],
)
def test_it_goes_with_what_else_there_is(tiny_model, token_file, tmp_path, method, sizes, options):
    options = {**options, "mesh": devices.make_mesh(2, devices=jax.devices()[:4]) if "mesh" in options else None}
    recipe = dict(method=method, pattern=Unstructured(0.6), calibration=token_file(18), **options)
    folder = tiny_model(num_hidden_layers=2, **sizes)
    report = jprune.prune_model(folder, tmp_path / "out", **recipe, reconstruct=2)
    out = jprune.load(tmp_path / "out")
    assert report.sparsity.achieved == pytest.approx(0.6, abs=0.01)
    assert [k.zeros for k in report.kernels] == [(out.read(k.path) == 0).sum() for k in report.kernels]
    assert all(0 < k.reconstructed <= 1 for k in report.kernels)


def test_experts_that_are_not_pruned_are_not_trained(tiny_model, token_file, tmp_path):
    """They stay to the bit, as does all else; those that are pruned are trained towards what all of them gave."""
    recipe = dict(method=Wanda(), calibration=token_file(33, 48), where=("experts/1/",), expert_tokens=0)
    folder = tiny_model(num_hidden_layers=1, **EXPERTS, num_experts_per_tok=1)
    for name, passes in (("plain", 0), ("trained", 8)):
        report = prune_model(folder, tmp_path / name, reconstruct=passes, **recipe)
    source, plain, trained = (jprune.load(where) for where in (folder, tmp_path / "plain", tmp_path / "trained"))
    assert all(0 < k.reconstructed < 1 and k.zeros == k.size / 2 for k in report.kernels)
    for path in source.shapes:
        before, after = source.read(path), trained.read(path)
        if "experts" in path:
            np.testing.assert_array_equal(after[1] == 0, plain.read(path)[1] == 0)
            assert (after[1] != plain.read(path)[1]).any()
            before, after = np.delete(before, 1, 0), np.delete(after, 1, 0)
        assert after.tobytes() == before.tobytes(), path


def test_what_cannot_be_trained_says_so(tiny_model, tmp_path):
    with pytest.raises(JpruneError, match=r"trains on calibration windows, and Magnitude takes none; give refit=10"):
        prune_model(tiny_model(), tmp_path / "out", method=Magnitude(), reconstruct=1)
    with pytest.raises(JpruneError, match="a number of passes, 0 or more; got -1"):
        prune_model(tmp_path, tmp_path / "out", method=Wanda(), reconstruct=-1)

"""Whole runs over a tiny model, against a slow loop that runs every block again before each group of kernels."""

import functools
import json

import compiled
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fake_method import EveryOtherOfTwo
from remembering import Rows

import jprune
from jprune import (
    NM,
    CrossGram,
    Gram,
    Magnitude,
    SparseGPT,
    SquaredNorm,
    Unstructured,
    Wanda,
    devices,
    masks,
    scores,
    solvers,
    trees,
)
from jprune.checkpoints import record
from jprune.errors import JpruneError
from jprune.models import batching, decoder
from jprune.pipeline import plan_run
from jprune.pipeline.forecast.layout import Layout
from jprune.pipeline.oneshot import stages as stagewise

GROUPS = (("attn/q", "attn/k", "attn/v"), ("attn/o",), ("mlp/gate", "mlp/up"), ("mlp/down",))


prune_model = functools.partial(jprune.prune_model, micro_batch=2)
"""Six windows go in micro-batches of two."""


def expected(folder, tokens, method, pattern):
    """Pruned kernels by path: every group of every block from a full run of the block with what is pruned so far."""
    model = jprune.load(folder)
    x = compiled.embed(model.config)(model.params(), jnp.asarray(tokens))
    result = {}
    observed = jax.jit(jprune.observe(decoder.block(model.config, 0), SquaredNorm if method == "wanda" else Gram))
    for i in range(model.config.layers):
        params = trees.flatten(jax.tree.map(jnp.asarray, model.params(f"blocks/{i}")))
        for group in GROUPS:
            _, seen = observed(trees.unflatten(params), x)
            for name in group:
                path = f"{name}/kernel"
                axes = (0, 1) if name == "attn/o" else (0,)
                matrix = trees.to_matrix(params[path], axes)
                if method == "wanda":
                    mask = masks.select(scores.wanda(matrix, seen[path].total), pattern)
                    new = jnp.where(mask, matrix, 0)
                else:
                    new = solvers.sparsegpt(matrix, seen[path].total, pattern).kernel
                params[path] = trees.from_matrix(new, params[path].shape, axes)
        x = compiled.block(model.config, i)(trees.unflatten(params), x)
        result |= {f"blocks/{i}/{path}": np.asarray(v) for path, v in params.items()}
    return result


# What a run does with a pattern and what it does with a method are independent of each other.
@pytest.mark.parametrize(("name", "pattern"), [("wanda", NM(2, 4)), ("sparsegpt", Unstructured(0.5))])
def test_equals_the_slow_loop(tiny_model, token_file, tmp_path, name, pattern):
    folder, tokens = tiny_model(), token_file()
    method = {"wanda": Wanda(), "sparsegpt": SparseGPT()}[name]
    prune_model(folder, tmp_path / "out", method=method, pattern=pattern, calibration=tokens)
    result = jprune.load(tmp_path / "out")
    for path, want in expected(folder, np.load(tokens), name, pattern).items():
        got = result.read(path)
        assert ((got == 0) == (want == 0)).all(), path
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4, err_msg=path)


def test_the_dense_model_beside_the_pruned_one(tiny_model, token_file, tmp_path):
    """Against a slow loop that runs both from the tokens on, up to each group of kernels."""
    folder, tokens = tiny_model(num_hidden_layers=2), token_file()
    method = EveryOtherOfTwo()
    prune_model(folder, tmp_path / "out", method=method, pattern=Unstructured(0.5), calibration=tokens)
    model, result = jprune.load(folder), jprune.load(tmp_path / "out")
    block = decoder.block(model.config, 0)
    observed = jax.jit(jprune.observe(block, Rows))

    def residuals(params, x):
        """What o and down add to: the input, and what the block gives when down does nothing."""
        without = params | {"mlp/down/kernel": 0 * params["mlp/down/kernel"]}
        return {"attn/o": x, "mlp/down": observed(trees.unflatten(without), x)[0]}

    x = y = compiled.embed(model.config)(model.params(), jnp.asarray(np.load(tokens)))
    for i in range(model.config.layers):
        dense = trees.flatten(jax.tree.map(jnp.asarray, model.params(f"blocks/{i}")))
        params = dict(dense)
        before = residuals(dense, y)
        y, wanted = observed(trees.unflatten(dense), y)
        for group in GROUPS:
            _, read = observed(trees.unflatten(params), x)
            now = residuals(params, x)
            for path in (f"{name}/kernel" for name in group):
                own, other = (np.asarray(seen[path].x, np.float64) for seen in (read, wanted))
                apart = own.T @ (other - own)
                behind = None
                if group[0] in now:
                    error = np.asarray(before[group[0]] - now[group[0]], np.float64)
                    behind = own.T @ error.reshape(len(own), -1)
                known = CrossGram(own.T @ own, len(own), apart, behind)
                known = jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), known)
                axes = (0, 1) if group == ("attn/o",) else (0,)
                new = method(trees.to_matrix(params[path], axes), known, None).kernel
                params[path] = trees.from_matrix(new, params[path].shape, axes)
                got = result.read(f"blocks/{i}/{path}")
                np.testing.assert_allclose(got, params[path], rtol=2e-3, atol=2e-4, err_msg=f"{i} {path}")
        x, _ = observed(trees.unflatten(params), x)


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()], ids=lambda m: type(m).__name__)
def test_counts_are_exact_and_the_rest_is_untouched(tiny_model, token_file, tmp_path, method):
    folder = tiny_model(dtype=ml_dtypes.bfloat16, torch_dtype="bfloat16")
    recipe = dict(pattern=Unstructured(0.3, "output"), calibration=token_file())
    report = prune_model(folder, tmp_path / "out", method=method, **recipe)
    before, after = jprune.load(folder), jprune.load(tmp_path / "out")
    zeros = 0
    for path, shape in before.shapes.items():
        old, new = before.read(path), after.read(path)
        assert new.dtype == shape.dtype == ml_dtypes.bfloat16
        if path.startswith("blocks/") and path.endswith("kernel"):
            d_in = 32 if "down" not in path else 56
            assert ((new.reshape(d_in, -1) == 0).sum(0) == int(d_in * 0.3)).all(), path
            zeros += int((new == 0).sum())
        else:
            np.testing.assert_array_equal(old, new)
    assert report.sparsity.zeros == zeros
    written = json.loads((tmp_path / "out" / "jprune.json").read_text())
    assert written["sparsity"]["zeros"] == zeros == sum(k["zeros"] for k in written["kernels"])
    assert written["sparsity"]["total_parameters"] == sum(np.prod(s.shape) for s in before.shapes.values())


def test_recomputing_instead_of_keeping_changes_nothing(tiny_model, token_file, tmp_path, monkeypatch):
    folder, recipe = tiny_model(), dict(pattern=Unstructured(0.5), calibration=token_file())
    prune_model(folder, tmp_path / "kept", method=EveryOtherOfTwo(), **recipe)
    monkeypatch.setattr(Layout, "keeps", lambda self, nbytes: False)
    prune_model(folder, tmp_path / "again", method=EveryOtherOfTwo(), **recipe)
    kept, again = jprune.load(tmp_path / "kept"), jprune.load(tmp_path / "again")
    for path in kept.shapes:
        np.testing.assert_allclose(kept.read(path), again.read(path), atol=2e-5, err_msg=path)


def test_uneven_micro_batches_see_every_window_once(tiny_model, token_file, tmp_path):
    folder, tokens = tiny_model(), token_file(5)
    recipe = dict(pattern=Unstructured(0.5), calibration=tokens)
    prune_model(folder, tmp_path / "uneven", method=Wanda(), **recipe)
    prune_model(folder, tmp_path / "whole", method=Wanda(), micro_batch=5, **recipe)
    uneven, whole = jprune.load(tmp_path / "uneven"), jprune.load(tmp_path / "whole")
    for path in whole.shapes:
        np.testing.assert_array_equal(uneven.read(path), whole.read(path))


def test_filters_and_overrides(tiny_model, token_file, tmp_path):
    recipe = dict(
        pattern=Unstructured(0.5),
        calibration=token_file(),
        where=("blocks/[12]/", "^head/"),
        skip=("attn/o",),
        overrides={"mlp/": NM(1, 4), "2/mlp/down": Unstructured(0.25)},
    )
    folder = tiny_model()
    report = prune_model(folder, tmp_path / "out", method=Wanda(), **recipe)
    result = jprune.load(tmp_path / "out")
    share = {path: float(np.mean(result.read(path) == 0)) for path in result.shapes if path.endswith("kernel")}
    assert all(share[p] == 0 for p in share if p.startswith("blocks/0/") or "attn/o" in p)
    assert share["blocks/1/attn/q/kernel"] == share["head/kernel"] == 0.5
    assert share["blocks/1/mlp/down/kernel"] == share["blocks/2/mlp/gate/kernel"] == 0.75
    assert share["blocks/2/mlp/down/kernel"] == 0.25
    blocks = [p for p in share if p.startswith("blocks/")]
    assert report.sparsity.prunable_parameters == sum(result.read(p).size for p in [*blocks, "head/kernel"])


def test_the_head_is_left_alone_unless_asked_for(tiny_model):
    plan = plan_run(tiny_model(), method=Magnitude(), pattern=Unstructured(0.5))
    assert len(plan.kernels) == 3 * 7
    assert not any("head" in k.path for k in plan.kernels)


def test_plan_predicts_the_run(tiny_model, token_file, tmp_path):
    folder, recipe = tiny_model(), dict(pattern=NM(2, 4), calibration=token_file())
    plan = plan_run(folder, method=Wanda(), **recipe)
    report = prune_model(folder, tmp_path / "out", method=Wanda(), **recipe)
    assert plan.sparsity == report.sparsity
    assert {k.path: k.zeros for k in plan.kernels} == {k.path: k.zeros for k in report.kernels}
    assert plan.tokens == 6 * 24


def test_perplexity_before_and_after(tiny_model, token_file, tmp_path):
    from jprune.evaluate.perplexity import perplexity

    folder, held_out = tiny_model(), token_file(4, seed=7)
    report = prune_model(folder, tmp_path / "out", method=Magnitude(), pattern=Unstructured(0.9), evaluate=held_out)
    for model, got in ((folder, report.before), (tmp_path / "out", report.after)):
        assert got == perplexity(jprune.load(model), np.load(held_out))
    assert report.before.value != report.after.value
    assert report.json()["perplexity"]["sequence_length"] == 24


def test_the_evaluation_may_have_a_length_of_its_own(tiny_model, token_file, tmp_path):
    options = dict(method=Magnitude(), pattern=Unstructured(0.9), evaluate=token_file(4, seed=7))
    report = prune_model(tiny_model(), tmp_path / "out", **options, evaluate_length=16, evaluate_windows=3)
    assert (report.before.windows, report.before.sequence_length) == (3, 16)


def test_an_unknown_option_names_the_nearest(tiny_model, tmp_path):
    with pytest.raises(JpruneError, match=r"'sample'; did you mean 'samples'"):
        prune_model(tiny_model(), tmp_path / "out", method=Magnitude(), pattern=Unstructured(0.5), sample=3)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_micro_batch_is_as_given(tiny_model, token_file, micro_batch):
    options = dict(pattern=Unstructured(0.5), calibration=token_file(), micro_batch=micro_batch)
    plan = plan_run(tiny_model(), method=Magnitude(), mesh=devices.one_device(), **options)
    assert plan.layout.windows == 1
    plan = plan_run(tiny_model("again"), method=Wanda(), mesh=devices.one_device(), **options)
    assert plan.layout.windows == micro_batch
    with pytest.raises(JpruneError, match="micro_batch must be at least 1, got 0"):
        plan_run(tiny_model("third"), method=Wanda(), **options | {"micro_batch": 0})


def test_other_formats_have_the_same_weights(tiny_model, token_file, tmp_path):
    folder, recipe = tiny_model(), dict(pattern=Unstructured(0.5), calibration=token_file())
    prune_model(folder, tmp_path / "hf", method=Wanda(), **recipe)
    hf = jprune.load(tmp_path / "hf")
    for format in ("orbax", "packed"):
        out = tmp_path / format
        prune_model(folder, out, method=Wanda(), **recipe, format=format)
        assert record.damaged(tmp_path / "hf") == record.damaged(out) == []
        assert not (out / "model.safetensors").exists()
        other = jprune.load(out)
        assert hf.shapes == other.shapes
        for path in hf.shapes:
            np.testing.assert_array_equal(hf.read(path), other.read(path))
        assert json.loads((out / "jprune.json").read_text())["method"] == "wanda"
    assert (tmp_path / "packed" / "packed.json").exists()


def test_transformers_reads_the_result(tiny_model, token_file, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokens = token_file()
    prune_model(tiny_model(), tmp_path / "out", method=Wanda(), pattern=NM(2, 4), calibration=tokens)
    ids = np.load(tokens)[:2]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        want = model(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    ours = jprune.load(tmp_path / "out")
    params = jax.tree.map(jnp.asarray, ours.params())
    np.testing.assert_allclose(compiled.apply(ours.config, params, jnp.asarray(ids)), want, atol=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_failure_leaves_nothing_behind(tiny_model, token_file, tmp_path, monkeypatch):
    folder, out = tiny_model(), tmp_path / "results" / "out"
    monkeypatch.setattr(stagewise.PartRun, "_solve", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune_model(folder, out, method=Wanda(), pattern=NM(2, 4), calibration=token_file())
    assert list(out.parent.iterdir()) == []


def test_disk_full_leaves_out_untouched(tiny_model, tmp_path, monkeypatch):
    import errno

    from jprune.checkpoints import writing

    folder, out, recipe = tiny_model(), tmp_path / "out", dict(pattern=Unstructured(0.5))
    prune_model(folder, out, method=Magnitude(), **recipe)
    kept = (out / "model.safetensors").read_bytes()

    def full(self, key, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.SafetensorsFile, "write", full)
    with pytest.raises(JpruneError, match=r"disk .* is full"):
        prune_model(folder, out, method=Magnitude(), **recipe, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_out_is_never_replaced_unasked(tiny_model, tmp_path):
    folder, out = tiny_model(), tmp_path / "out"

    def run(out, **options):
        prune_model(folder, out, method=Magnitude(), pattern=Unstructured(0.5), **options)

    run(out)
    with pytest.raises(JpruneError, match="`overwrite`"):
        run(out)
    run(out, overwrite=True)
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter1.txt").write_text("do not lose me")
    with pytest.raises(JpruneError, match="jprune did not write it"):
        run(mine, overwrite=True)
    with pytest.raises(JpruneError, match="model itself"):
        run(folder, overwrite=True)
    with pytest.raises(JpruneError, match="model itself"):
        run(tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(JpruneError, match="is a file"):
        run(tmp_path / "file", overwrite=True)
    (tmp_path / "link").symlink_to("disk/target")  # and the run's folder is a link too
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to("disk/run")
    report = prune_model(folder, tmp_path / "link", method=Magnitude(), pattern=Unstructured(0.5), run=tmp_path / "run")
    assert report.out == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["target"]
    assert (mine / "chapter1.txt").read_text() == "do not lose me"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tiny_model, token_file, tmp_path, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    folder = tiny_model(change=spoil)
    with pytest.raises(JpruneError, match="blocks/1/mlp/up/kernel"):
        prune_model(folder, tmp_path / "out", method=Wanda(), pattern=NM(2, 4), calibration=token_file())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [SparseGPT(), Wanda()])
def test_activations_that_overflow_name_the_kernel(tiny_model, token_file, tmp_path, method):
    def grow(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][:] *= 1e30
        tensors["model.layers.1.mlp.gate_proj.weight"][:] *= 1e30

    with pytest.raises(JpruneError, match=r"blocks/1/mlp/down/kernel.*NaN or inf"):
        prune_model(
            tiny_model(change=grow),
            tmp_path / "out",
            method=method,
            pattern=NM(2, 4),
            calibration=token_file(),
            skip=("mlp/gate", "mlp/up"),
        )


def test_a_pattern_must_fit_every_kernel(tiny_model, token_file):
    with pytest.raises(JpruneError, match=r"mlp/down/kernel.*divisible by 16.*56"):
        plan_run(tiny_model(), method=Wanda(), pattern=NM(8, 16), calibration=token_file())


def test_progress_goes_from_zero_to_the_end(tiny_model, token_file, tmp_path):
    steps = []
    prune_model(
        tiny_model(),
        tmp_path / "out",
        method=SparseGPT(),
        pattern=NM(2, 4),
        calibration=token_file(),
        progress=steps.append,
    )
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1].total == 3
    assert any(step.loss is not None for step in steps)


def test_windows_at_once_is_at_least_one():
    assert batching.windows_at_once(10**9) == 1
    assert batching.windows_at_once(128) * 128 >= 1024


def test_arrays_of_tokens(tiny_model, token_file, tmp_path):
    folder, file = tiny_model(), token_file()
    options = {"method": Wanda(), "pattern": Unstructured(0.5)}
    from_file = prune_model(folder, tmp_path / "a", calibration=file, evaluate=file, **options)
    from_array = prune_model(folder, tmp_path / "b", calibration=np.load(file), evaluate=np.load(file), **options)
    assert from_file.after == from_array.after
    assert json.loads((tmp_path / "b" / "jprune.json").read_text())["calibration"]["windows"] == 6
    with pytest.raises(JpruneError, match="array of token ids has shape"):
        plan_run(folder, calibration=np.arange(5), **options)


def test_a_failing_last_evaluation_costs_nothing_else(tiny_model, token_file, tmp_path, monkeypatch):
    from jprune.pipeline.oneshot import measure

    measured = []

    def perplexity(*args, **options):
        measured.append(args)
        if len(measured) == 2:
            raise JpruneError("the cross-entropy is inf")
        return real(*args, **options)

    real = measure.perplexity
    monkeypatch.setattr(measure, "perplexity", perplexity)
    options = {"method": Magnitude(), "pattern": Unstructured(0.5), "evaluate": token_file()}
    report = prune_model(tiny_model(), tmp_path / "out", **options)
    assert report.json()["perplexity"]["after"] is None
    assert "cross-entropy is inf" in report.notices[-1]
    assert jprune.load(tmp_path / "out").config.layers == 3

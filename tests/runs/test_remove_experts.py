"""Experts go that add least: scores are those of Hugging Face's model, and what comes out loads there too."""

import json

import compiled
import hf_families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.pipeline.shrink.plan import plan_shrink
from jprune.structured.experts import RemoveExperts

torch = pytest.importorskip("torch")
TEXT = hf_families.tokens(20, batch=5)
OPTIONS = {"calibration": TEXT}
EXPERTS = {
    "Mixtral-0": {"num_local_experts": 5},
    "Qwen3Moe-0": {"num_experts": 6, "mlp_only_layers": [0]},
    "GptOss-0": {"num_local_experts": 5},
    "Glm4Moe-0": {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Torch models by variant, and the folders that they were saved to."""

    def make(name):
        if name not in made:
            family, architecture, variant = hf_families.VARIANTS[name]
            options = hf_families.sizes(family) | variant | EXPERTS[name]
            model = hf_families.model(architecture, options)
            made[name] = model, hf_families.save(model, tmp_path_factory.mktemp(name) / "model")
        return made[name]

    made: dict = {}
    return make


def ours(checkpoint, tokens):
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    return compiled.apply(checkpoint.config, params, jnp.asarray(tokens))


def reap(model, checkpoint, layer):
    """The scores of a layer, expert by expert and token by token in NumPy, by what Hugging Face's layer reads."""
    read = []
    hook = model.model.layers[layer].mlp.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    hf_families.logits(model, TEXT)
    hook.remove()
    x = read[0].reshape(-1, read[0].shape[-1]).double().numpy()
    router, gate, up, down = (
        np.asarray(checkpoint.read(f"blocks/{layer}/mlp/{name}/kernel"), np.float64)
        for name in ("router", "experts/gate", "experts/up", "experts/down")
    )
    k, lists = checkpoint.config.experts_per_token, [[] for _ in gate]
    for row in x:
        odds = np.exp(row @ router)
        best = np.argsort(-odds)[:k]
        for e in best:
            a = row @ gate[e]
            y = (a / (1 + np.exp(-a)) * (row @ up[e])) @ down[e]
            lists[e].append(odds[e] / odds[best].sum() * np.linalg.norm(y))
    return np.array([np.mean(own) if own else 0 for own in lists]), [len(own) for own in lists]


@pytest.mark.parametrize("name", ["Mixtral-0", "Qwen3Moe-0"])
def test_scores_are_those_of_the_paper(models, name, tmp_path):
    model, folder = models(name)
    checkpoint = load(folder)
    report = jprune.shrink_model(checkpoint, tmp_path / "out", method=RemoveExperts(remove=2), **OPTIONS)
    assert [own.layer for own in report.experts] == [i for i in (0, 1) if checkpoint.config.has_experts(i)]
    for own in report.experts:
        scores, tokens = reap(model, checkpoint, own.layer)
        np.testing.assert_allclose(own.scores, scores, rtol=1e-4)
        assert list(own.tokens) == tokens
        assert own.kept == tuple(np.sort(np.argsort(scores)[2:]))
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("name", EXPERTS)
def test_the_result_is_a_plain_folder(models, name, tmp_path):
    """Its tensors are rows of the original's, routers and their corrections too; transformers computes what we do."""
    model, folder = models(name)
    out = tmp_path / "out"
    report = jprune.shrink_model(folder, out, method=RemoveExperts(remove=2), **OPTIONS)
    before, after = load(folder), load(out)
    assert report.sizes[1]["experts"] == after.config.experts == before.config.experts - 2
    for own in report.experts:
        kept = list(own.kept)
        for part, axis in (
            ("router/kernel", 1),
            ("router/correction", 0),
            ("experts/down/kernel", 0),
            ("experts/down/bias", 0),
        ):
            if (path := f"blocks/{own.layer}/mlp/{part}") in before.shapes:
                np.testing.assert_array_equal(after.read(path), np.take(before.read(path), kept, axis))
        if before.config.expert_groups > 1:
            assert np.bincount(np.array(kept) // 4).tolist() == [3, 3]
    theirs = type(model).from_pretrained(out)
    np.testing.assert_allclose(ours(after, TEXT), hf_families.logits(theirs, TEXT), atol=2e-4)


def test_layers_that_differ_are_for_jprune(models, tmp_path):
    """As many go in all; a plain folder is refused with the way out, before anything is written."""
    _, folder = models("Mixtral-0")
    method = RemoveExperts(remove=1, globally=True, by="frequency")
    report = jprune.shrink_model(folder, tmp_path / "out", method=method, **OPTIONS)
    counts = [sizes["experts"] for sizes in report.sizes]
    assert sum(counts) == 8
    assert len(set(counts)) == 2
    whole, after = load(folder), load(tmp_path / "out")
    assert [after.config.layer(i).experts for i in range(2)] == counts
    assert report.notices[-1].startswith("layers differ in size, so only jprune loads")
    keep = {
        f"blocks/{own.layer}/mlp/{name}/kernel": {axis: own.kept}
        for own in report.experts
        for name, axis in (("router", 1), ("experts/gate", 0), ("experts/up", 0), ("experts/down", 0))
    }
    np.testing.assert_array_equal(ours(after, TEXT), ours(whole.select(keep), TEXT))
    with pytest.raises(JpruneError, match=r"experts.*Leave out `globally`"):
        jprune.shrink_model(folder, tmp_path / "no", method=method, format="hf", **OPTIONS)
    assert not (tmp_path / "no").exists()


def test_a_run_goes_on_where_it_was_stopped(models, tmp_path):
    """After Ctrl-C in the second block: the first is not looked at again, and the result has the same bits."""
    _, folder = models("Mixtral-0")
    method = RemoveExperts(keep=3)
    whole = jprune.shrink_model(folder, tmp_path / "whole", method=method, **OPTIONS)

    def stop(step):
        if step.done > 1:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match="1 parts of the run are done and kept"):
        jprune.shrink_model(folder, out, method=method, progress=stop, **OPTIONS)
    with pytest.raises(JpruneError, match="holds a run that was interrupted"):
        jprune.shrink_model(folder, out, method=method, **OPTIONS)
    begun = []
    again = jprune.shrink_model(folder, out, method=method, resume=True, progress=begun.append, **OPTIONS)
    assert min(step.done for step in begun) == 1
    assert again.experts == whole.experts
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_plan_needs_a_config_alone(models, tmp_path):
    _, folder = models("Glm4Moe-0")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    plan = plan_shrink(tmp_path, method=RemoveExperts(keep=6))
    sizes = [sizes.get("experts") for sizes in plan.sizes]
    assert 6 in sizes
    assert set(sizes) <= {6, None}
    with pytest.raises(JpruneError, match="5 cannot be equally many"):
        plan_shrink(tmp_path, method=RemoveExperts(keep=5))
    assert plan_shrink(tmp_path, method=RemoveExperts(keep=6, globally=True)).sizes is None
    assert json.loads((tmp_path / "config.json").read_text())["n_routed_experts"] == 8

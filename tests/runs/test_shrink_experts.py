"""Channels go inside experts: which, by PyTorch's gradients; and transformers loads what is left."""

import compiled
import hf_families as hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.models import decoder
from jprune.pipeline.shrink.plan import plan_shrink
from jprune.pipeline.shrink.run import shrink_model
from jprune.statistics import Gram
from jprune.structured import LLMPruner, shrink
from jprune.structured.selection import Target
from jprune.trace.observe import observe

torch = pytest.importorskip("torch")
TEXT = hf.tokens(40, batch=16)
HALF = {"target": Target(units=0.5), "calibration": TEXT}
CHANNELS = {"heads": "none", "uniform": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Torch models by variant, and the folders that they were saved to."""
    made: dict = {}

    def make(name):
        if name not in made:
            model = hf.make(name)
            made[name] = model, hf.save(model, tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return make


def gradients(model, tokens):
    """|w g| of the parameters, g by PyTorch's backward pass of the mean loss."""
    ids = torch.from_numpy(tokens).long()
    logits = model(ids, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    said = {name: (p * p.grad).abs().detach().numpy() for name, p in model.named_parameters()}
    model.zero_grad()
    return said


def test_each_expert_loses_what_matters_least_in_it(models, tmp_path):
    """Other channels in each, equally many; weights stay as they are, and transformers computes with them."""
    model, folder = models("Mixtral-0")
    method = LLMPruner(importance="param_first", compensate=False, **CHANNELS)
    report = shrink_model(folder, tmp_path / "out", method=method, **HALF)
    whole, smaller, said = load(folder), load(tmp_path / "out"), gradients(model, TEXT)
    for i in range(2):
        both, down = (said[f"model.layers.{i}.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
        scores = both.reshape(4, 2, 28, -1).sum((1, 3)) + down.sum(1)
        stay = np.sort(np.argsort(scores, axis=1)[:, 14:], axis=1)
        assert len(np.unique(stay, axis=0)) == 4
        for name, axis in (("gate", 2), ("up", 2), ("down", 1)):
            path = f"blocks/{i}/mlp/experts/{name}/kernel"
            index = np.expand_dims(stay, 3 - axis)
            np.testing.assert_array_equal(smaller.read(path), np.take_along_axis(whole.read(path), index, axis))
    assert report.sizes == ({"d_model": 48, "heads": 4, "kv_heads": 2, "d_ff": 14, "experts": 4, "d_expert": 14},) * 2
    assert report.notices == (
        "experts are 14 wide, no multiple of 4, so transformers loads them but computes with "
        'experts_implementation="batched_mm" or "eager" alone; prune with such a `round_to`',
    )
    theirs = type(model).from_pretrained(tmp_path / "out", experts_implementation="batched_mm")
    ours = compiled.apply(smaller.config, jax.tree.map(jnp.asarray, smaller.params()), jnp.asarray(TEXT))
    np.testing.assert_allclose(ours, hf.logits(theirs, TEXT), atol=1e-4)


def test_a_plan_is_what_comes_out(models, tmp_path):
    """Of experts behind a layer with an MLP, from a config.json alone: heads, and the channels of both."""
    _, folder = models("Qwen3Moe-1")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    plan = plan_shrink(tmp_path, method=LLMPruner(compensate=False, uniform=True, round_to=4), target=HALF["target"])
    sizes = {"d_model": 48, "heads": 2, "kv_heads": 1, "d_ff": 16}
    assert plan.sizes == (sizes, sizes | {"experts": 3, "d_expert": 12})
    attention, mlp, experts = (48 * 2 * (2 + 1) * 8 + 2 * 8, 3 * 48 * 16, 3 * (3 * 48 * 12 + 48))
    rest = 2 * hf.VOCAB * 48 + 48  # embedding, head and the last norm
    assert plan.parameters[1] == rest + 2 * (attention + 2 * 48) + mlp + experts


def test_what_is_left_of_each_expert_makes_up_for_it(models, tmp_path):
    """As `shrink` makes it of the Grams of a block whose input does not change; who was sent too little is only cut."""
    _, folder = models("Qwen3Moe-1")  # experts behind a layer that is protected
    method = LLMPruner(heads="none", protect_first=1, protect_last=0)
    whole = load(folder)
    shrink_model(folder, tmp_path / "out", method=method, **HALF)
    plain = LLMPruner(heads="none", protect_first=1, protect_last=0, compensate=False)
    shrink_model(folder, tmp_path / "plain", method=plain, **HALF)
    refitted, cut = load(tmp_path / "out"), load(tmp_path / "plain")
    params = jax.tree.map(jnp.asarray, whole.params())
    x = compiled.block(whole.config, 0)(params["blocks"]["0"], compiled.embed(whole.config)(params, TEXT))
    path = "mlp/experts/down/kernel"
    _, grams = jax.jit(observe(decoder.block(whole.config, 1), Gram, where=path.__eq__))(params["blocks"]["1"], x)
    before, after = (model.read(f"blocks/1/{path}") for model in (whole, cut))
    stay = np.array([[c for c in range(20) if (after[e] == before[e, c]).all(1).any()] for e in range(3)])
    assert stay.shape == (3, 10)
    enough = np.asarray(grams[path].tokens) >= 128
    expected = trees.flatten(shrink(params["blocks"]["1"], {path: {1: stay}}, grams))[path]
    made = refitted.read(f"blocks/1/{path}")
    np.testing.assert_allclose(made[enough], expected[enough], atol=1e-4)
    np.testing.assert_array_equal(made[~enough], after[~enough])
    assert np.abs(made - after)[enough].max() > 0.01


def test_what_cannot_be_is_refused_before_any_work(models, tmp_path):
    _, folder = models("Glm4Moe-1")
    for options, message in (
        ({"globally": True}, "as wide as a number of the others.*leave out `globally`"),
        ({"protect_first": 0, "protect_last": 1, "format": "hf"}, "d_expert 20.*`uniform`"),
    ):
        given = {"format": options.pop("format", None)} | HALF
        with pytest.raises(JpruneError, match=message):
            shrink_model(folder, tmp_path / "no", method=LLMPruner(**options), **given)
    _, olmoe = models("Olmoe-0")
    with pytest.raises(JpruneError, match="OlmoeForCausalLM makes its heads"):
        shrink_model(olmoe, tmp_path / "no", method=LLMPruner(uniform=True), **HALF)
    assert not list(tmp_path.iterdir())

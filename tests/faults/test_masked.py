"""The masked model computes as the smaller model that is cut out of it, whatever family, masks and shapes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jprune import trees
from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.models import decoder, families, stacked
from jprune.structured.shape import Shape
from jprune.tuning.masked_model import MaskedModel, shape_of

TOKENS = jnp.asarray(np.random.default_rng(7).integers(0, 40, (2, 9), dtype=np.int32))


def config_of(folder, hf_config):
    (folder / "config.json").write_text(json.dumps(hf_config))
    return load(folder, weights=False)


def random_params(checkpoint, seed=0):
    rng = np.random.default_rng(seed)
    return trees.unflatten(
        {
            path: (rng.normal(size=x.shape) * (0.5 if path.endswith("kernel") else 1)).astype(np.float32)
            for path, x in checkpoint.shapes.items()
        }
    )


def random_masks(masked, seed=0):
    """Soft values for the right number of units of each row, in random places."""
    rng = np.random.default_rng(seed)
    masks = {}
    for kind, shape in masked.shapes.items():
        order = rng.random(shape).argsort(-1).argsort(-1)
        masks[kind] = jnp.asarray(np.where(order < masked.targets[kind], rng.uniform(0.3, 1, shape), 0), jnp.float32)
    return masks


def masked_logits(masked, params, masks, *, stack=True):
    config = masked.checkpoint.config
    if stack:
        params = stacked.stack(params, stacked.runs(config, params))

    @jax.jit
    def f(params, masks):
        operands, aside = masked.operands(params, masks)
        return decoder.head(config)(
            operands, stacked.hidden(config, around=masked.around(jnp.float32))(operands, TOKENS, aside)
        )

    return f(params, masks)


def sheared_logits(masked, params, masks):
    leaves = dict(masked.sheared(params, masks))
    smaller = masked.left(masks)
    assert {path: x.shape for path, x in leaves.items()} == {path: x.shape for path, x in smaller.shapes.items()}
    return jax.jit(lambda p: decoder.apply(smaller.config, p, TOKENS))(trees.unflatten(leaves))


def check_equal(masked, params, masks):
    got, expected = masked_logits(masked, params, masks), sheared_logits(masked, params, masks)
    scale = float(np.abs(expected).max())
    assert scale > 1e-3
    np.testing.assert_allclose(np.asarray(got) / scale, np.asarray(expected) / scale, atol=1e-5)


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "hidden_size": 24,
    "intermediate_size": 20, "num_hidden_layers": 3, "head_dim": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "torch_dtype": "float32",
}  # fmt: skip


@settings(
    max_examples=5, phases=[Phase.generate], deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(
    heads=st.sampled_from([(1, 2), (1, 3), (2, 1), (3, 1), (2, 2), (3, 2), (2, 3)]),
    tied=st.booleans(),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20)),
    seed=st.integers(0, 9),
)
def test_masked_is_sheared(tmp_path_factory, heads, tied, sizes, seed):
    """Multi-head, grouped-query and multi-query attention; tied and untied; any part of the shape pruned or not."""
    kv_heads, group = heads
    own = {"num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    checkpoint = config_of(tmp_path_factory.mktemp("model"), LLAMA | own)
    layers, hidden, kept, left, intermediate = sizes
    kept, left = min(kept, kv_heads), min(left, group)
    target = Shape(layers=layers, hidden=hidden, heads=kept * left, kv_heads=kept, intermediate=intermediate)
    if target == shape_of(checkpoint):
        return
    masked = MaskedModel(checkpoint, target)
    check_equal(masked, random_params(checkpoint, seed), random_masks(masked, seed))


def test_what_is_masked_is_not_there(tmp_path):
    """Layer, head, channel and hidden dimension with a mask of 0: changing their weights changes nothing."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    checkpoint = config_of(tmp_path, LLAMA | heads)
    masked = MaskedModel(checkpoint, Shape(layers=2, hidden=20, heads=1, kv_heads=1, intermediate=11))
    params, masks = random_params(checkpoint), random_masks(masked)
    before = masked_logits(masked, params, masks)
    gone = {kind: np.argwhere(np.asarray(x) == 0)[0] for kind, x in masks.items()}
    leaves = {path: np.array(x) for path, x in trees.flatten(params).items()}
    layer, channel = gone["mlp"]
    leaves[f"blocks/{layer}/mlp/up/kernel"][:, channel] += 1
    layer, kv = gone["attention"]
    leaves[f"blocks/{layer}/attn/k/kernel"][:, kv] += 1
    layer, kv, rank = gone["query"]
    leaves[f"blocks/{layer}/attn/q/kernel"][:, 2 * kv + rank] += 1
    leaves["embed/embedding"][:, gone["hidden"][0]] += 1
    leaves["blocks/0/attn/o/kernel"][..., gone["hidden"][0]] += 1
    leaves[f"blocks/{gone['layer'][0]}/mlp/gate/kernel"] += 1
    np.testing.assert_allclose(masked_logits(masked, trees.unflatten(leaves), masks), before, atol=1e-5)
    leaves["blocks/0/mlp/down/kernel"] += 1
    leaves["blocks/1/mlp/down/kernel"] += 1
    assert np.abs(masked_logits(masked, trees.unflatten(leaves), masks) - before).max() > 1e-2


def test_masks_of_one_change_nothing(tmp_path):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    checkpoint = config_of(tmp_path, LLAMA | heads)
    masked = MaskedModel(checkpoint, Shape(layers=2, hidden=20, heads=1, kv_heads=1, intermediate=11))
    params = random_params(checkpoint)
    ones = {kind: jnp.ones(shape) for kind, shape in masked.shapes.items()}
    plain = jax.jit(lambda p: decoder.apply(checkpoint.config, p, TOKENS))(params)
    for stack in (True, False):
        np.testing.assert_allclose(masked_logits(masked, params, ones, stack=stack), plain, rtol=1e-4, atol=1e-4)


def test_refusals(tmp_path):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    checkpoint = config_of(tmp_path, LLAMA | heads)
    whole = dict(layers=3, hidden=24, heads=4, kv_heads=2, intermediate=20)

    def fails(match, **sizes):
        with pytest.raises(JpruneError, match=match):
            MaskedModel(checkpoint, Shape(**whole | sizes))

    fails("the target has hidden 32 and the model 24", hidden=32)
    fails("multiple of kv_heads", heads=3)
    fails("at most 2 heads stay with 1 KV heads", kv_heads=1)
    fails("nothing to prune")


FIRST = {a.removesuffix("ForCausalLM"): (f, a, f.variants[0]) for f in families.FAMILIES for a in f.architectures}
DIFFERENT = ["OPT", "Bloom", "StableLm", "Gemma2", "Olmo2", "Qwen2Moe"]
"""One of each kind: norms with and without biases, before and after, of queries; positions; parallel; experts."""
REFUSED = {
    "Bloom": {"heads": "frozen: .*constant array"},
    "Gemma2": {"hidden": "derives embed_scale"},
    "Qwen2Moe": {"intermediate": "width of experts"},
}
"""What a target cannot ask of a family, and the reason that is given."""


@pytest.mark.parametrize("name", DIFFERENT)
def test_families(name, tmp_path):
    """Everything that can be pruned of a family, at once; what cannot is refused, with the reason."""
    pytest.importorskip("torch")
    hf = pytest.importorskip("hf_families")
    family, architecture, variant = FIRST[name]
    sizes = hf.sizes(family, kv_heads=2, group=2, head_dim=8) | variant
    checkpoint = config_of(tmp_path, {"architectures": [architecture]} | sizes)
    source = shape_of(checkpoint)
    wanted = {
        "layers": {"layers": source.layers - 1},
        "hidden": {"hidden": source.hidden - 5},
        "heads": {"heads": source.heads // 2, "kv_heads": max(source.kv_heads // 2, 1)},
        "intermediate": {"intermediate": source.intermediate - 7},
    }
    for what, reason in REFUSED.get(name, {}).items():
        with pytest.raises(JpruneError, match=reason):
            MaskedModel(checkpoint, dataclasses.replace(source, **wanted.pop(what)))
    together = {size: n for change in wanted.values() for size, n in change.items()}
    masked = MaskedModel(checkpoint, dataclasses.replace(source, **together))
    check_equal(masked, random_params(checkpoint), random_masks(masked))

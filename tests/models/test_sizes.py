"""Layers of different sizes: config.json in both directions, and a forward pass against plain NumPy."""

import dataclasses
import json

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.errors import JpruneError
from jprune.evaluate import perplexity
from jprune.models import decoder, families, generate
from jprune.models.config import DecoderConfig, LayerSizes, describe
from jprune.models.parameters import shapes

BASE = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 300,
}
OWN = {"1": {"num_attention_heads": 6, "num_key_value_heads": 3}, "02": {"intermediate_size": 20}}
SIZES = (LayerSizes(4, 2, 32), LayerSizes(6, 3, 32), LayerSizes(4, 2, 20))


@pytest.fixture
def model(getkey):
    """A model whose layers differ, and its parameters."""
    config = families.config(BASE | {"per_layer_config": OWN, "tie_word_embeddings": True, "attention_bias": True})
    params = trees.flatten(decoder.init_params(config, getkey()))
    rng = np.random.default_rng(0)
    large = {
        path: x * 12 if path.endswith("kernel") else x + np.float32(0.1) * rng.standard_normal(x.shape, np.float32)
        for path, x in params.items()
    }
    return config, trees.unflatten(large)


def reference(config, params, tokens):
    """Logits of one row of tokens, in float64, head by head."""
    p = {path: np.asarray(x, np.float64) for path, x in trees.flatten(params).items()}

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def turn(x):
        half = config.head_dim // 2
        angle = np.arange(len(x))[:, None] / config.rope.theta ** (np.arange(half) / half)
        a, b = x[:, :half], x[:, half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

    x = p["embed/embedding"][tokens]
    later = np.triu(np.ones((len(tokens), len(tokens)), bool), 1)
    for i in range(config.layers):
        w = {path.removeprefix(f"blocks/{i}/"): value for path, value in p.items() if path.startswith(f"blocks/{i}/")}
        h = norm(x, w["attn_norm/scale"])
        q, k, v = (np.einsum("td,dhe->hte", h, w[f"attn/{n}/kernel"]) + w[f"attn/{n}/bias"][:, None] for n in "qkv")
        attended = w["attn/o/bias"]
        for head in range(len(q)):
            own = head // (len(q) // len(k))
            scores = np.where(later, -np.inf, turn(q[head]) @ turn(k[own]).T / np.sqrt(config.head_dim))
            weights = np.exp(scores - scores.max(1, keepdims=True))
            attended = attended + weights / weights.sum(1, keepdims=True) @ v[own] @ w["attn/o/kernel"][head]
        x = x + attended
        h = norm(x, w["mlp_norm/scale"])
        gate = h @ w["mlp/gate/kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp/up/kernel"])) @ w["mlp/down/kernel"]
    return norm(x, p["final_norm/scale"]) @ p["embed/embedding"].T


def test_sizes_by_layer():
    config = families.config(BASE | {"per_layer_config": OWN})
    assert config.sizes == SIZES
    assert not config.uniform
    assert [config.layer(i) for i in range(3)] == list(SIZES)
    assert shapes(config)["blocks/1/attn/k/kernel"] == (24, 3, 8)
    assert shapes(config)["blocks/2/mlp/down/kernel"] == (20, 24)
    assert shapes(config)["blocks/0/mlp/down/kernel"] == (32, 24)
    table = families.table(config)
    assert table["blocks/1/attn/o/kernel"].shape == (24, 48)
    assert {path: entry.path_shape for path, entry in table.items()} == shapes(config)
    assert describe(config)["layers"][2] == {"heads": 4, "kv_heads": 2, "d_ff": 20}
    json.dumps(describe(config))


def test_equal_layers_are_a_plain_config():
    plain = families.config(BASE)
    everywhere = {str(i): {"intermediate_size": 20} for i in range(3)}
    assert families.config(BASE | {"per_layer_config": everywhere}) == dataclasses.replace(plain, d_ff=20)
    assert families.config(BASE | {"per_layer_config": {}}) == plain
    assert plain.uniform
    assert plain.layer(1) == LayerSizes(4, 2, 32)


def test_resized_names_only_layers_that_differ():
    hf = families.resized(BASE, d_model=24, head_dim=8, layers=range(3), sizes=SIZES)
    assert hf["per_layer_config"] == {
        "1": {"num_attention_heads": 6, "num_key_value_heads": 3},
        "2": {"intermediate_size": 20},
    }
    assert families.config(hf).sizes == SIZES
    back = families.resized(hf, d_model=24, head_dim=8, layers=(0, 2), sizes=SIZES[:1] * 2)
    assert "per_layer_config" not in back
    assert families.config(back) == dataclasses.replace(families.config(BASE), layers=2, windows=())


@pytest.mark.parametrize(
    "given", [{"max_window_layers": 1}, {"layer_types": ["full_attention"] + ["sliding_attention"] * 2}]
)
def test_windows_of_the_layers_that_are_left(given):
    hf = BASE | {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5} | given
    assert families.config(hf).windows == (None, 5, 5)
    left = families.resized(hf, d_model=24, head_dim=8, layers=(0, 2), sizes=SIZES[:1] * 2)
    assert families.config(left).windows == (None, 5)
    left = families.resized(hf, d_model=24, head_dim=8, layers=(1, 2), sizes=SIZES[:1] * 2)
    assert families.config(left).windows == (5, 5)


@pytest.mark.parametrize(
    ("kind", "interval"), [("smollm3", "no_rope_layer_interval"), ("cohere2", "sliding_window_pattern")]
)
def test_layers_that_are_not_turned_stay_so_when_others_go(kind, interval):
    hf = BASE | {"model_type": kind, "architectures": None, interval: 2, "num_hidden_layers": 4}
    assert [rope is None for rope in families.config(hf).ropes] == [False, True, False, True]
    left = families.resized(hf, d_model=24, head_dim=8, layers=(1, 2, 3), sizes=SIZES[:1] * 3)
    assert [rope is None for rope in families.config(left).ropes] == [True, False, True]


def test_a_default_number_of_layers_without_window_is_written_down():
    hf = BASE | {"model_type": "qwen2", "use_sliding_window": True, "num_hidden_layers": 30}
    left = families.resized(hf, d_model=24, head_dim=8, layers=(0, 29), sizes=SIZES[:1] * 2)
    assert families.config(left).windows == (None, 4096)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"3": {"intermediate_size": 20}}, "names layer '3'.*layers 0 to 2"),
        ({"one": {}}, "names layer 'one'"),
        ({"1": {"skip": ["attention"]}}, "layer 1 its own 'skip'.*intermediate_size only"),
        ({"1": {"num_attention_heads": 5}}, "layer 1: 5 query heads cannot share 2"),
        ({"1": {"intermediate_size": 0}}, "layer 1: intermediate_size must be a positive integer, got 0"),
        ({"1": {"intermediate_size": "many"}}, "layer 1: intermediate_size .*'many'"),
        ([1], "must map layer numbers"),
        ({"1": 5}, "must map layer numbers"),
    ],
)
def test_what_does_not_fit_is_refused(own, message):
    with pytest.raises(JpruneError, match=message):
        families.config(BASE | {"per_layer_config": own})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (SIZES[:1], "each of 3 layers, or none; got those of 1"),
        ((*SIZES[:2], LayerSizes(4, 2, 0)), "layer 2: d_ff must be a positive integer, got 0"),
        ((*SIZES[:2], LayerSizes(4, 3, 9)), "layer 2: 4 query heads cannot share 3"),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    common = {"vocab": 9, "d_model": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "d_ff": 6, "context": 9}
    with pytest.raises(JpruneError, match=message):
        DecoderConfig(architecture="LlamaForCausalLM", layers=3, sizes=sizes, **common)


def test_forward_equals_numpy(model):
    config, params = model
    tokens = np.random.default_rng(1).integers(0, 40, 19)
    expected = reference(config, params, tokens)
    assert np.abs(expected).max() > 1
    with jax.default_matmul_precision("highest"):
        logits = compiled.apply(config, params, jnp.asarray(tokens[None], jnp.int32))[0]
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-5)


def test_generation_with_a_cache_equals_numpy(model):
    config, params = model
    tokens = [3, 14, 15, 9]
    for _ in range(6):
        tokens.append(int(reference(config, params, np.array(tokens))[-1].argmax()))
    assert len(set(tokens[4:])) > 2
    assert generate.generate(config, params, tokens[:4], max_tokens=6) == tokens[4:]


def test_perplexity_equals_numpy(model):
    config, params = model
    tokens = np.random.default_rng(2).integers(0, 40, (2, 11), dtype=np.int32)

    class Weights:
        def __init__(self):
            self.config, self.model = config, decoder.in_blocks(config)

        def params(self, prefix):
            below = {p: x for p, x in trees.flatten(params).items() if p.startswith(f"{prefix}/")}
            return trees.unflatten({p.removeprefix(f"{prefix}/"): x for p, x in below.items()})

    expected = []
    for row in tokens:
        logits = reference(config, params, row)[:-1]
        nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(10), row[1:]]
        expected.append(nll.mean())
    measured = perplexity.mean_nll(Weights(), tokens, dtype=jnp.float32)
    np.testing.assert_allclose(measured, expected, rtol=1e-5)


def test_abstract_parameters(model):
    config, params = model
    abstract = decoder.abstract_params(config)
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, params)

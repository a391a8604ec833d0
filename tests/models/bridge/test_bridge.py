"""Models without a table, through PyTorch's module: against transformers, and against tables where there are both."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
import bridged
import hf_families as hf
import torch

from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.methods import Wanda
from jprune.patterns import Unstructured
from jprune.pipeline import prune_model

ROAD = "PyTorch's module"
TOKENS = hf.tokens(12, batch=4)
ROADS = {
    "LlamaForCausalLM": bridged.SMALL,
    "GPT2LMHeadModel": {"vocab_size": hf.VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "Qwen3MoeForCausalLM": bridged.SMALL
    | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}


def pruned(model, out, **options):
    """By Wanda, calibrated on windows of tokens."""
    return prune_model(
        model, out, method=Wanda(), pattern=Unstructured(0.5), calibration=TOKENS, expert_tokens=0, **options
    )


@pytest.fixture(scope="module")
def flex_olmo(tmp_path_factory):
    """A mixture of experts; its files have a tensor for every kernel of every expert."""
    options = bridged.SMALL | {"num_experts": 4, "num_experts_per_tok": 2}
    return bridged.saved(tmp_path_factory.mktemp("flex_olmo") / "source", "FlexOlmoForCausalLM", **options)


def test_a_model_without_a_table_is_pruned_as_transformers_computes_it(flex_olmo, tmp_path):
    checkpoint = load(flex_olmo)
    assert checkpoint.road == ROAD
    np.testing.assert_allclose(
        bridged.logits(checkpoint, TOKENS), hf.logits(bridged.theirs(flex_olmo), TOKENS), atol=3e-6
    )
    report = pruned(flex_olmo, tmp_path / "out", evaluate=TOKENS)
    assert json.loads((tmp_path / "out" / "jprune.json").read_text())["model"]["road"] == ROAD
    before, after = bridged.tensors(flex_olmo), bridged.tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    kernels = {key for key in before if "_proj" in key}
    for key, stored in before.items():
        stays = after[key] != 0
        np.testing.assert_array_equal(after[key][stays], stored[stays])
        # Of every output half of the inputs stay; what routes tokens to experts is left alone.
        assert stays.mean() == (0.5 if key in kernels else 1), key
    for measured, folder in ((report.before, flex_olmo), (report.after, tmp_path / "out")):
        theirs = torch.from_numpy(hf.logits(bridged.theirs(folder), TOKENS))[:, :-1].flatten(0, 1)
        nll = torch.nn.functional.cross_entropy(theirs, torch.from_numpy(TOKENS).long()[:, 1:].flatten())
        assert measured.value == pytest.approx(float(nll.exp()), rel=1e-5)


@pytest.mark.parametrize("architecture", ROADS)
def test_both_roads_prune_alike(architecture, tmp_path, monkeypatch):
    source = bridged.saved(tmp_path / "source", architecture, **ROADS[architecture])
    other = bridged.opened(source, monkeypatch)
    assert (load(source).road, other.road) == ("native", ROAD)
    pruned(source, tmp_path / "native")
    pruned(other, tmp_path / "bridge")
    bridged.check_alike(tmp_path / "native", tmp_path / "bridge")
    np.testing.assert_allclose(bridged.logits(other, TOKENS), bridged.logits(load(source), TOKENS), atol=1e-5)


def test_what_is_made_smaller_or_packed_is_refused(flex_olmo, tmp_path):
    with pytest.raises(JpruneError, match="FlexOlmoForCausalLM has no table in jprune"):
        load(flex_olmo).config  # noqa: B018
    with pytest.raises(JpruneError, match="a Hugging Face folder alone, not as orbax"):
        pruned(flex_olmo, tmp_path / "out", format="orbax")
    assert not (tmp_path / "out").exists()


def test_an_operator_without_a_counterpart_is_named(flex_olmo, monkeypatch):
    from jprune.bridge.environment import environment

    without = {name: op for name, op in environment()._ops.items() if "rsqrt" not in str(name)}
    monkeypatch.setattr(environment(), "_ops", without)
    with pytest.raises(JpruneError, match=r"its operator aten::rsqrt, at modeling_flex_olmo.py:\d+ .* no counterpart"):
        load(flex_olmo)


def test_python_that_asks_for_values_is_refused(tmp_path):
    options = {"n_words": 40, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "pad_token_id": 0}
    source = bridged.saved(tmp_path, "XLMWithLMHeadModel", **options)
    with pytest.raises(JpruneError, match=r"modeling_xlm.py:\d+ \(.*\) its Python code asks for values"):
        load(source)


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "nothing", "architectures": ["NothingForCausalLM"]})
    )
    with pytest.raises(JpruneError, match=r"unsupported architecture 'NothingForCausalLM'.*no causal language model"):
        load(tmp_path, weights=False)


def test_layers_that_differ_only_beyond_their_window(tmp_path, monkeypatch):
    """The few tokens that are traced first show no window: layers of two kinds are told apart all the same."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    options = bridged.SMALL | {"num_hidden_layers": 3, "layer_types": kinds, "sliding_window": 16, "head_dim": 8}
    source = bridged.saved(tmp_path, "Gemma3ForCausalLM", **options)
    checkpoint = bridged.opened(source, monkeypatch)
    blocks = checkpoint.model.blocks
    assert blocks[0] is blocks[2]
    assert blocks[0] is not blocks[1]
    tokens = hf.tokens(24)
    np.testing.assert_allclose(bridged.logits(checkpoint, tokens), hf.logits(bridged.theirs(source), tokens), atol=3e-6)

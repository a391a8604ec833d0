"""Longer tests of the bridge: runs that are stopped, further options, and more architectures that have a table too."""

import numpy as np
import pytest

pytest.importorskip("torch")
import bridged
import hf_families as hf
import jax
import torch
import transformers

from jprune.bridge import scans
from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.methods import Magnitude, SparseGPT, Wanda
from jprune.patterns import Unstructured
from jprune.pipeline import prune_model
from jprune.pipeline.oneshot.run import plan_run

TOKENS = hf.tokens(12, batch=4)
JAMBA = bridged.SMALL | {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
JAMBA |= {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
BOTH = ("Llama-0", "GPT2LMHeadModel-0", "Qwen2-0", "Gemma2-0", "Phi-0", "Bloom-0", "GPTNeoX-0", "Falcon-0")
BOTH += ("Mixtral-0", "Qwen3Moe-0", "GptOss-0", "DeepseekV3-0")
"""Of one kind each."""


@pytest.fixture(scope="module")
def jamba(tmp_path_factory):
    """A hybrid: a layer of Mamba's, one of attention with experts."""
    return bridged.saved(tmp_path_factory.mktemp("jamba") / "source", "JambaForCausalLM", **JAMBA)


def stopped_after(blocks):
    def progress(step):
        if step.done >= blocks:
            raise KeyboardInterrupt

    return progress


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(jamba, tmp_path):
    options = {"method": SparseGPT(), "pattern": Unstructured(0.5), "calibration": TOKENS}
    options |= {"expert_tokens": 0, "allocate": "linear"}
    prune_model(jamba, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        prune_model(jamba, tmp_path / "out", progress=stopped_after(1), **options)
    assert not (tmp_path / "out").exists()
    prune_model(jamba, tmp_path / "out", resume=True, **options)
    whole, resumed = (bridged.tensors(tmp_path / name) for name in ("whole", "out"))
    for key, values in whole.items():
        assert resumed[key].tobytes() == values.tobytes(), key


def test_zeros_stay_when_more_is_pruned(jamba, tmp_path):
    prune_model(jamba, tmp_path / "once", method=Magnitude(), pattern=Unstructured(0.3))
    options = {"calibration": TOKENS, "expert_tokens": 0, "keep_zeros": True}
    prune_model(tmp_path / "once", tmp_path / "twice", method=Wanda(), pattern=Unstructured(0.6), **options)
    once, twice = (bridged.tensors(tmp_path / name) for name in ("once", "twice"))
    for key, values in once.items():
        assert not twice[key][values == 0].any(), key


def test_a_plan_touches_nothing_and_knows_the_kernels(jamba):
    plan = plan_run(jamba, method=Wanda(), pattern=Unstructured(0.5), samples=4, sequence_length=12)
    paths = [kernel.path for kernel in plan.kernels]
    assert "blocks/0/mamba/in_proj/weight" in paths
    assert "blocks/1/self_attn/q_proj/weight" in paths
    assert not [path for path in paths if "router" in path or "conv1d" in path]
    assert plan.seconds > 0


def test_a_kernel_that_a_layer_calls_before_and_after_others_is_left_alone(tmp_path):
    tiny = pytest.importorskip("tiny_configs")
    source = hf.save(tiny.model("gemma3n_text"), tmp_path)
    checkpoint = load(source)
    tokens = np.random.default_rng(1).integers(3, tiny.VOCAB, (2, 12))
    want = hf.logits(bridged.theirs(source), tokens)
    np.testing.assert_allclose(bridged.logits(checkpoint, tokens), want, atol=1e-5)
    planned = plan_run(source, method=Wanda(), pattern=Unstructured(0.5), samples=2, sequence_length=12)
    paths = [kernel.path for kernel in planned.kernels]
    assert "blocks/0/altup/modality_router/weight" in checkpoint.shapes
    assert not [path for path in paths if "modality_router" in path]
    assert "blocks/0/self_attn/q_proj/weight" in paths


def test_parameters_that_are_single_numbers_pass_through_a_run(tmp_path):
    tiny = pytest.importorskip("tiny_configs")
    source = hf.save(tiny.model("apertus"), tmp_path / "source")
    prune_model(source, tmp_path / "out", method=Wanda(), pattern=Unstructured(0.5), calibration=TOKENS)
    before, after = bridged.tensors(source), bridged.tensors(tmp_path / "out")
    numbers = [key for key, values in before.items() if values.shape == ()]
    assert numbers
    assert all(after[key].tobytes() == before[key].tobytes() for key in numbers)
    assert (after["model.layers.1.mlp.up_proj.weight"] == 0).mean() == 0.5


def test_the_scan_is_the_loop_of_transformers():
    from transformers.models.mamba import modeling_mamba

    draw = np.random.default_rng(0)
    u, dt, b, c = (draw.standard_normal(shape).astype(np.float32) for shape in ((2, 6, 9),) * 2 + ((2, 4, 9),) * 2)
    a = -np.abs(draw.standard_normal((6, 4)).astype(np.float32))
    dt = np.abs(dt)
    given = [torch.from_numpy(x) for x in (u, dt, a, b, c)]
    want, state = modeling_mamba.mamba_selective_scan.__wrapped__(*given, return_last_state=True)
    got, last = jax.jit(scans.selective_scan)(u, dt, a, b, c)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
    np.testing.assert_allclose(last, state.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_both_roads_give_the_same_logits_masks_and_weights(name, tmp_path, monkeypatch):
    """SparseGPT's, which follow from the Grams of all layers before.

    Zeros are chosen output by output: kernels that one road has apart and the other in one (q, k and v; gate and up)
    would choose among other outputs otherwise.
    """
    source = hf.save(hf.make(name), tmp_path / "source")
    native, other = load(source), bridged.opened(source, monkeypatch)
    assert other.road != native.road
    np.testing.assert_allclose(bridged.logits(other, TOKENS), bridged.logits(native, TOKENS), atol=3e-5)
    pattern = Unstructured(0.5, per="output")
    options = {"method": SparseGPT(), "pattern": pattern, "calibration": TOKENS, "expert_tokens": 0}
    for road, checkpoint in (("native", native), ("bridge", other)):
        prune_model(checkpoint, tmp_path / road, **options)
    bridged.check_alike(tmp_path / "native", tmp_path / "bridge")


def test_both_roads_know_single_experts(tmp_path, monkeypatch):
    """Gate and up are two stacks on one road, and one on the other."""
    source = hf.save(hf.make("Qwen3Moe-0"), tmp_path / "source")
    options = {"pattern": Unstructured(0.5, per="output"), "expert_tokens": 0}
    options |= {"where": ("experts/1/", "blocks/0/.*/3/")}
    for road, checkpoint in (("native", load(source)), ("bridge", bridged.opened(source, monkeypatch))):
        prune_model(checkpoint, tmp_path / road, method=SparseGPT(), calibration=TOKENS, **options)
    bridged.check_alike(tmp_path / "native", tmp_path / "bridge")
    before, after = bridged.tensors(source), bridged.tensors(tmp_path / "bridge")
    assert {key for key in before if (before[key] != after[key]).any()} == {
        f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight"
        for i, e in ((0, 1), (0, 3), (1, 1))
        for name in ("gate", "up", "down")
    }


def test_layers_that_share_parameters_are_refused(tmp_path):
    options = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    options |= {"intermediate_size": 16, "max_position_embeddings": 32, "is_decoder": True}
    source = bridged.saved(tmp_path, "RoFormerForCausalLM", **options)
    with pytest.raises(JpruneError, match=r"embed_positions.weight is shared by several layers \(0, 1\)"):
        load(source)


def test_every_tiny_config_is_of_a_model_that_transformers_has():
    tiny = pytest.importorskip("tiny_configs")
    assert set(tiny.SPECIAL) <= set(tiny.KINDS)
    assert isinstance(tiny.config("bert"), transformers.BertConfig)

"""Tables and configs of the families: round trips, Hugging Face's defaults and old keys, and what is refused."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune.errors import JpruneError
from jprune.models import families
from jprune.models.families.table import entry
from jprune.models.parameters import shapes

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 10}
ARCHITECTURES = tuple(families.ARCHITECTURES)


def small(family, kv_heads=2, group=2, head_dim=8, **options):
    """config.json of a small model; keys that a family does not have do no harm."""
    shared = family.names.get("num_key_value_heads", "num_key_value_heads") in family.defaults
    heads = kv_heads * (group if shared and "kv_lora_rank" not in family.defaults else 1)
    common = SIZES | {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    named = {family.names.get(key, key): value for key, value in common.items()}
    return {"architectures": [family.architectures[0]]} | named | options


@settings(max_examples=80, deadline=None)
@given(
    family=st.sampled_from(families.FAMILIES),
    variant=st.integers(0, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    tied=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_reading_and_writing_a_table_is_bit_exact(family, variant, kv_heads, group, tied, dtype):
    options = family.variants[variant % len(family.variants)]
    config = families.config(small(family, kv_heads, group, **options) | {"tie_word_embeddings": tied})
    table = families.table(config)
    assert {path: e.path_shape for path, e in table.items()} == shapes(config)
    random = np.random.default_rng(0)
    bits = {
        key: random.integers(0, 256, (*e.shape, np.dtype(dtype).itemsize), dtype=np.uint8)  # NaNs and infs too
        for e in table.values()
        for key in e.keys
    }
    stored = {key: value.view(dtype)[..., 0] for key, value in bits.items()}
    written = {key: np.zeros_like(value) for key, value in stored.items()}
    counts = dict.fromkeys(stored, 0)
    for path, e in table.items():
        ours = e.read(*(stored[key] for key in e.keys))
        assert ours.shape == e.path_shape, path
        for index, key in enumerate(e.keys):
            e.write_to(index, ours.copy(), written[key])
            counts[key] += ours.size // len(e.keys)
        if e.whole and not e.stacked:
            assert np.shares_memory(ours, stored[path_key := e.key]), path
            assert e.write(ours).flags.c_contiguous
            assert e.write(ours).tobytes() == stored[path_key].tobytes(), path
    assert counts == {key: value.size for key, value in stored.items()}, "every element is of one parameter"
    for key, value in stored.items():
        assert written[key].tobytes() == value.tobytes(), key


def test_a_kernel_is_the_transposed_weight_with_heads_apart(rng):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}
    config = families.config({"architectures": ["LlamaForCausalLM"], **SIZES, **heads})
    table = families.table(config)
    q, o = rng.normal(size=(12, 8)), rng.normal(size=(8, 12))
    np.testing.assert_array_equal(table["blocks/1/attn/q/kernel"].read(q)[:, 1, 2], q[6 + 2])
    np.testing.assert_array_equal(table["blocks/1/attn/o/kernel"].read(o)[1, 2], o[:, 6 + 2])
    assert table["blocks/1/attn/q/kernel"].key == "model.layers.1.self_attn.q_proj.weight"


def sizes_of(**sizes):
    return sizes.__getitem__


def test_fused_heads_lie_side_by_side(rng):
    stored = rng.normal(size=(18, 5))
    size = sizes_of(d_model=5, heads=2, head_dim=3)
    parts = [
        entry("qkv", f"(heads {axes} head_dim) d_model", ("d_model", "heads", "head_dim"), size)
        for axes in ("<1>+1+1", "1+<1>+1", "1+1+<1>")
    ]
    assert parts[0].shape == (18, 5)
    np.testing.assert_array_equal(parts[1].read(stored)[:, 1, 2], stored[9 + 3 + 2])
    out = np.zeros_like(stored)
    for part in parts:
        part.write(part.read(stored), out)
    np.testing.assert_array_equal(out, stored)
    with pytest.raises(TypeError, match="several parameters"):
        parts[0].write(parts[0].read(stored))


def test_fused_parts_of_unequal_size(rng):
    stored = rng.normal(size=(5, 24))
    size = sizes_of(d_model=5, heads=4, kv_heads=2, head_dim=3)
    v = entry("c_attn", "d_model (heads+kv_heads+<kv_heads> head_dim)", ("d_model", "kv_heads", "head_dim"), size)
    np.testing.assert_array_equal(v.read(stored)[:, 1, 2], stored[:, 18 + 3 + 2])


def test_query_heads_stored_with_their_key_value_head(rng):
    stored = rng.normal(size=(24, 5))  # twice: two queries, key, value
    size = sizes_of(d_model=5, heads=4, kv_heads=2, group=2, head_dim=3)
    q = entry("qkv", "(kv_heads <group>+1+1 head_dim) d_model", ("d_model", "heads", "head_dim"), size)
    k = entry("qkv", "(kv_heads group+<1>+1 head_dim) d_model", ("d_model", "kv_heads", "head_dim"), size)
    np.testing.assert_array_equal(q.read(stored)[:, 3, 1], stored[12 + 3 + 1])
    np.testing.assert_array_equal(k.read(stored)[:, 1, 1], stored[12 + 6 + 1])


def test_a_parameter_may_take_a_tensor_for_each_of_its_first_axis(rng):
    stored = [rng.normal(size=(3, 5)) for _ in range(4)]
    e = entry(
        "experts.{experts}.w1", "d_ff d_model", ("experts", "d_model", "d_ff"), sizes_of(experts=4, d_model=5, d_ff=3)
    )
    assert e.keys == tuple(f"experts.{i}.w1" for i in range(4))
    np.testing.assert_array_equal(e.read(*stored)[2], stored[2].T)
    out = np.zeros((3, 5))
    e.write_to(2, e.read(*stored), out)
    np.testing.assert_array_equal(out, stored[2])
    with pytest.raises(TypeError, match="one of 4 tensors"):
        e.write(e.read(*stored))


IMPOSSIBLE = {"Glm4MoeForCausalLM": {"head_dim": 128}, "DeepseekV2ForCausalLM": {"num_experts_per_tok": 6}}
"""Keys whose defaults no model can have."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_missing_keys_have_hugging_face_defaults(architecture):
    transformers = pytest.importorskip("transformers")
    hf_class = transformers.CONFIG_MAPPING[families.ARCHITECTURES[architecture].model_type]
    given = {"architectures": [architecture]} | IMPOSSIBLE.get(architecture, {})
    assert families.config(given) == families.config(hf_class().to_dict() | given)


V2_LITE = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize(
    ("hf", "billions"),
    [
        ({"model_type": "gpt_oss"}, "116.83"),  # arXiv:2508.10925, table 1
        ({"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32}, "20.91"),
        ({"model_type": "deepseek_v3"}, "671"),  # arXiv:2412.19437, section 1
        (V2_LITE, "15.7"),  # arXiv:2405.04434, appendix B
    ],
    ids=["gpt-oss-120b", "gpt-oss-20b", "DeepSeek-V3", "DeepSeek-V2-Lite"],
)
def test_published_models_have_as_many_parameters_as_their_reports_say(hf, billions):
    count = sum(math.prod(shape) for shape in shapes(families.config(hf)).values())
    assert f"{count / 1e9:.{len(billions.partition('.')[2])}f}" == billions


def test_model_type_serves_where_architectures_are_missing():
    assert families.config({"model_type": "qwen2"}).architecture == "Qwen2ForCausalLM"


ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_keys_of_transformers_4_and_5_mean_the_same(kind):
    base = {"model_type": "llama"}
    old = {**base, "rope_theta": 5e5, "rope_scaling": {"type": kind, **ROPES[kind]}}
    new = {**base, "rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **ROPES[kind]}}
    assert families.config(old) == families.config(new)
    assert families.config(new).rope.kind == kind
    assert families.config(new).rope.theta == 5e5


def test_windows():
    mistral = {"model_type": "mistral", "num_hidden_layers": 3}
    assert families.config(mistral).windows == (4096,) * 3
    assert families.config({**mistral, "sliding_window": None}).windows == (None,) * 3
    qwen = {"model_type": "qwen3", "num_hidden_layers": 3, "sliding_window": 7, "max_window_layers": 2}
    assert families.config(qwen).windows == (None,) * 3
    assert families.config({**qwen, "use_sliding_window": True}).windows == (None, None, 7)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert families.config({**qwen, "use_sliding_window": True, "layer_types": kinds}).windows == (7, None, 7)


@pytest.mark.parametrize(
    ("hf", "same"),
    [
        ({"model_type": "gemma2", "sliding_window": 5, "attn_logit_softcapping": None}, None),
        ({"model_type": "llama", "rope_scaling": None, "head_dim": None, "per_layer_config": None}, {}),
        ({"model_type": "llama", "attention_bias": None, "architectures": None}, {}),
        ({"model_type": "mistral", "num_key_value_heads": None}, {"num_key_value_heads": 32}),
        ({"model_type": "llama", "architectures": ["LLaMAForCausalLM"]}, {}),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, {}),
        ({"model_type": "llama", "architectures": ["MistralForCausalLM"]}, {}),
        ({"model_type": None, "architectures": ["MistralModel"]}, {"model_type": "mistral"}),
    ],
)
def test_nulls_and_names_as_transformers_takes_them(hf, same):
    got = families.config(hf)
    if same is None:
        assert got.score_cap is None
    else:
        assert got == families.config({"model_type": hf["model_type"]} | same)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"architectures": ["LLaMAForCausalLM"]}, "architecture 'LLaMAForCausalLM'.*the nearest is LlamaForCausalLM"),
        ({"architectures": ["Gemma4ForConditionalGeneration"]}, "'Gemma4.*the nearest is Gemma3?.*add-a-family"),
        ({"model_type": "falcon", "alibi": True}, "Falcon with ALiBi"),
        ({"model_type": "bloom", "apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "encoder"),
        ({"model_type": "gptj", "rotary_dim": 3}, "even head_dim, or an even part of it; got 3 of 256"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' needs 'short_factor'"),
        ({"architectures": ["T5"]}, "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"),
        ({}, "unsupported architecture 'None'"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "32 query heads cannot share 5"),
        ({"model_type": "llama", "head_dim": 7}, "even head_dim"),
        ({"model_type": "llama", "hidden_act": "xielu"}, "activation 'xielu'.*silu"),
        ({"model_type": "llama", "hidden_size": "many"}, "hidden_size.*'many'"),
        ({"model_type": "llama", "num_attention_heads": 0}, "num_attention_heads.*0"),
        ({"model_type": "llama", "rms_norm_eps": "small"}, 'does not describe a LlamaForCausalLM.*"small"'),
        (
            {"model_type": "opt", "enable_bias": None},
            "OPTForCausalLM: enable_bias is null, .* like true",
        ),
        ({"model_type": "gpt_neox", "rotary_pct": None}, "rotary_pct is null, expected something like 0.25"),
        ({"model_type": "gemma", "tie_word_embeddings": "false"}, 'tie_word_embeddings is "false"'),
        ({"model_type": "mistral", "rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
        ({"model_type": "llama", "rope_theta": float("nan")}, "theta nan .must be > 1"),
        ({"model_type": "llama", "rope_scaling": {"type": "proportional"}}, "rope_type 'proportional'.*yarn"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs 'factor'"),
        ({"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"model_type": "qwen3", "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per layer type"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "32 layers"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "OLMoE with clip_qkv"),
        ({"model_type": "glm4_moe", "head_dim": 128, "n_group": 3}, "128 experts in 3 groups"),
        ({"model_type": "olmo3", "layer_types": ["chunked_attention"] * 32}, "layer_types names 'chunked_attention'"),
        (
            {"model_type": "smollm3", "layer_types": ["sliding_attention"] * 36, "sliding_window": 8},
            "use_sliding_window is false",
        ),
    ],
)
def test_what_does_not_fit_is_refused(hf, message):
    with pytest.raises(JpruneError, match=message):
        families.config(hf)

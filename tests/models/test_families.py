"""Tables and configs of the families: round trips, Hugging Face's defaults and old keys, and what is refused."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune.errors import JpruneError
from jprune.models import config as config_module
from jprune.models import families
from jprune.models.families.table import entry

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 10}
ARCHITECTURES = tuple(families.ARCHITECTURES)


@settings(max_examples=30, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4, 6]),
    flags=st.fixed_dictionaries(
        {name: st.booleans() for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")},
    ),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_reading_and_writing_a_table_is_bit_exact(architecture, kv_heads, group, head_dim, flags, dtype):
    heads = {"num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    config = families.config({"architectures": [architecture], **SIZES, **heads, **flags})
    table = families.table(config)
    assert {path: e.path_shape for path, e in table.items()} == config_module.shapes(config)
    assert len({e.key for e in table.values()}) == len(table)
    random = np.random.default_rng(0)
    for path, e in table.items():
        bits = random.integers(0, 256, (*e.shape, np.dtype(dtype).itemsize), dtype=np.uint8)  # NaNs and infs too
        stored = bits.view(dtype)[..., 0]
        ours = e.read(stored)
        assert ours.shape == e.path_shape, path
        assert np.shares_memory(ours, stored), path
        written = e.write(ours)
        assert written.flags.c_contiguous
        assert written.tobytes() == stored.tobytes(), path
        assert e.write(ours.copy()).tobytes() == stored.tobytes(), path


def test_a_kernel_is_the_transposed_weight_with_heads_apart(rng):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}
    config = families.config({"architectures": ["LlamaForCausalLM"], **SIZES, **heads})
    table = families.table(config)
    q, o = rng.normal(size=(12, 8)), rng.normal(size=(8, 12))
    np.testing.assert_array_equal(table["blocks/1/attn/q/kernel"].read(q)[:, 1, 2], q[6 + 2])
    np.testing.assert_array_equal(table["blocks/1/attn/o/kernel"].read(o)[1, 2], o[:, 6 + 2])
    assert table["blocks/1/attn/q/kernel"].key == "model.layers.1.self_attn.q_proj.weight"


def test_several_parameters_may_share_one_stored_tensor(rng):
    size = {"d_model": 5, "heads": 2, "head_dim": 3}
    stored = rng.normal(size=(18, 5))
    parts = [entry("qkv", f"(heads {i}/3 head_dim) d_model", tuple(size), size.__getitem__) for i in range(3)]
    assert parts[0].shape == (18, 5)
    np.testing.assert_array_equal(parts[1].read(stored)[:, 1, 2], stored[9 + 3 + 2])
    out = np.zeros_like(stored)
    for part in parts:
        part.write(part.read(stored), out)
    np.testing.assert_array_equal(out, stored)
    with pytest.raises(TypeError, match="several parameters"):
        parts[0].write(parts[0].read(stored))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_missing_keys_have_hugging_face_defaults(architecture):
    transformers = pytest.importorskip("transformers")
    hf_class = transformers.CONFIG_MAPPING[families.ARCHITECTURES[architecture].model_type]
    assert families.config({"architectures": [architecture]}) == families.config(
        {"architectures": [architecture], **hf_class().to_dict()}
    )


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
    ("hf", "message"),
    [
        ({"architectures": ["LLaMAForCausalLM"]}, "architecture 'LLaMAForCausalLM'.*the nearest is LlamaForCausalLM"),
        ({"architectures": ["T5"]}, "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"),
        ({}, "unsupported architecture 'None'"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "32 query heads cannot share 5"),
        ({"model_type": "llama", "head_dim": 7}, "even head_dim"),
        ({"model_type": "llama", "hidden_act": "xielu"}, "activation 'xielu'.*silu"),
        ({"model_type": "llama", "hidden_size": "many"}, "hidden_size.*'many'"),
        ({"model_type": "llama", "num_attention_heads": 0}, "num_attention_heads.*0"),
        ({"model_type": "llama", "rms_norm_eps": "small"}, "does not describe a LlamaForCausalLM.*'small'"),
        ({"model_type": "llama", "rope_scaling": {"type": "longrope"}}, "rope_type 'longrope'.*yarn"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs 'factor'"),
        ({"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"model_type": "qwen3", "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per layer type"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "32 layers"),
    ],
)
def test_what_does_not_fit_is_refused(hf, message):
    with pytest.raises(JpruneError, match=message):
        families.config(hf)

"""The decoder against Hugging Face's torch models, weights moved through the families' tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.models import decoder, families

torch = pytest.importorskip("torch")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # large enough that attention is far from uniform
}


def hugging_face(architecture, dtype="float32", **options):
    """A random small torch model, its biases and norm scales random too."""
    import transformers

    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**SMALL | options)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype))


def to_jprune(model):
    """Config and parameters of a torch model, read through its family's table."""
    config = families.config({"architectures": [type(model).__name__]} | model.config.to_dict())
    stored = model.state_dict()
    bf16 = model.dtype == torch.bfloat16
    params = {}
    for path, entry in families.table(config).items():
        tensor = stored.pop(entry.key)
        assert tuple(tensor.shape) == entry.shape
        params[path] = jnp.asarray(entry.read(tensor.float().numpy()), jnp.bfloat16 if bf16 else jnp.float32)
    assert set(stored) <= {"lm_head.weight"}, "tensors that no path reads"
    return config, trees.unflatten(params)


def apply(config, params, tokens):
    return jax.jit(lambda p, t: decoder.apply(config, p, t))(params, tokens)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()


def difference(model, *, length=40, batch=2):
    tokens = np.random.default_rng(1).integers(0, SMALL["vocab_size"], (batch, length)).astype(np.int32)
    config, params = to_jprune(model)
    ours = apply(config, params, tokens)
    assert ours.dtype == jnp.float32
    theirs = logits_of(model, tokens)
    return np.abs(np.asarray(ours) - theirs).max(), np.abs(theirs).max()


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama no sharing": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama one kv head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama own head_dim": ("LlamaForCausalLM", {"head_dim": 12}),
    "llama biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama gelu": ("LlamaForCausalLM", {"hidden_act": "gelu"}),
    "llama gelu tanh": ("LlamaForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama rope theta": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama rope linear": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama rope dynamic, short": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama rope dynamic, long": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    ),
    "llama rope llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 1e4}}),
    "llama rope yarn": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "llama rope yarn, every option": (
        "LlamaForCausalLM",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "mscale": 0.7,
                "mscale_all_dim": 1.1,
                "truncate": False,
            },
        },
    ),
    "llama rope yarn, attention factor": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.3,
            }
        },
    ),
    "mistral windowed": ("MistralForCausalLM", {"sliding_window": 7}),
    "mistral no window": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2 windowed": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2 tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "qwen3 biases, layer types": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "smollm2": (
        "LlamaForCausalLM",
        {
            "hidden_size": 36,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_hugging_face(case):
    architecture, options = CASES[case]
    worst, size = difference(hugging_face(architecture, **options))
    assert worst <= 1e-4
    assert size > 0.5  # the comparison means something


@pytest.mark.parametrize("case", ["llama", "mistral windowed", "qwen2 tied", "qwen3"])
def test_bfloat16_is_as_near_to_float32_as_hugging_face_bfloat16(case):
    architecture, options = CASES[case]
    model = hugging_face(architecture, dtype="bfloat16", **options)
    tokens = np.random.default_rng(1).integers(0, 96, (2, 40)).astype(np.int32)
    config, params = to_jprune(model)
    ours = np.asarray(apply(config, params, tokens))
    theirs = logits_of(model, tokens)
    truth = logits_of(model.float(), tokens)  # the same bf16 weights, computed in float32
    assert np.abs(ours - truth).max() <= 0.05 * np.abs(truth).max()
    assert np.abs(ours - truth).mean() <= 1.25 * np.abs(theirs - truth).mean()

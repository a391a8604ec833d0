"""GGUF files of families unlike Llama: written here as llama.cpp's converter is known to write them, and read back.

The names are those of the gguf package; what is done to values is written out by hand. No real file was at hand.
"""

import re

import gguf as package
import numpy as np
import pytest

from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.models import families
from jprune.models.parameters import shapes

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 6.0, 8.0]}
LINEAR = {"rope_type": "linear", "factor": 8.0}
GEMMA = {"num_key_value_heads": 2, "head_dim": 12}
EXPERTS = {
    "num_key_value_heads": 2,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "rms_norm_eps": 1e-5,
}
COUNTS = {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 64}
CASES = {
    "gemma": ("gemma", GEMMA, {}),
    "gemma2": (
        "gemma2",
        GEMMA | {"query_pre_attn_scalar": 12, "sliding_window": 8},
        {"attention.sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | {"query_pre_attn_scalar": 12, "sliding_window": 8, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.scaling.factor": 8.0},
    ),
    "gpt2": ("gpt2", {}, {}),
    "phi3": (
        "phi3",
        {"num_key_value_heads": 2, "rope_scaling": LONG, "original_max_position_embeddings": 16},
        {"rope.dimension_count": 8, "rope.scaling.original_context_length": 16},
    ),
    "bloom": ("bloom", {}, {}),
    "gptneox": ("gpt_neox", {}, {"rope.dimension_count": 2, "use_parallel_residual": True}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_key_value_heads": 2}, {}),
    "falcon-7b": ("falcon", {"num_key_value_heads": 1}, {}),
    "qwen2moe": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 32, "norm_topk_prob": False},
        COUNTS | {"expert_shared_feed_forward_length": 32},
    ),
    "qwen3moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True, "head_dim": 8}, COUNTS),
}


def convert(arch, key, tensor, config):
    """What the converter does to a tensor."""
    heads, kv_heads, size = config.heads, config.kv_heads, config.head_dim
    if arch.startswith("gemma") and key.endswith("norm.weight"):
        return tensor + 1
    if arch == "gpt2" and key.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and tensor.ndim == 2:
        return np.ascontiguousarray(tensor.T)
    if arch in ("bloom", "gptneox") and "query_key_value" in key:
        rows = [(part, head) for part in range(3) for head in range(heads)]
        return np.concatenate([tensor[(3 * head + part) * size :][:size] for part, head in rows])
    if arch == "falcon" and "query_key_value" in key:
        group = heads // kv_heads
        q = [(head // group) * (group + 2) + head % group for head in range(heads)]
        k = [head * (group + 2) + group for head in range(kv_heads)]
        v = [head * (group + 2) + group + 1 for head in range(kv_heads)]
        return np.concatenate([tensor[at * size :][:size] for at in (*q, *k, *v)])
    return tensor


def together(tensors):
    """The experts of a layer as one tensor."""
    found = {}
    for key, tensor in tensors.items():
        found.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", key), []).append(tensor)
    return {key: np.stack(own) if ".experts." in key else own[0] for key, own in found.items()}


def apart(tensors):
    """The experts of a layer one by one, of which transformers has those of gate and up side by side."""
    found = {}
    for key, tensor in tensors.items():
        if ".experts." not in key:
            found[key] = tensor
        elif key.endswith("gate_up_proj"):
            gate, up = np.split(np.asarray(tensor), 2, axis=1)
            found |= expert_by_expert(key.replace("gate_up_proj", "gate_proj"), gate)
            found |= expert_by_expert(key.replace("gate_up_proj", "up_proj"), up)
        else:
            found |= expert_by_expert(key, tensor)
    return found


def expert_by_expert(key, tensor):
    return {f"{key.replace('.experts.', f'.experts.{i}.')}.weight": own for i, own in enumerate(tensor)}


def write(path, arch, hf, metadata, tensors, config):
    writer = package.GGUFWriter(path, arch)
    for key, value in {
        "context_length": config.context,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "block_count": config.layers,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5 if config.norm == "rms" and "gemma" not in arch else 1e-6,
        "attention.layer_norm_epsilon": 1e-5,
        **metadata,
    }.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{arch}.{key}", value)
    number = next(n for n, name in package.MODEL_ARCH_NAMES.items() if name == arch)
    names = package.get_tensor_name_map(number, config.layers)
    for key, tensor in together(tensors).items():
        options = [names.get_name(k, try_suffixes=(".weight", ".bias")) for k in (key, key.split(".", 1)[1])]
        writer.add_tensor(next(filter(None, options)), convert(arch, key, tensor, config))
    if scaling := hf.get("rope_scaling", {}):
        for kind in ("long", "short"):
            if f"{kind}_factor" in scaling:
                writer.add_tensor(f"rope_factors_{kind}.weight", np.array(scaling[f"{kind}_factor"], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def made(tmp_path, rng):
    """A function that writes the GGUF of a case; returns its path, its config.json and its Hugging Face tensors."""

    def make(case):
        model_type, options, metadata = CASES[case]
        family = next(f for f in families.FAMILIES if f.model_type == model_type)
        named = {family.names.get(key, key): value for key, value in (SIZES | options).items()}
        hf = {"model_type": model_type} | named
        config = families.config(hf)
        tensors = {
            key: rng.normal(size=e.shape).astype(np.float32) for e in families.table(config).values() for key in e.keys
        }
        return write(tmp_path / "model.gguf", case.split("-")[0], hf, metadata, tensors, config), hf, tensors

    return make


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_gives_the_model_it_was_made_of(case, made):
    path, hf, tensors = made(case)
    config, loaded = families.config(hf), load(path)
    assert loaded.config == config
    assert {path: leaf.shape for path, leaf in loaded.shapes.items()} == shapes(config)
    for path, e in families.table(config).items():
        expected = e.read(*(tensors[key] for key in e.keys))
        np.testing.assert_allclose(loaded.read(path), expected, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "gpt2", "phi3", "bloom", "falcon-7b", "qwen2moe", "qwen3moe"])
def test_tensors_are_those_that_transformers_reads(case, made, tiny):
    """transformers undoes what the converter does in code of its own (for 40B's layout of Falcon it has none)."""
    path, hf, _ = made(case)
    theirs = apart(tiny.read_by_transformers(path, hf))
    loaded = load(path)
    for name, e in families.table(loaded.config).items():
        expected = e.read(*(theirs[key] for key in e.keys))
        np.testing.assert_allclose(loaded.read(name), expected, atol=1e-6, err_msg=name)


def test_experts_are_refused(tmp_path):
    writer = package.GGUFWriter(tmp_path / "m.gguf", "phi3")
    writer.add_uint32("phi3.expert_count", 4)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(JpruneError, match="mixture-of-experts"):
        load(tmp_path / "m.gguf")

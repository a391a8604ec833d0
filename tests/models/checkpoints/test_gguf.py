import contextlib

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import quantize

from jprune.checkpoints import load
from jprune.checkpoints.gguf import header as gguf_header
from jprune.checkpoints.gguf import read as gguf
from jprune.errors import JpruneError
from jprune.models import families

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(key):
    name, kind = key.rsplit(".", 1)
    if name.startswith("model.layers."):
        _, _, block, part = name.split(".", 3)
        return f"blk.{block}.{NAMES[part]}.{kind}"
    return f"{NAMES[name]}.{kind}"


def permute(rows, heads):
    """Row by row: Hugging Face's row j of a head's first half goes to 2j, row j of its second half to 2j + 1."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for h in range(heads):
        for j in range(size // 2):
            out[h * size + 2 * j] = rows[h * size + j]
            out[h * size + 2 * j + 1] = rows[h * size + size // 2 + j]
    return out


def write(path, config, tensors, *, kind=None, arch=None, metadata=None, extra=None):
    """A GGUF file as llama.cpp's converter would write it; kernels stored as `kind`."""
    arch = arch or config["model_type"]
    writer = GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    for key, tensor in tensors.items():
        if arch == "llama" and ".q_proj." in key:
            tensor = permute(tensor, config["num_attention_heads"])
        if arch == "llama" and ".k_proj." in key:
            tensor = permute(tensor, config["num_key_value_heads"])
        if kind is not None and "proj.weight" in key:
            writer.add_tensor(gguf_name(key), quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(key), tensor)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_gives_the_model_it_was_made_of(tiny, tmp_path, family, tied):
    config = tiny.config(family, tied=tied)
    tensors = tiny.tensors(config)
    original = load(tiny.write(tmp_path / "hf", config, tensors))
    converted = load(write(tmp_path / "model.gguf", config, tensors))
    assert converted.config == original.config
    assert converted.shapes == original.shapes
    for path in original.shapes:
        np.testing.assert_array_equal(converted.read(path), original.read(path), err_msg=path)
    assert converted.tokenizer is None
    assert converted.eos_token_ids == (2,)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tensors_are_those_that_transformers_reads(tiny, tmp_path, family):
    """Quantised kernels too, and the order of rotated rows, which transformers puts back in code of its own."""
    config = tiny.config(family) | {"hidden_size": 32, "intermediate_size": 32}
    path = write(tmp_path / "model.gguf", config, tiny.tensors(config), kind=Type.Q8_0)
    theirs = tiny.read_by_transformers(path, config)
    loaded = load(path)
    for name, e in families.table(loaded.config).items():
        np.testing.assert_allclose(loaded.read(name), e.read(theirs[e.key]), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_kept(tiny, tmp_path, dtype):
    config = tiny.config(dtype=dtype)
    tensors = tiny.tensors(config)
    original = load(tiny.write(tmp_path / "hf", config, tensors))
    kind = Type.F16 if dtype == "float16" else Type.BF16
    wide = {key: t.astype(np.float32) for key, t in tensors.items()}
    converted = load(write(tmp_path / "model.gguf", config, wide, kind=kind))
    for path, leaf in converted.shapes.items():
        assert leaf.dtype == (tiny.dtypes[dtype] if "attn/" in path or "mlp/" in path else np.float32)
        np.testing.assert_array_equal(converted.read(path), original.read(path).astype(leaf.dtype))


def scales(packed, j):
    """Scale and minimum j of a block of Q4_K or Q5_K, unpacked as ggml describes it."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
    return scale, (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)


def half(raw):
    return float(np.frombuffer(bytes(raw), np.float16)[0])


def dequantise(kind, b):
    """One block, number by number, from ggml's description of the formats."""
    b = [int(x) for x in b]
    if kind == "Q8_0":
        return [half(b[:2]) * (x - 256 if x > 127 else x) for x in b[2:]]
    if kind == "Q4_0":
        return [half(b[:2]) * ((b[2 + i % 16] >> (0 if i < 16 else 4) & 15) - 8) for i in range(32)]
    if kind == "Q4_1":
        return [half(b[:2]) * (b[4 + i % 16] >> (0 if i < 16 else 4) & 15) + half(b[2:4]) for i in range(32)]
    if kind == "Q5_0":
        high = int.from_bytes(bytes(b[2:6]), "little")
        low = [b[6 + i % 16] >> (0 if i < 16 else 4) & 15 for i in range(32)]
        return [half(b[:2]) * ((low[i] | (high >> i & 1) << 4) - 16) for i in range(32)]
    out = [0.0] * 256
    if kind == "Q6_K":
        low, high, scale, d = b[:128], b[128:192], [x - 256 if x > 127 else x for x in b[192:208]], half(b[208:])
        for i in range(256):
            part, k = divmod(i, 128)
            quarter, lane = divmod(k, 32)
            nibble = low[64 * part + 32 * (quarter % 2) + lane] >> (4 if quarter > 1 else 0) & 15
            value = (nibble | (high[32 * part + lane] >> (2 * quarter) & 3) << 4) - 32
            out[i] = d * scale[i // 16] * value
        return out
    d, least, packed = half(b[:2]), half(b[2:4]), b[4:16]
    high, low = (b[16:48], b[48:]) if kind == "Q5_K" else ([0] * 32, b[16:])
    for i in range(256):
        group, lane = divmod(i, 32)
        value = (low[32 * (group // 2) + lane] >> (4 * (group % 2)) & 15) | (high[lane] >> group & 1) << 4
        scale, minimum = scales(packed, group)
        out[i] = d * scale * value - least * minimum
    return out


BLOCKS = {
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_dequantisation_against_the_formats_description(tmp_path, rng, kind):
    values, nbytes = BLOCKS[kind]
    blocks = rng.integers(0, 256, (3, 2, nbytes), dtype=np.uint8)
    halves = {"Q6_K": [208], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(kind, [0])
    for at in halves:  # random bits may be NaN as a float16
        blocks[..., at : at + 2] = rng.standard_normal((3, 2, 1)).astype(np.float16).view(np.uint8)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("w", blocks.reshape(3, -1), raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = gguf_header.read(tmp_path / "x.gguf")
    tensor = gguf._stored(header, header.tensors["w"], {})
    assert tensor.shape == (3, 2 * values)
    assert tensor.dtype == np.float32
    expected = [[x for block in row for x in dequantise(kind, block)] for row in blocks]
    np.testing.assert_allclose(tensor.read(), expected, rtol=1e-5, atol=1e-5)


def llama3_factors(head_dim, factor, theta, original=8192.0, low=1.0, high=4.0):
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recognised(tiny, tmp_path, factor):
    config = tiny.config() | {
        "rope_theta": 500000.0,
        "head_dim": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    factors = {"rope_freqs.weight": llama3_factors(64, factor, 500000.0)}
    checkpoint = load(write(tmp_path / "model.gguf", config, tiny.tensors(config), extra=factors))
    assert checkpoint.hf_config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": pytest.approx(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_linear_and_yarn_rope_scaling(tiny, tmp_path):
    config = tiny.config()
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    checkpoint = load(write(tmp_path / "linear.gguf", config, tiny.tensors(config), metadata=linear))
    assert checkpoint.hf_config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    yarn = linear | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 16}
    checkpoint = load(write(tmp_path / "yarn.gguf", config, tiny.tensors(config), metadata=yarn))
    assert checkpoint.hf_config["rope_scaling"]["original_max_position_embeddings"] == 16


def test_a_folder_with_one_gguf(tiny, tmp_path):
    config = tiny.config()
    path = write(tmp_path / "model.gguf", config, tiny.tensors(config))
    assert load(tmp_path).shapes == load(path).shapes
    write(tmp_path / "other.gguf", config, tiny.tensors(config))
    fails(tmp_path, "2 GGUF files", "give one of them")


# Bad input.


def fails(path, *words):
    with pytest.raises(JpruneError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 60, 200, 700, 1500, -1])
def test_truncated_at_any_place(tiny, tmp_path, kept):
    config = tiny.config()
    path = write(tmp_path / "model.gguf", config, tiny.tensors(config))
    path.write_bytes(path.read_bytes()[:kept])
    fails(path, "model.gguf")


def test_every_flipped_byte_of_the_header_is_an_error_or_harmless(tiny, tmp_path):
    """Damage never hangs, never leaks another exception."""
    config = tiny.config()
    path = write(tmp_path / "model.gguf", config, tiny.tensors(config))
    content = path.read_bytes()
    for at in range(0, 900, 7):
        damaged = bytearray(content)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(JpruneError):
            load(path)


def test_not_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 something else")
    fails(tmp_path / "model.gguf", "not a GGUF file")


def test_unsupported_architecture(tiny, tmp_path):
    config = tiny.config()
    path = write(tmp_path / "model.gguf", config, tiny.tensors(config), arch="mamba")
    fails(path, "'mamba'", "supported: llama, qwen2, qwen3")


def test_unsupported_type(tiny, tmp_path):
    config = tiny.config() | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    tensors = tiny.tensors(config)
    path = write(tmp_path / "model.gguf", config, tensors, extra={"x": np.zeros(4, np.int8)})
    fails(path, "'x'", "I8", "Q4_K")


def test_missing_metadata(tiny, tmp_path):
    config = tiny.config()
    path = write(tmp_path / "model.gguf", config, tiny.tensors(config))
    path.write_bytes(path.read_bytes().replace(b"llama.context_length", b"llama.context_lengtH"))
    fails(path, "llama.context_length", "missing")


def test_missing_and_unknown_tensors(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    fails(write(tmp_path / "a.gguf", config, tensors), "model.layers.1.mlp.up_proj.weight", "missing")
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    fails(
        write(tmp_path / "b.gguf", config, tiny.tensors(config), extra=extra), "blk.0.attn_sinks.weight", "not part of"
    )
    tensors = tiny.tensors(config)
    del tensors["model.embed_tokens.weight"]
    fails(write(tmp_path / "c.gguf", config, tensors), "token_embd.weight", "missing")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'"),
    ],
)
def test_models_we_cannot_express(tiny, tmp_path, metadata, words):
    config = tiny.config()
    fails(write(tmp_path / "model.gguf", config, tiny.tensors(config), metadata=metadata), words)


def test_unknown_rope_factors(tiny, tmp_path):
    config = tiny.config()
    extra = {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}
    fails(write(tmp_path / "model.gguf", config, tiny.tensors(config), extra=extra), "Llama 3's rope scaling")


def test_a_tensor_that_reaches_past_the_end(tiny, tmp_path):
    config = tiny.config()
    path = write(tmp_path / "model.gguf", config, tiny.tensors(config))
    path.write_bytes(path.read_bytes()[:-4000])
    fails(path, "truncated or damaged", "ends at byte", "download it again")

"""Every format, read back by jprune and, where they take it, by transformers and torch."""

import copy
import json

import compiled
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.checkpoints import formats, load
from jprune.checkpoints.dtypes import cast
from jprune.checkpoints.huggingface import decilm
from jprune.errors import JpruneError
from jprune.models import families
from jprune.models.parameters import parameters

KINDS = ("llama", "llama_bias", "mistral", "qwen2", "qwen3")
TOKENS = np.random.default_rng(1).integers(0, 96, (1, 24))


def cut(checkpoint, *, layers=(0, 1, 2), groups=(0, 1, 2), group=2, d_ff=24, hidden=24, only=None):
    """A view with some key/value heads (and so many query heads of each), channels and hidden dimensions."""
    config = checkpoint.config
    size = config.heads // config.kv_heads
    wanted = {
        "kv_heads": list(groups),
        "heads": [size * g + q for g in groups for q in range(group)],
        "d_ff": list(range(d_ff)),
        "d_model": list(range(hidden)),
    }
    keep = {}
    for path, names in parameters(config).items():
        if only is None or path.startswith(f"blocks/{only}/"):
            axes = {axis: wanted[name] for axis, name in enumerate(names) if name in wanted}
            keep[path] = axes if only is None else {a: k for a, k in axes.items() if names[a] != "d_model"}
    return checkpoint.select(keep, layers)


@pytest.fixture
def make(tiny, tmp_path):
    """A function that opens a random model of a family: 3 layers, 3 key/value heads, twice as many query heads."""

    def opened(kind, **options):
        name = "mistral" if kind == "mistral" else kind
        base = tiny.config("llama" if name == "mistral" else name)
        if name == "mistral":
            base |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 7}
        if name == "qwen3":
            base |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
        base |= {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
        base |= options
        return load(tiny.write(tmp_path / name, base, tiny.tensors(base)))

    return opened


def ours(checkpoint):
    params = trees.unflatten({path: jnp.asarray(checkpoint.read(path)) for path in checkpoint.shapes})
    return np.asarray(compiled.apply(checkpoint.config, params, jnp.asarray(TOKENS, jnp.int32)))


def theirs(folder, attention="eager"):
    torch = pytest.importorskip("torch")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    with torch.no_grad():
        return model, model(torch.from_numpy(TOKENS), use_cache=False).logits.float().numpy()


def same_weights(one, other):
    assert one.shapes == other.shapes
    theirs = other.read_many(list(other.shapes))
    for path, ours in one.read_many(list(one.shapes)).items():
        np.testing.assert_array_equal(ours, theirs[path], err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_model_is_a_plain_folder_that_transformers_loads(make, tmp_path, kind):
    view = cut(make(kind), layers=(0, 2), groups=(0, 2), group=2, d_ff=10, hidden=12)
    assert view.config.uniform
    out = tmp_path / "out"
    out.mkdir()
    assert formats.write(out, view) == ()
    model, logits = theirs(out)
    assert model.config.head_dim == 8
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    np.testing.assert_allclose(ours(view), logits, atol=1e-4, rtol=1e-4)
    again = load(out)
    assert again.config == view.config
    same_weights(again, view)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_heads_need_not_divide_the_hidden_size(make, tmp_path, kind):
    view = cut(make(kind), groups=(1,), group=1, hidden=10, d_ff=3)
    view = view if kind == "qwen3" else cut(view, groups=(0,), group=1, hidden=7, d_ff=3)
    (tmp_path / "out").mkdir()
    assert formats.write(tmp_path / "out", view) == ()
    _, logits = theirs(tmp_path / "out")
    np.testing.assert_allclose(ours(view), logits, atol=1e-4, rtol=1e-4)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("rope_scaling", [None, LLAMA3])
def test_a_llama_that_transformers_would_refuse_is_written_as_a_mistral(make, tmp_path, rope_scaling):
    view = cut(make("llama", rope_scaling=rope_scaling), group=1, hidden=16)
    assert view.config.d_model % view.config.heads
    for format in ("jprune", "hf"):
        (tmp_path / format).mkdir()
    assert formats.write(tmp_path / "jprune", view, format="jprune") == ()
    with pytest.raises(Exception, match="not a multiple of the number of attention"):
        theirs(tmp_path / "jprune")
    [notice] = formats.write(tmp_path / "hf", view)
    assert "MistralForCausalLM" in notice
    model, logits = theirs(tmp_path / "hf")
    assert type(model).__name__ == "MistralForCausalLM"
    np.testing.assert_allclose(ours(view), logits, atol=1e-4, rtol=1e-4)
    again = load(tmp_path / "hf")
    np.testing.assert_array_equal(ours(again), ours(view))
    assert again.config.context == view.config.context


def test_keys_that_a_llama_left_to_their_defaults_are_spelled_out_for_a_mistral(tiny, tmp_path):
    config = tiny.config() | {"num_attention_heads": 3, "num_key_value_heads": 3}
    for key in ("max_position_embeddings", "num_key_value_heads", "rms_norm_eps", "rope_theta", "hidden_act"):
        del config[key]
    source = load(tiny.write(tmp_path / "in", config, tiny.tensors(config | {"num_key_value_heads": 3})))
    (tmp_path / "out").mkdir()
    formats.write(tmp_path / "out", source)
    again = load(tmp_path / "out").config
    assert (again.context, again.kv_heads, again.norm_eps) == (2048, 3, 1e-6)


def test_biases_keep_a_llama_from_being_a_mistral(make, tmp_path):
    view = cut(make("llama_bias"), group=1, hidden=16)
    with pytest.raises(JpruneError, match=r"multiple of its num_attention_heads \(3\).*`format` jprune"):
        formats.write(tmp_path, view)
    assert list(tmp_path.iterdir()) == [tmp_path / "llama_bias"]


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_differ(make, tmp_path, kind, part):
    options = {"groups": (0, 2)} if part == "attention" else {"d_ff": 9}
    view = cut(make(kind), only=1, **options)
    assert not view.config.uniform
    for format in ("hf", "jprune", "orbax"):
        (tmp_path / format).mkdir()
    with pytest.raises(JpruneError, match=r"layer 0 has 6 .* layer 1 has .*`uniform`.*`format` jprune.*decilm"):
        formats.write(tmp_path / "hf", view)
    assert not list((tmp_path / "hf").iterdir())
    with pytest.raises(JpruneError, match="`uniform`"):
        formats.check(view, "hf")

    [notice] = formats.write(tmp_path / "jprune", view, format="jprune")
    assert "only jprune" in notice
    formats.write(tmp_path / "orbax", view, format="orbax")
    for format in ("jprune", "orbax"):
        again = load(tmp_path / format)
        assert again.config == view.config
        same_weights(again, view)
        assert again.hf_config == view.hf_config


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_refuses_layers_that_differ(make, tmp_path, kind):
    """With the key it knows that it cannot read it; before it knew the key, it saw that shapes do not fit."""
    pytest.importorskip("torch")
    for part, options in (("attention", {"groups": (0, 2)}), ("mlp", {"d_ff": 9})):
        out = tmp_path / part
        out.mkdir()
        formats.write(out, cut(make(kind), only=1, **options), format="jprune")
        with pytest.raises(RuntimeError, match="is a per-layer attribute"):
            theirs(out)
        config = json.loads((out / "config.json").read_text())
        del config["per_layer_config"]
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            theirs(out)


def as_vllm_reads_it(folder):
    """Logits by torch: layer sizes taken from the configuration object as vllm/model_executor/models/nemotron_nas.py
    (0.33) takes them, each layer one of transformers' Llama."""
    torch = pytest.importorskip("torch")
    import transformers
    from safetensors.torch import load_file
    from transformers.models.llama import modeling_llama

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.architectures == ["DeciLMForCausalLM"]
    assert config.model_type == "nemotron-nas"
    json.loads(config.to_json_string())
    config.standardize_rope_params()  # as vLLM does
    config.validate_rope()
    stored = load_file(folder / "model.safetensors")
    config._attn_implementation, config.attention_dropout = "eager", 0.0  # what only torch's layers ask for
    x = torch.nn.functional.embedding(torch.from_numpy(TOKENS), stored.pop("model.embed_tokens.weight"))
    time = TOKENS.shape[1]
    mask = torch.full((1, 1, time, time), float("-inf")).triu(1)
    turns = modeling_llama.LlamaRotaryEmbedding(config)(x, torch.arange(time)[None])
    for i in range(config.num_hidden_layers):
        block = config.block_configs[i]
        assert not block.attention.no_op
        assert not block.ffn.no_op
        assert not hasattr(block.ffn, "ffn_mult")
        own = copy.deepcopy(config)
        own.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
        own.intermediate_size = block.ffn.intermediate_size
        layer = modeling_llama.LlamaDecoderLayer(own, i).eval()
        if getattr(config, "qkv_bias", False) and not config.attention_bias:
            for name in "qkv":
                linear = getattr(layer.self_attn, f"{name}_proj")
                linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
        prefix = f"model.layers.{i}."
        weights = {key.removeprefix(prefix): stored.pop(key) for key in list(stored) if key.startswith(prefix)}
        layer.load_state_dict(weights, strict=True)
        with torch.no_grad():
            x = layer(x, attention_mask=mask, position_embeddings=turns)
            x = x[0] if isinstance(x, tuple) else x
    norm = modeling_llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    norm.weight.data = stored.pop("model.norm.weight")
    with torch.no_grad():
        logits = norm(x) @ stored.pop("lm_head.weight").T
    assert not stored
    return logits.numpy()


@pytest.mark.parametrize("kind", ["llama", "llama_bias", "mistral", "qwen2"])
def test_decilm(make, tmp_path, kind, monkeypatch):
    options = {"rope_scaling": LLAMA3} if kind == "llama" else {}
    whole = make(kind, **options | ({"sliding_window": None} if kind == "mistral" else {}))
    view = cut(whole, only=1, d_ff=9)
    out = tmp_path / "decilm"
    out.mkdir()
    [notice] = formats.write(out, view, format="decilm")
    assert "--trust-remote-code" in notice
    again = load(out)
    assert again.config.sizes == view.config.sizes
    same_weights(again, view)
    np.testing.assert_array_equal(ours(again), ours(view))
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    np.testing.assert_allclose(as_vllm_reads_it(out), ours(view), atol=1e-4, rtol=1e-4)


def test_decilm_groups_of_query_heads(make, tmp_path):
    """One key/value head with all query heads of a layer: fewer groups, equally many query heads."""
    whole = make("llama", num_attention_heads=4, num_key_value_heads=4)
    same = {f"blocks/1/attn/{n}/kernel": {1: [0, 1]} for n in "kv"}
    view = whole.select(same)  # 4 query heads on 2 key/value heads
    (tmp_path / "out").mkdir()
    formats.write(tmp_path / "out", view, format="decilm")
    again = load(tmp_path / "out")
    assert again.config == view.config
    assert again.hf_config["per_layer_config"] == {"1": {"num_key_value_heads": 2}}
    np.testing.assert_array_equal(ours(again), ours(view))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [b["attention"]["n_heads_in_group"] for b in written["block_configs"]] == [1, 2, 1]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"groups": (0, 2)}, "layer 1 has 4 query heads and layer 0 has 6.*Write `format` jprune"),
        ("qwen3", {"d_ff": 9}, "cannot hold this Qwen3ForCausalLM: DeciLM computes as Llama does"),
        ("mistral", {"d_ff": 9}, "layer 0 has a sliding window of 7 tokens"),
    ],
)
def test_what_decilm_cannot_hold(make, tmp_path, kind, options, message):
    view = cut(make(kind), only=1, **options)
    (tmp_path / "out").mkdir()
    with pytest.raises(JpruneError, match=message):
        formats.write(tmp_path / "out", view, format="decilm")
    assert not list((tmp_path / "out").iterdir())


BLOCK = {"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"ffn_mult": 2.625, "no_op": False}}
DECILM = {
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "nemotron-nas",
    "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 2,
    "intermediate_size": None,
    "num_key_value_heads": None,
    "block_configs": [BLOCK, BLOCK | {"ffn": {"intermediate_size": 100}}],
}


def test_the_config_of_a_nemotron():
    config = families.config(decilm.plain(DECILM))
    assert [config.layer(i).d_ff for i in range(2)] == [7168, 100]  # 2 * 2.625 * 4096 / 3 = 7168 = 28 * 256
    assert (config.layer(0).kv_heads, config.head_dim) == (16, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_configs": None}, "older models"),
        ({"block_configs": [BLOCK]}, "one object for each"),
        (
            {"block_configs": [BLOCK, BLOCK | {"attention": {"no_op": True}}]},
            "layer 1 has no_op for its attention part",
        ),
        ({"block_configs": [BLOCK, {"ffn": {}}]}, "not what vLLM's DeciLM has.*attention"),
        ({"block_configs": [BLOCK, BLOCK | {"attention": {"n_heads_in_group": 5}}]}, "layer 1 has groups of 5"),
        ({"position_embedding_type": "mistral_yarn"}, "'mistral_yarn' is not supported"),
    ],
)
def test_a_decilm_that_is_not_supported(change, message):
    with pytest.raises(JpruneError, match=message):
        decilm.plain(DECILM | change)


def test_dtypes(make, tmp_path):
    whole = make("llama")
    for format in ("hf", "orbax"):
        (tmp_path / format).mkdir()
        formats.write(tmp_path / format, whole, format=format, dtypes=dict.fromkeys(whole.shapes, jnp.bfloat16))
        assert {leaf.dtype.name for leaf in load(tmp_path / format).shapes.values()} == {"bfloat16"}
        assert load(tmp_path / format).hf_config["torch_dtype"] == "bfloat16"


WIDE = {"blocks/0/mlp/up/kernel": 1e6, "final_norm/scale": np.inf}


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_numbers_that_a_dtype_cannot_hold(make, tmp_path, monkeypatch, format):
    whole = make("llama")
    read = whole.read

    def with_large(path):
        values = read(path).copy()
        if path in WIDE:
            values[(0,) * values.ndim], values[(1,) * values.ndim] = WIDE[path], -WIDE[path]
        return values

    monkeypatch.setattr(whole, "read", with_large)
    half = dict.fromkeys(whole.shapes, np.float16)
    message = r"blocks/0/mlp/up/kernel: 2 of \d+ .*float16, .* 65504; .* between -1e\+06 and 1e\+06.*`saturate`"
    (tmp_path / "refused").mkdir()
    with pytest.raises(JpruneError, match=message):
        formats.write(tmp_path / "refused", whole, format=format, dtypes=half)
    (tmp_path / "out").mkdir()
    formats.write(tmp_path / "out", whole, format=format, dtypes=half, saturate=True)
    again = load(tmp_path / "out")
    for path in whole.shapes:
        with np.errstate(over="ignore"):
            want = np.where(np.isinf(with_large(path)), np.inf, 65504) * np.sign(with_large(path))
            plain = with_large(path).astype(np.float16)
        np.testing.assert_array_equal(again.read(path), np.where(np.abs(with_large(path)) > 65504, want, plain))


@pytest.mark.parametrize("wide", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("narrow", ["float32", "bfloat16", "float16"])
def test_a_cast_rounds_or_refuses(wide, narrow):
    """Everything that is no overflow is what NumPy's own cast gives, to the bit, NaNs and infinities too."""
    bits = np.random.default_rng(0).integers(0, 2**16, 4000, dtype=np.uint16)
    values = bits.view(jnp.dtype(wide)) if wide != "float32" else (bits.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        want = values.astype(jnp.dtype(narrow))
        fits = np.isinf(want.astype(np.float32)) == np.isinf(values.astype(np.float32))
    np.testing.assert_array_equal(cast(values[fits], narrow, "x").view(np.uint8), want[fits].view(np.uint8))
    for value in values[~fits][:20]:
        with pytest.raises(JpruneError, match="x: 1 of 1 numbers do not fit"):
            cast(np.array([value]), narrow, "x")
    assert fits.all() == ((wide, narrow) not in {("float32", "float16"), ("bfloat16", "float16")})

"""Views: a part of a checkpoint behaves as the checkpoint that one would get by cutting the tensors by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.checkpoints import huggingface, load, orbax
from jprune.checkpoints.select import Keep
from jprune.errors import JpruneError
from jprune.models import decoder, generate
from jprune.models.config import LayerSizes
from jprune.models.parameters import parameters, shapes

HEADS = {0: [0, 1, 2, 3], 1: [2, 3]}  # query heads that stay in each layer; two to a key/value head
KV_HEADS = {0: [0, 1], 1: [1]}
D_FF = {0: [0, 3, 5, 23], 1: [1, 2]}
HIDDEN = [0, 1, 2, 5, 7, 8, 9, 15]


def keep_of_block(i: int) -> Keep:
    keep = {f"blocks/{i}/attn/{n}/kernel": {1: KV_HEADS[i]} for n in "kv"}
    keep |= {f"blocks/{i}/attn/q/kernel": {1: HEADS[i]}, f"blocks/{i}/attn/o/kernel": {0: np.array(HEADS[i])}}
    keep |= {f"blocks/{i}/mlp/{n}/kernel": {1: D_FF[i]} for n in ("gate", "up")}
    return keep | {f"blocks/{i}/mlp/down/kernel": {0: D_FF[i]}}


def keep_biases(i: int) -> Keep:
    keep = {f"blocks/{i}/attn/{n}/bias": {0: KV_HEADS[i]} for n in "kv"} | {f"blocks/{i}/attn/q/bias": {0: HEADS[i]}}
    return keep | {f"blocks/{i}/mlp/{n}/bias": {0: D_FF[i]} for n in ("gate", "up")}


def keep_hidden(checkpoint) -> Keep:
    axes = {
        "embedding": 1, "scale": 0, "head/kernel": 0, "q/kernel": 0, "k/kernel": 0, "v/kernel": 0, "o/kernel": 2,
        "gate/kernel": 0, "up/kernel": 0, "down/kernel": 1, "o/bias": 0, "down/bias": 0,
    }  # fmt: skip
    return {
        path: {axis: HIDDEN}
        for path in checkpoint.shapes
        for end, axis in axes.items()
        if path.endswith(end) and "q_norm" not in path and "k_norm" not in path
    }


def cut(params, keep: Keep):
    """The same by hand."""
    leaves = trees.flatten(params)
    for path, axes in keep.items():
        for axis, kept in axes.items():
            leaves[path] = np.moveaxis(np.moveaxis(leaves[path], axis, 0)[np.asarray(kept)], 0, axis)
    return leaves


def same(view, leaves):
    assert {path: leaf.shape for path, leaf in view.shapes.items()} == shapes(view.config)
    assert view.shapes.keys() == leaves.keys()
    ours = trees.flatten(view.params())
    for path, expected in leaves.items():
        np.testing.assert_array_equal(ours[path], expected, err_msg=path)
        assert view.shapes[path].dtype == expected.dtype
    for path in {path.split("/")[-2]: path for path in leaves}.values():  # one by one: one of each kind
        np.testing.assert_array_equal(view.read(path), leaves[path], err_msg=path)


@pytest.fixture(params=["hf", "orbax"])
def make(request, tiny, tmp_path):
    """A function that opens a random model in either format."""

    def opened(family="llama", **options):
        config = tiny.config(family, **options)
        checkpoint = load(tiny.write(tmp_path / "hf", config, tiny.tensors(config)))
        if request.param == "orbax":
            (tmp_path / "orbax").mkdir()
            orbax.save(tmp_path / "orbax", checkpoint, checkpoint.params(), {})
            checkpoint = load(tmp_path / "orbax")
        return checkpoint

    return opened


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen3"])
def test_heads_and_channels_by_layer(make, family):
    whole = make(family, dtype="bfloat16" if family == "qwen3" else "float32")
    keep = keep_of_block(0) | keep_of_block(1)
    if family == "llama_bias":
        keep |= keep_biases(0) | keep_biases(1)
    view = whole.select(keep)
    assert view.config.sizes == (LayerSizes(4, 2, 4), LayerSizes(2, 1, 2))
    assert view.hf_config["per_layer_config"] == {
        "1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 2}
    }
    same(view, cut(whole.params(), keep))
    assert view.side_files == whole.side_files


def test_equally_many_experts_stay_of_each_group(tmp_path):
    """Of DeepSeek's: which group an expert is of follows from its number."""
    hf_families = pytest.importorskip("hf_families")
    family, architecture, variant = hf_families.VARIANTS["DeepseekV3-1"]
    options = hf_families.sizes(family) | variant | {"n_routed_experts": 6, "num_experts_per_tok": 1}
    whole = load(hf_families.save(hf_families.model(architecture, options), tmp_path))
    names = parameters(whole.config)

    def left(*experts):
        keep = {path: {axes.index("experts"): experts} for path, axes in names.items() if "experts" in axes}
        return whole.select(keep)

    same(left(0, 2, 3, 4), {path: cut_experts(path, values) for path, values in trees.flatten(whole.params()).items()})
    with pytest.raises(JpruneError, match="in 2 groups, of each of which equally many must stay; got 1, 3"):
        left(1, 3, 4, 5)


def cut_experts(path, values):
    axis = -1 if path.endswith("router/kernel") else 0 if "/experts/" in path or path.endswith("correction") else None
    return values if axis is None else np.take(values, [0, 2, 3, 4], axis)


def test_fingerprints_differ(make):
    whole = make()
    views = [whole.select(keep_of_block(i)) for i in range(2)]
    moved = whole.select(keep_of_block(0) | {f"blocks/0/mlp/{n}/kernel": {1: [0, 3, 5, 22]} for n in ("gate", "up")})
    assert len({model.fingerprint() for model in (whole, *views, moved)}) == 4
    assert views[0].fingerprint() == whole.select(keep_of_block(0)).fingerprint()


def test_equal_cuts_make_a_plain_config(make):
    whole = make()
    keep = {path: axes for i in range(2) for path, axes in keep_of_block(1).items()}
    keep |= {path.replace("blocks/1", "blocks/0"): axes for path, axes in keep.items()}
    view = whole.select(keep)
    expected = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 2, "head_dim": 8}
    assert view.hf_config == whole.hf_config | expected
    same(view, cut(whole.params(), keep))


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama_bias", True), ("qwen2", True), ("qwen3", False)]
)
def test_hidden_size(make, family, tied):
    whole = make(family, tied=tied)
    keep = keep_hidden(whole)
    view = whole.select(keep)
    assert view.hf_config == whole.hf_config | {"hidden_size": 8} | (
        {"max_window_layers": 2} if family.startswith("qwen") else {}
    )
    same(view, cut(whole.params(), keep))


def test_layers_are_renumbered(make):
    whole = make()
    view = whole.select(keep_of_block(1), layers=[1])
    leaves = {
        path.replace("blocks/1", "blocks/0"): leaf
        for path, leaf in cut(whole.params(), keep_of_block(1)).items()
        if not path.startswith("blocks/0")
    }
    assert view.config.layers == 1
    assert view.config.uniform
    same(view, leaves)
    assert whole.select({}, layers=[0]).fingerprint() != whole.select({}, layers=[1]).fingerprint()


def test_a_view_of_a_view(make):
    whole = make()
    view = whole.select(keep_of_block(1)).select(keep_of_block(0)).select(keep_hidden(whole)).select({}, layers=[1])
    leaves = cut(trees.unflatten(cut(whole.params(), keep_of_block(1))), keep_hidden(whole))
    leaves = {p.replace("blocks/1", "blocks/0"): x for p, x in leaves.items() if not p.startswith("blocks/0")}
    same(view, leaves)


def test_a_view_generates(make):
    view = make().select(keep_of_block(0) | keep_of_block(1))
    params = jax.tree.map(jnp.asarray, view.params())
    tokens = [5, 6, *generate.generate(view.config, params, [5, 6], max_tokens=3)]
    logits = jax.jit(lambda p, t: decoder.apply(view.config, p, t))(params, jnp.array([tokens]))
    assert logits[0, 1:4].argmax(axis=1).tolist() == tokens[2:]


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    sizes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    sizes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    sizes = {f"blk.0.{name}.weight": shape for name, shape in sizes.items()}
    for name, shape in (sizes | {"token_embd.weight": (16, 32), "output_norm.weight": (32,)}).items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = load(tmp_path / "model.gguf")
    keep = {"blocks/0/mlp/gate/kernel": {1: [1, 60]}, "blocks/0/mlp/up/kernel": {1: [1, 60]}}
    keep |= {"blocks/0/mlp/down/kernel": {0: [1, 60]}}
    view = whole.select(keep)
    assert view.config.d_ff == 2
    same(view, cut(whole.params(), keep))


def test_only_the_tensor_at_hand_is_read(make, monkeypatch):
    whole = make()
    view = whole.select(keep_of_block(0))
    read = []
    original = type(whole).read
    monkeypatch.setattr(type(whole), "read", lambda self, path: (read.append(path), original(self, path))[1])
    view.read("blocks/0/mlp/up/kernel")
    assert set(read) == {"blocks/0/mlp/up/kernel"}
    assert view.read("blocks/0/mlp/up/kernel").base is None  # its own memory, not a part of the larger tensor


def test_written_and_read_again(make, tmp_path):
    view = make("qwen3").select(keep_of_block(0) | keep_of_block(1))
    (tmp_path / "out").mkdir()
    orbax.save(tmp_path / "out", view, view.params(), {})
    again = load(tmp_path / "out")
    assert again.config == view.config
    same(again, trees.flatten(view.params()))


GATE, DOWN = "blocks/0/mlp/gate/kernel", "blocks/0/mlp/down/kernel"


@pytest.mark.parametrize(
    ("keep", "layers", "message"),
    [
        ({}, [], "at least one layer.*got \\[\\]"),
        ({}, [1, 0], "in order"),
        ({}, [2], "between 0 and 1; got \\[2\\]"),
        ({"blocks/7/mlp": {}}, None, "'blocks/7/mlp' is not a parameter"),
        ({GATE: {2: [0]}}, None, "axis 2: there are 2 axes"),
        ({GATE: {1: []}}, None, "axis 1 \\(d_ff\\): no position is left"),
        ({GATE: {1: [True, False]}}, None, "expected a row of positions"),
        ({GATE: {1: [0, 24]}}, None, "between 0 and 23"),
        ({GATE: {1: [1, 1]}}, None, "each once"),
        ({"blocks/0/attn/q/kernel": {2: [0, 1]}}, None, "head_dim cannot become smaller; only heads, kv_heads"),
        ({"embed/embedding": {0: [0, 1]}}, None, "vocab cannot become smaller"),
        ({GATE: {1: [0, 1]}}, None, "blocks/0/mlp/gate/kernel: 2 positions of axis 1 are kept, but 24 of d_ff"),
        ({DOWN: {0: [0, 1]}}, None, "blocks/0/mlp/gate/kernel: 24 positions of axis 1 are kept, but 2 of d_ff"),
        ({"blocks/1/attn/q/kernel": {1: [0, 1, 2]}}, None, "layer 1: 3 query heads cannot share 2"),
    ],
)
def test_what_does_not_make_a_model_is_refused(folder, keep, layers, message):
    with pytest.raises(JpruneError, match=message):
        load(folder).select(keep, layers)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_a_config_alone(tiny, tmp_path, key):
    config = tiny.config("qwen2")
    del config["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config | ({key: "bfloat16"} if key else {})))
    checkpoint = load(tmp_path, weights=False)
    assert {path: leaf.shape for path, leaf in checkpoint.shapes.items()} == shapes(checkpoint.config)
    assert {leaf.dtype.name for leaf in checkpoint.shapes.values()} == {"bfloat16" if key else "float32"}
    view = checkpoint.select({}, layers=[1])
    assert view.config.layers == 1
    for opened in (checkpoint, view):
        assert opened.fingerprint()
        with pytest.raises(JpruneError, match="opened without weights"):
            opened.params("blocks/0")
    with pytest.raises(JpruneError, match=r"no model\.safetensors"):
        load(tmp_path)


def test_without_weights_whatever_else_is_there(folder, tmp_path):
    whole = load(folder)
    assert load(folder, weights=False).config == whole.config
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert load(folder, weights=False).shapes == whole.shapes
    with pytest.raises(JpruneError, match=r"no config\.json"):
        load(tmp_path, weights=False)


def test_hub_without_weights(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: (asked.update(options), str(tmp_path))[1])
    huggingface.download("a/b", weights=False)
    assert "config.json" in asked["allow_patterns"]
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])

"""Folders as they are found: what transformers reads of one is what we read of it, or we refuse in a line."""

import json
import logging
import tempfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jprune.checkpoints import formats, load
from jprune.errors import JpruneError
from jprune.models import families

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PT = {"format": "pt"}


def change(folder, **keys):
    """config.json with other values; Ellipsis takes a key away."""
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def same_as_transformers(folder):
    """Loads a folder with both and compares every parameter with what transformers makes of it."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        theirs = load_file(f"{saved}/{WHOLE}")
    checkpoint = load(folder)
    for path, entry in families.table(checkpoint.config).items():
        want = entry.read(*(theirs[key] for key in entry.keys))
        np.testing.assert_array_equal(checkpoint.read(path).astype(np.float32), want, err_msg=path)
    return checkpoint


def written_again(checkpoint, out):
    """What we write of it is for transformers what it is for us."""
    out.mkdir()
    formats.write(out, checkpoint)
    again = same_as_transformers(out)
    assert again.config == checkpoint.config
    for path in checkpoint.shapes:
        np.testing.assert_array_equal(again.read(path), checkpoint.read(path))


def refused(folder, *words):
    with pytest.raises(JpruneError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.fixture
def both(tiny, tmp_path):
    """Old shards, and over them one file of newer weights."""
    config = tiny.config()
    folder = tiny.write_sharded(tmp_path / "both", config, tiny.tensors(config))
    tiny.write(folder, config, tiny.tensors(config, seed=1))
    return folder


# Which file is the model?


@pytest.mark.parametrize("kept", ["all", "no shards", "no index"])
def test_a_whole_file_comes_before_shards(both, tiny, caplog, kept):
    if kept == "no index":
        (both / INDEX).unlink()
    if kept == "no shards":
        for shard in both.glob("model-*"):
            shard.unlink()
    with caplog.at_level(logging.WARNING):
        checkpoint = same_as_transformers(both)
    np.testing.assert_array_equal(
        checkpoint.read("embed/embedding"), tiny.tensors(tiny.config(), seed=1)["model.embed_tokens.weight"]
    )
    assert (f"{WHOLE} was read" in caplog.text) == (kept != "no index")
    assert ("to read those, give one of them" in caplog.text) == (kept == "all")


def test_a_file_that_is_given_is_taken(both, tiny, caplog):
    for name, seed in ((WHOLE, 1), ("model-00002-of-00002.safetensors", 0)):
        got = load(both / name).read("embed/embedding")
        np.testing.assert_array_equal(got, tiny.tensors(tiny.config(), seed)["model.embed_tokens.weight"])
    assert not caplog.text


@pytest.mark.parametrize("named", ["other.safetensors", INDEX])
def test_config_may_name_the_file(both, tiny, caplog, named):
    save_file(tiny.tensors(tiny.config(), seed=2), both / "other.safetensors", metadata=PT)
    same_as_transformers(change(both, transformers_weights=named))
    assert f"{named} was read, as config.json says" in caplog.text
    same_as_transformers(change(both, transformers_weights=None))


def test_a_result_names_no_file_of_its_source(folder, tmp_path):
    (folder / WHOLE).rename(folder / "other.safetensors")
    written_again(load(change(folder, transformers_weights="other.safetensors")), tmp_path / "out")


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "a/b.safetensors", 3, "a\0.safetensors"])
def test_config_cannot_name_a_file_elsewhere(folder, name):
    refused(change(folder, transformers_weights=name), "transformers_weights points outside its folder", "refused")


def test_config_names_nothing_or_a_pickle(folder):
    refused(change(folder, transformers_weights="no.safetensors"), "which is not there", "remove the key")
    refused(change(folder, transformers_weights="pytorch_model.bin"), "only safetensors")


def test_safetensors_come_before_gguf_and_orbax(folder):
    (folder / "params").mkdir()
    (folder / "params" / "_CHECKPOINT_METADATA").write_text("{}")
    (folder / "model.gguf").write_bytes(b"GGUF")
    same_as_transformers(folder)


# Tensors that no model needs, under any dtype


MASKS = {
    "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.cos_cached", "model.causal_mask"),
    "GPT2LMHeadModel": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "transformer.position_ids"),
    "GPTNeoX": ("gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
    "GPTJ": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"),
}


@pytest.mark.parametrize("family", MASKS)
def test_buffers_do_not_matter(tiny, tmp_path, family):
    if family == "llama":
        folder = tiny.write(tmp_path / "in", tiny.config(), tiny.tensors(tiny.config()))
    else:
        pytest.importorskip("torch")
        import hf_families

        folder = hf_families.save(hf_families.make(f"{family}-0"), tmp_path / "in")
    tensors = load_file(folder / WHOLE)
    for dtype in (np.bool_, np.uint8, np.int64, np.float64):
        save_file(tensors | {key: np.ones((1, 1, 4, 4), dtype) for key in MASKS[family]}, folder / WHOLE, PT)
        assert load(folder).shapes
    same_as_transformers(folder)


def test_a_weight_of_such_a_dtype_still_matters(tiny, tmp_path):
    config = tiny.config()
    for dtype, word in ((np.float64, "F64"), (np.bool_, "BOOL")):
        tensors = tiny.tensors(config) | {"model.norm.weight": np.ones(16, dtype)}
        refused(tiny.write(tmp_path / word, config, tensors), "model.norm.weight", word)


# Tied embeddings


def test_only_the_head_of_a_tied_model(tiny, tmp_path):
    config = tiny.config(tied=True)
    tensors = tiny.tensors(config)
    head = {"lm_head.weight": tensors.pop("model.embed_tokens.weight")}
    written_again(same_as_transformers(tiny.write(tmp_path / "in", config, tensors | head)), tmp_path / "out")


def test_the_head_of_a_tied_model_may_be_another(tiny, tmp_path, caplog):
    config = tiny.config(tied=True)
    tensors = tiny.tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    folder = tiny.write(tmp_path / "in", config, tensors)
    assert same_as_transformers(folder).config.tied
    tensors["lm_head.weight"][-1, -1] += 1
    checkpoint = same_as_transformers(tiny.write(folder, config, tensors))
    assert not checkpoint.config.tied
    assert checkpoint.hf_config["tie_word_embeddings"] is False
    assert "they are not tied, as in transformers" in caplog.text
    written_again(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_names_that_share_a_tensor(tiny, tmp_path, tied):
    """As safetensors.torch.save_model writes them: one name holds the tensor, the others are in the metadata."""
    config = tiny.config(tied=True)
    whole = tiny.write(tmp_path / "whole", config, tiny.tensors(config))
    expected = load(whole)
    folder = tiny.write(tmp_path / "in", config | {"tie_word_embeddings": tied}, {})
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_model

    model = transformers.AutoModelForCausalLM.from_pretrained(whole)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with torch.no_grad():
        save_model(model, str(folder / WHOLE))
    checkpoint = load(folder)
    np.testing.assert_array_equal(checkpoint.read("embed/embedding"), expected.read("embed/embedding"))
    np.testing.assert_array_equal(checkpoint.read("blocks/1/mlp/up/kernel"), expected.read("blocks/0/mlp/up/kernel"))
    assert ("head/kernel" in checkpoint.shapes) == (not tied)
    written_again(checkpoint, tmp_path / "out")


# Names of tensors and classes


def test_base_models_of_every_family(tmp_path):
    pytest.importorskip("torch")
    import hf_families

    for name, (_, architecture, _) in hf_families.FIRST.items():
        made = hf_families.make(name)
        folder = hf_families.save(made.base_model, tmp_path / name)
        assert not json.loads((folder / "config.json").read_text())["architectures"][0].endswith("ForCausalLM")
        if not made.config.tie_word_embeddings:
            refused(folder, "missing", "was the base model saved, without its head?")
            key = families.ARCHITECTURES[architecture].model["head/kernel"][0].removesuffix("weight")
            head = {f"{key}{k}": v.detach().numpy() for k, v in made.get_output_embeddings().named_parameters()}
            save_file(load_file(folder / WHOLE) | head, folder / WHOLE, PT)
        assert same_as_transformers(folder).hf_config["architectures"] == [architecture]


def test_layers_that_predict_the_token_after_next_are_left_out(tmp_path, caplog):
    hf_families = pytest.importorskip("hf_families")
    made = hf_families.make("Glm4Moe-0", layers=1)
    folder = hf_families.save(made, tmp_path / "in")
    tensors = load_file(folder / WHOLE)
    own = sum(tensor.size for tensor in tensors.values())
    later = {
        "model.layers.1.eh_proj.weight": np.ones((4, 5), np.float32),
        "model.layers.1.enorm.weight": np.ones(7, np.float32),
    }
    save_file(tensors | later, folder / WHOLE, PT)
    change(folder, num_nextn_predict_layers=1)
    checkpoint = same_as_transformers(folder)
    assert checkpoint.parameters == own
    assert checkpoint.hf_config["num_nextn_predict_layers"] == 0
    assert f"(1, 27 parameters, {100 * 27 / (own + 27):.1f} % of what the files hold) are left out" in caplog.text
    refused(change(folder, num_nextn_predict_layers=0), "2 tensors are not part of a Glm4MoeForCausalLM")


@pytest.mark.parametrize("key", ["quantization_config", "rope_scaling", "head_dim", "torch_dtype", "eos_token_id"])
def test_keys_that_are_null(tiny, tmp_path, key):
    config = tiny.config() | {"head_dim": 4}  # what it is without the key
    folder = tiny.write(tmp_path / "in", config, tiny.tensors(config))
    same_as_transformers(change(folder, **{key: None}))


def test_not_quantised_and_quantised(folder):
    assert load(change(folder, quantization_config={})).shapes
    refused(change(folder, quantization_config={"quant_method": "awq"}), "quantised (awq)")
    refused(change(folder, quantization_config=None, compression_config={"format": "x"}), "quantised")

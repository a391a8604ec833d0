"""Folders as they are found: what transformers reads of one is what we read of it, or we refuse in a line."""

import json
import logging

import numpy as np
import pytest
from safetensors.numpy import save_file

from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.models import families

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def change(folder, **keys):
    """config.json with other values; Ellipsis takes a key away."""
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def same_as_transformers(folder):
    """Loads a folder with both and compares every parameter."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    theirs = {key: tensor.detach().float().numpy() for key, tensor in model.state_dict().items()}
    checkpoint = load(folder)
    for path, entry in families.table(checkpoint.config).items():
        want = entry.read(*(theirs[key] for key in entry.keys))
        np.testing.assert_array_equal(checkpoint.read(path).astype(np.float32), want, err_msg=path)
    return checkpoint


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
    save_file(tiny.tensors(tiny.config(), seed=2), both / "other.safetensors", metadata={"format": "pt"})
    same_as_transformers(change(both, transformers_weights=named))
    assert f"{named} was read, as config.json says" in caplog.text
    same_as_transformers(change(both, transformers_weights=None))


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

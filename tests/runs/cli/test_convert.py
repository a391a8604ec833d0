"""`jprune convert` and `jprune info` on models whose layers differ in size."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jprune
from jprune.cli import main

OWN = {"2": {"intermediate_size": 24}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys):
    """Runs the command; gives (exit status, stdout, stderr)."""

    def run(*words):
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_every_format_holds_the_same_weights(run, tiny_model, tmp_path):
    source = tiny_model(per_layer_config=OWN)
    original = jprune.load(source)
    for format in ("jprune", "decilm", "orbax", "packed"):
        status, out, err = run("convert", source, "--out", tmp_path / format, "--format", format, "--json")
        assert status == 0
        result = json.loads(out)
        assert result["format"] == format
        assert result["notices"] == err.splitlines()
        assert json.loads((tmp_path / format / "jprune.json").read_text())["converted_from"] == str(source)
        again = jprune.load(tmp_path / format)
        assert again.config.sizes == original.config.sizes
        for path in original.shapes:
            np.testing.assert_array_equal(again.read(path), original.read(path))
    assert "trust-remote-code" in run("convert", tmp_path / "orbax", "--out", tmp_path / "d", "--format", "decilm")[2]


def test_plain_hugging_face_is_refused(run, tiny_model, tmp_path):
    status, out, err = run("convert", tiny_model(per_layer_config=OWN), "--out", tmp_path / "hf")
    assert (status, out) == (1, "")
    assert "layer 2 has 4 query heads, 2 key/value heads and d_ff 24" in err
    assert "--uniform" in err
    assert not (tmp_path / "hf").exists()


def test_a_dtype_that_is_too_narrow(run, tiny_model, tmp_path):
    folder = tiny_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = -1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = ("convert", folder, "--dtype", "float16", "--out", tmp_path / "out")
    status, out, err = run(*words)
    assert (status, out) == (1, "")
    assert "final_norm/scale" in err
    assert "-1e+06" in err
    assert "--saturate" in err
    assert not (tmp_path / "out").exists()
    assert run(*words, "--saturate")[0] == 0
    assert jprune.load(tmp_path / "out").read("final_norm/scale")[3] == -65504


def test_an_adapter_is_merged(run, tiny_model, tmp_path):
    folder, adapter = tiny_model(), tmp_path / "adapter"
    d_out, d_in = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].shape
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    pair = {f"{name}_A.weight": np.ones((1, d_in), np.float32), f"{name}_B.weight": np.ones((d_out, 1), np.float32)}
    save_file(pair, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    status, _, err = run("info", adapter)
    assert (status, err) == (
        1,
        f"jprune: {adapter}: an adapter (LORA) of MODEL, not a model; merge it into its model: "
        f"`jprune convert MODEL --adapter {adapter} --out DIR`\n",
    )
    assert run("convert", folder, "--adapter", adapter, "--out", tmp_path / "out")[0] == 0
    before, after = (jprune.load(f).read("blocks/0/attn/q/kernel") for f in (folder, tmp_path / "out"))
    np.testing.assert_allclose(after, before + 2, atol=1e-6)
    assert json.loads((tmp_path / "out" / "jprune.json").read_text())["adapter"] == str(adapter)


def test_info_names_the_layers(run, tiny_model):
    folder = tiny_model(per_layer_config=OWN)
    out = run("info", folder)[1]
    assert "layers 0 to 1: heads 4, kv_heads 2, d_ff 56\nlayer 2: heads 4, kv_heads 2, d_ff 24\n" in out
    assert "d_ff" not in out.splitlines()[1]
    result = json.loads(run("info", folder, "--json")[1])
    assert [layer["d_ff"] for layer in result["layers"]] == [56, 56, 24]
    plain = run("info", tiny_model("plain"))[1]
    assert "d_ff 56" in plain.splitlines()[1]
    assert "layer 0" not in plain

"""`jprune convert` and `jprune info` on models whose layers differ in size."""

import json

import jax
import numpy as np
import pytest

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
    for format in ("jprune", "decilm", "orbax"):
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

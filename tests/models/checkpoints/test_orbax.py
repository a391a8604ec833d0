import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.checkpoints import huggingface, load, orbax, record
from jprune.errors import JpruneError


def save(checkpoint, out, params=None):
    out.mkdir()
    orbax.save(out, checkpoint, params or checkpoint.params(), {"recipe": {"method": "none"}})
    return out


# What becomes of a dtype and what a family has are independent of each other.
@pytest.mark.parametrize(("dtype", "family"), [("float32", "llama"), ("float16", "llama_bias"), ("bfloat16", "qwen3")])
def test_restores_to_the_same_tree_and_back_to_hugging_face(tiny, tmp_path, family, dtype):
    config = tiny.config(family, tied=family == "qwen3", dtype=dtype)
    source = tiny.write(tmp_path / "hf", config, tiny.tensors(config))
    (source / "tokenizer_config.json").write_text("{}")
    original = load(source)
    saved = load(save(original, tmp_path / "orbax"))
    assert saved.config == original.config
    assert saved.shapes == original.shapes
    ours, theirs = original.params(), saved.params()
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert saved.side_files == original.side_files
    (tmp_path / "back").mkdir()
    with huggingface.Writer(tmp_path / "back", saved) as writer:
        for path in saved.shapes:
            writer.write(path, saved.read(path))
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > 0
    back = load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, ours, back.params())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_part_of_the_tree(folder, tmp_path):
    original = load(folder)
    saved = load(save(original, tmp_path / "orbax"))
    block = saved.params("blocks/1")
    assert trees.flatten(block).keys() == trees.flatten(original.params("blocks/1")).keys()
    np.testing.assert_array_equal(block["attn"]["q"]["kernel"], original.read("blocks/1/attn/q/kernel"))


def test_jax_arrays_of_another_dtype(folder, tmp_path):
    original = load(folder)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), original.params())
    saved = load(save(original, tmp_path / "orbax", params))
    assert {leaf.dtype.name for leaf in saved.shapes.values()} == {"bfloat16"}
    assert saved.hf_config["torch_dtype"] == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, saved.params(), jax.tree.map(np.asarray, params))


def test_the_record_lies_beside_it(folder, tmp_path):
    out = save(load(folder), tmp_path / "orbax")
    contents = record.read(out)
    assert {key: contents[key] for key in ("format_version", "recipe")} == {
        "format_version": 1,
        "recipe": {"method": "none"},
    }
    assert record.damaged(out) == []


def test_fingerprints_tell_weights_apart(folder, tmp_path):
    original = load(folder)
    params = original.params()
    first = load(save(original, tmp_path / "a", params))
    assert first.fingerprint() == load(tmp_path / "a").fingerprint()
    params["final_norm"]["scale"] = params["final_norm"]["scale"] + 1
    assert first.fingerprint() != load(save(original, tmp_path / "b", params)).fingerprint()


def test_params_that_do_not_fit(folder, tmp_path):
    checkpoint = load(folder)
    params = checkpoint.params()
    params["final_norm"]["scale"] = np.ones(3, np.float32)
    with pytest.raises(JpruneError, match=r"final_norm/scale: expected shape \(16,\), got shape \(3,\)"):
        save(checkpoint, tmp_path / "a", params)
    del params["final_norm"]
    with pytest.raises(JpruneError, match=r"final_norm/scale: expected shape .* got nothing"):
        save(checkpoint, tmp_path / "b", params)
    params = checkpoint.params() | {"extra": np.ones(3, np.float32)}
    with pytest.raises(JpruneError, match="'extra' is not a parameter"):
        save(checkpoint, tmp_path / "c", params)


def test_someone_elses_orbax_checkpoint(folder, tmp_path):
    out = save(load(folder), tmp_path / "orbax")
    with pytest.raises(JpruneError, match="an Orbax checkpoint of something else"):
        load(out / "params")
    (out / "config.json").unlink()
    with pytest.raises(JpruneError, match="an Orbax checkpoint of something else"):
        load(out)


def test_damaged_directory(folder, tmp_path):
    out = save(load(folder), tmp_path / "orbax")
    (out / "params/state/_METADATA").write_bytes(b"{")
    with pytest.raises(JpruneError, match=r"damaged or incomplete .* write it again"):
        load(out)


def test_damaged_data(folder, tmp_path):
    """In a process of its own: when Orbax fails it leaves futures behind that disturb later tests."""
    out = save(load(folder), tmp_path / "orbax")
    shutil.rmtree(out / "params/state/d")
    shutil.rmtree(out / "params/state/ocdbt.process_0")
    program = f"import jprune.checkpoints as c; c.load({str(out)!r}).params()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0
    assert "JpruneError" in result.stderr
    assert "damaged or incomplete" in result.stderr


def test_disk_full(folder, tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    def save_(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: writing failed: [OS error 28: No space left on device]")

    monkeypatch.setattr(ocp, "save", save_)
    with pytest.raises(JpruneError, match="is full; free some space"):
        save(load(folder), tmp_path / "orbax")


def test_parameters_are_written_in_parts(folder, tmp_path, monkeypatch):
    original, out = load(folder), tmp_path / "orbax"
    (out / "params.partial_save").mkdir(parents=True)  # of an earlier process
    most = max(leaf.size * leaf.dtype.itemsize for leaf in original.shapes.values())
    monkeypatch.setattr(orbax, "PART_BYTES", most)
    saves, held = [], []
    real = orbax.Writer._save_part
    monkeypatch.setattr(orbax.Writer, "_save_part", lambda self: saves.append(list(self._held)) or real(self))
    with orbax.Writer(out, original) as writer:
        for path in reversed(original.shapes):
            writer.write(path, original.read(path))
            held.append(sum(values.nbytes for values in writer._held.values()))
        with pytest.raises(JpruneError, match="written before"):
            writer.write("embed/embedding", original.read("embed/embedding"))
    assert len(saves) > 2
    assert max(held) < most
    saved = load(out)
    assert saved.shapes == original.shapes
    for path in original.shapes:
        np.testing.assert_array_equal(saved.read(path), original.read(path))
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["params"]


def test_a_parameter_that_was_never_written(folder, tmp_path):
    original = load(folder)
    (tmp_path / "orbax").mkdir()
    writer = orbax.Writer(tmp_path / "orbax", original)
    writer.write("final_norm/scale", original.read("final_norm/scale"))
    with pytest.raises(JpruneError, match=f"{len(original.shapes) - 1} parameters were not written"):
        writer.close()
    with pytest.raises(JpruneError, match="expected shape"):
        writer.write("embed/embedding", np.zeros(3, np.float32))

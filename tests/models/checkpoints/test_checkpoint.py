import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jprune.checkpoints import dtypes, load
from jprune.errors import JpruneError
from jprune.models import families
from jprune.tuning.weights import compute_dtype


def test_paths_shapes_and_layout(folder, tiny):
    checkpoint = load(folder)
    stored = tiny.tensors(tiny.config())
    assert checkpoint.source == str(folder)
    assert checkpoint.shapes["blocks/1/attn/q/kernel"].shape == (16, 4, 8)
    q = stored["model.layers.1.self_attn.q_proj.weight"]
    for head in range(4):
        for i in range(8):
            np.testing.assert_array_equal(checkpoint.read("blocks/1/attn/q/kernel")[:, head, i], q[8 * head + i])
    np.testing.assert_array_equal(checkpoint.read("head/kernel"), stored["lm_head.weight"].T)


def test_experts_are_read_one_after_the_other(tmp_path):
    """In the memory of their stack and of one of them; each its own dtype's numbers, where they differ."""
    sizes = {
        "vocab_size": 8,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_local_experts": 8,
    }
    hf = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_attention_heads": 2} | sizes
    hf |= {"num_key_value_heads": 1}
    entries = families.table(families.config(hf))
    tensors = {key: np.full(e.shape, 1, ml_dtypes.bfloat16) for e in entries.values() for key in e.keys}
    path = "blocks/0/mlp/experts/up/kernel"
    odd = np.full(entries[path].shape, 1 / 3, np.float32)
    tensors[entries[path].keys[3]] = odd
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = load(tmp_path)
    assert checkpoint.shapes[path].dtype == np.float32
    np.testing.assert_array_equal(checkpoint.read(path)[3], odd.T)
    down = path.replace("up", "down")
    tracemalloc.start()
    assert checkpoint.read(down).nbytes == 8 * 128 * 256 * 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.4 * 8 * 128 * 256 * 2


def test_params_below_a_prefix(folder):
    checkpoint = load(folder)
    block = checkpoint.params("blocks/1")
    assert sorted(block) == ["attn", "attn_norm", "mlp", "mlp_norm"]
    np.testing.assert_array_equal(block["mlp"]["up"]["kernel"], checkpoint.read("blocks/1/mlp/up/kernel"))
    assert sorted(checkpoint.params()) == ["blocks", "embed", "final_norm", "head"]


@pytest.mark.parametrize("prefix", ["blocks/2", "block", "nothing"])
def test_params_below_nothing(folder, prefix):
    with pytest.raises(JpruneError, match=prefix):
        load(folder).params(prefix)


def test_unknown_path(folder):
    with pytest.raises(JpruneError, match="no parameter 'x'"):
        load(folder).read("x")


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_the_default_dtype_of_activations_does_not_overflow(folder, monkeypatch, backend, stored):
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    model = load(folder)
    monkeypatch.setitem(model.shapes, "embed/embedding", jax.ShapeDtypeStruct((2, 2), stored))
    same = backend != "cpu" and stored == "bfloat16"
    assert dtypes.activation_dtype(model, None) == (stored if same else "float32")
    assert dtypes.activation_dtype(model, "float16") == "float16"
    assert compute_dtype(model, None) == ("bfloat16" if backend != "cpu" and stored != "float32" else "float32")


def test_a_folder_without_tokenizer(folder):
    assert load(folder).tokenizer is None


def test_fingerprint_follows_weights_and_config_not_place(tiny, tmp_path):
    config = tiny.config()
    first = load(tiny.write(tmp_path / "a", config, tiny.tensors(config)))
    same = load(tiny.write(tmp_path / "b", config, tiny.tensors(config)))
    weights = load(tiny.write(tmp_path / "c", config, tiny.tensors(config, seed=1)))
    theta = load(tiny.write(tmp_path / "d", config | {"rope_theta": 5e5}, tiny.tensors(config)))
    assert first.fingerprint() == same.fingerprint()
    assert len({first.fingerprint(), weights.fingerprint(), theta.fingerprint()}) == 3


def test_eos_comes_from_the_generation_config_first(folder):
    assert load(folder).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert load(folder).eos_token_ids == (2, 5)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pkl", "model"])
def test_other_files_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(JpruneError, match=r"only \.safetensors and \.gguf files are read"):
        load(tmp_path / name)


@pytest.mark.parametrize("source", ["./nothing", "/nowhere/at/all", "no such model!", "model.gguf", "~/nothing"])
def test_nothing_there(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JpruneError, match="no such file or folder"):
        load(source)


def test_empty_folder(tmp_path):
    with pytest.raises(JpruneError, match=r"no config\.json there"):
        load(tmp_path)

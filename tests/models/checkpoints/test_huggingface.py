import dataclasses
import errno
import json
import shutil
import subprocess
import sys

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jprune import trees
from jprune.checkpoints import Checkpoint, huggingface, load, writing
from jprune.errors import JpruneError


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def contents(folder):
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def copy(checkpoint, out, order=None, **options):
    """Through our layout and back."""
    out.mkdir(exist_ok=True)
    with huggingface.Writer(out, checkpoint, **options) as writer:
        for path in order or checkpoint.shapes:
            writer.write(path, checkpoint.read(path))
    return out


@given(data=st.data(), family=st.sampled_from(("llama", "llama_bias", "qwen2", "qwen3")), tied=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_is_bit_exact(tiny, tmp_path_factory, data, family, tied):
    dtype = data.draw(st.sampled_from(sorted(tiny.dtypes)))
    config = tiny.config(family, tied=tied, dtype=dtype)
    # Random bits: infinities, subnormals and NaN payloads must survive too.
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tensors = {
        key: np.frombuffer(rng.bytes(t.nbytes), np.uint8).view(t.dtype).reshape(t.shape)
        for key, t in tiny.tensors(config).items()
    }
    folder = tmp_path_factory.mktemp("source")
    (tiny.write_sharded if data.draw(st.booleans()) else tiny.write)(folder, config, tensors)
    checkpoint = load(folder)
    order = data.draw(st.permutations(list(checkpoint.shapes)))
    limit = data.draw(st.sampled_from((1, 3000, 1e9)))
    out = copy(checkpoint, tmp_path_factory.mktemp("out"), order, max_shard_bytes=limit)
    written = contents(out)
    assert written.keys() == tensors.keys()
    for key, expected in tensors.items():
        assert written[key].dtype == expected.dtype
        np.testing.assert_array_equal(bits(written[key]), bits(expected), err_msg=key)
    assert json.loads((out / "config.json").read_text()) == config


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_result_and_gives_our_logits(tiny, tmp_path, family, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    config = tiny.config(family, tied=tied)
    checkpoint = load(tiny.write(tmp_path / "in", config, tiny.tensors(config)))
    out = copy(checkpoint, tmp_path / "out", max_shard_bytes=4000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10) * 4
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    ours = load(out)
    params = jax.tree.map(jnp.asarray, ours.params())
    np.testing.assert_allclose(compiled.apply(ours.config, params, jnp.asarray(tokens)), expected, atol=1e-4)


def test_writes_what_the_safetensors_package_reads(folder, tmp_path):
    out = copy(load(folder), tmp_path / "out")
    with safe_open(out / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.safetensors"]


def test_shards_respect_the_limit_and_the_index_lists_them(folder, tmp_path):
    checkpoint = load(folder)
    out = copy(checkpoint, tmp_path / "out", max_shard_bytes=5000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(f.name for f in out.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    for name in files:
        stored = load_file(out / name)
        size = sum(t.nbytes for t in stored.values())
        assert size <= 5000 or len(stored) == 1
        assert {key for key, file in index["weight_map"].items() if file == name} == stored.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in contents(out).values())


def test_casts_to_the_dtypes_asked_for_and_says_so_in_the_config(folder, tmp_path, tiny):
    checkpoint = load(folder)
    dtypes = {path: tiny.dtypes["bfloat16"] for path in checkpoint.shapes if "norm" not in path}
    out = copy(checkpoint, tmp_path / "out", dtypes=dtypes)
    again = load(out)
    assert again.hf_config["torch_dtype"] == "bfloat16"
    for path, leaf in again.shapes.items():
        assert leaf.dtype == dtypes.get(path, np.float32)
        np.testing.assert_array_equal(again.read(path), checkpoint.read(path).astype(leaf.dtype))


def test_the_newer_config_key_is_kept(tiny, tmp_path):
    config = tiny.config(dtype="float16")
    config["dtype"] = config.pop("torch_dtype")
    tensors = tiny.tensors(config | {"torch_dtype": "float16"})
    checkpoint = load(tiny.write(tmp_path / "in", config, tensors))
    out = copy(checkpoint, tmp_path / "out", dtypes=dict.fromkeys(checkpoint.shapes, np.float32))
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == "float32"
    assert "torch_dtype" not in written


def test_tokenizer_generation_config_and_licence_travel_along(folder, tmp_path):
    names = ("tokenizer.json", "tokenizer_config.json", "merges.txt", "generation_config.json", "LICENSE.txt")
    for name in names:
        (folder / name).write_text(f'{{"{name}": "é"}}')
    (folder / "README.md").write_text("a card about another model")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    out = copy(load(folder), tmp_path / "out")
    assert {f.name for f in out.iterdir()} == {*names, "config.json", "model.safetensors"}
    for name in names:
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_loading_reads_no_tensor(folder):
    def read():
        raise RuntimeError("read")

    opened = huggingface.open_source(folder)
    tensors = {key: dataclasses.replace(tensor, read=read) for key, tensor in opened.tensors.items()}
    checkpoint = Checkpoint("lazy", dataclasses.replace(opened, tensors=tensors))
    checkpoint.fingerprint()
    with pytest.raises(RuntimeError, match="read"):
        checkpoint.read("final_norm/scale")


def test_tied_models_that_store_the_head_all_the_same(tiny, tmp_path):
    config = tiny.config(tied=True)
    tensors = tiny.tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    checkpoint = load(tiny.write(tmp_path / "in", config, tensors))
    assert "head/kernel" not in checkpoint.shapes


def test_one_safetensors_file_by_path(folder):
    assert load(folder / "model.safetensors").shapes == load(folder).shapes


def test_a_shard_by_path_stands_for_its_folder(tiny, tmp_path):
    config = tiny.config()
    folder = tiny.write_sharded(tmp_path / "in", config, tiny.tensors(config))
    assert load(folder / "model-00001-of-00002.safetensors").shapes == load(folder).shapes


# Bad input: one line that says what is wrong and what to do.


def fails(folder, *words):
    with pytest.raises(JpruneError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_file(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    fails(folder, "model.safetensors", "truncated or damaged", "download it again")


def test_corrupt_header(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    fails(folder, "model.safetensors", "truncated or damaged")


def test_missing_tensor(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    fails(tiny.write(tmp_path / "in", config, tensors), "1 tensor", "model.layers.1.mlp.up_proj.weight", "missing")


def test_missing_head_hints_at_tying(tiny, tmp_path):
    config = tiny.config()
    fails(
        tiny.write(tmp_path / "in", config, tiny.tensors(config | {"tie_word_embeddings": True})), "tie_word_embeddings"
    )


def test_unknown_tensor(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config) | {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}
    fails(tiny.write(tmp_path / "in", config, tensors), "self_attn.q_proj.bias", "not part of a LlamaForCausalLM")


def test_shape_mismatch_names_tensor_expected_and_found(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((20, 16), np.float32)
    fails(tiny.write(tmp_path / "in", config, tensors), "model.layers.0.mlp.up_proj.weight", "(20, 16)", "(24, 16)")


def test_missing_shard(tiny, tmp_path):
    config = tiny.config()
    folder = tiny.write_sharded(tmp_path / "in", config, tiny.tensors(config))
    (folder / "model-00002-of-00002.safetensors").unlink()
    fails(folder, "1 of 2 shards", "model-00002-of-00002.safetensors")


def test_tensor_missing_from_its_shard(tiny, tmp_path):
    config = tiny.config()
    folder = tiny.write_sharded(tmp_path / "in", config, tiny.tensors(config))
    shard = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    key = sorted(tensors)[0]
    del tensors[key]
    save_file(tensors, shard)
    fails(folder, key, shard.name)


@pytest.mark.parametrize("target", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "a\\b", 3])
def test_index_that_points_outside_its_folder(tiny, tmp_path, target):
    config = tiny.config()
    folder = tiny.write_sharded(tmp_path / "in", config, tiny.tensors(config))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = target
    index.write_text(json.dumps(content))
    fails(folder, "model.norm.weight", "outside its folder", "refused")


def test_index_that_points_to_a_pickle(tiny, tmp_path):
    config = tiny.config()
    folder = tiny.write_sharded(tmp_path / "in", config, tiny.tensors(config))
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", "pytorch_model.bin"))
    fails(folder, "pytorch_model.bin", "only safetensors")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {}}'])
def test_damaged_index(tiny, tmp_path, content):
    config = tiny.config()
    folder = tiny.write_sharded(tmp_path / "in", config, tiny.tensors(config))
    (folder / "model.safetensors.index.json").write_text(content)
    fails(folder, "model.safetensors.index.json")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(folder, "pytorch_model.bin", "can run code", "convert them to safetensors")


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    fails(folder, "no model.safetensors")


def test_several_files_without_an_index(folder):
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    fails(folder, "2 safetensors files", "index")


def test_no_config(folder):
    (folder / "config.json").unlink()
    fails(folder, "no config.json")


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"a": 1}', '{"architectures": ["LlamaForCausalLM"], "hidden_size": "x"}']
)
def test_damaged_config(folder, content):
    (folder / "config.json").write_text(content)
    fails(folder, "config")


def test_unsupported_architecture(folder):
    (folder / "config.json").write_text(json.dumps({"architectures": ["NobodysForCausalLM"]}))
    fails(folder, "NobodysForCausalLM", "LlamaForCausalLM")


def test_quantised_weights_are_refused(folder, tiny):
    config = tiny.config() | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, "quantised", "gptq")


def test_integer_weights_are_refused(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config)
    tensors["model.norm.weight"] = np.ones(16, np.int8)
    fails(tiny.write(tmp_path / "in", config, tensors), "model.norm.weight", "I8")


def test_writer_refuses_wrong_use(folder, tmp_path):
    checkpoint = load(folder)
    (tmp_path / "out").mkdir()
    writer = huggingface.Writer(tmp_path / "out", checkpoint)
    with pytest.raises(JpruneError, match="expected shape"):
        writer.write("final_norm/scale", np.ones(3, np.float32))
    writer.write("final_norm/scale", np.ones(16, np.float32))
    with pytest.raises(JpruneError, match="written before"):
        writer.write("final_norm/scale", np.ones(16, np.float32))
    with pytest.raises(JpruneError, match="not a parameter"):
        writer.write("blocks/9/attn/q/kernel", np.ones(16, np.float32))
    with pytest.raises(JpruneError, match="were not written, first embed/embedding"):
        writer.close()


def test_writer_leaves_errors_of_the_work_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match="mine"), huggingface.Writer(tmp_path / "out", load(folder)):
        raise RuntimeError("mine")


def test_disk_full_before_the_work(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (tmp_path / "out").mkdir()
    with pytest.raises(JpruneError, match=r"needs 0\.00 GB .* free some space"):
        huggingface.Writer(tmp_path / "out", load(folder))


def test_disk_full_while_writing(folder, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    checkpoint = load(folder)
    writer = huggingface.Writer(tmp_path / "out", checkpoint)

    def write(self, key, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.SafetensorsFile, "write", write)
    with pytest.raises(JpruneError, match="is full; free some space"):
        writer.write("final_norm/scale", np.ones(16, np.float32))


def test_folder_that_cannot_be_written(folder, tmp_path):
    with pytest.raises(JpruneError, match="cannot be written"):
        huggingface.Writer(tmp_path / "absent", load(folder))


def test_hub(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(folder))
    checkpoint = load("someone/model")
    assert checkpoint.source == "someone/model"
    assert checkpoint.shapes == load(folder).shapes


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("LocalEntryNotFoundError", "connect to the network"),
        ("OfflineModeIsEnabled", "connect to the network"),
        ("HfHubHTTPError", "connect to the network"),
        ("RepositoryNotFoundError", "nor a model on huggingface.co"),
        ("HFValidationError", "nor a model on huggingface.co"),
        ("GatedRepoError", "hf auth login"),
        ("", "connect to the network"),  # the network library's own
    ],
)
def test_hub_failures(monkeypatch, kind, words):
    import huggingface_hub
    from huggingface_hub import errors

    class Failure(getattr(errors, kind, Exception)):
        def __init__(self):
            Exception.__init__(self, "reason\nand much more")

    def fail(*args, **kwargs):
        raise Failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    fails("someone/model", "someone/model", words)


def test_opening_a_folder_is_light(folder):
    heavy = (
        "flax",
        "orbax",
        "grain",
        "transformers",
        "huggingface_hub",
        "gguf",
        "tokenizers",
        "optax",
        "scipy",
        "torch",
    )
    program = (
        f"import sys; from jprune.checkpoints import load; checkpoint = load({str(folder)!r}); "
        f"checkpoint.parameters, checkpoint.sizes, checkpoint.described(), checkpoint.params('blocks/0'); "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_facts(folder):
    checkpoint = load(folder)
    assert checkpoint.parameters == sum(x.size for x in trees.flatten(checkpoint.params()).values())
    assert checkpoint.nbytes == sum(x.nbytes for x in trees.flatten(checkpoint.params()).values())
    config = checkpoint.config
    each = {"d_model": config.d_model, "heads": config.heads, "kv_heads": config.kv_heads, "d_ff": config.d_ff}
    assert checkpoint.sizes == (each,) * config.layers
    assert set(vars(checkpoint.suggested).values()) == {None}
    assert checkpoint.described() == {
        "source": str(folder),
        "architecture": config.architecture,
        "road": "native",
        "fingerprint": checkpoint.fingerprint(),
    }

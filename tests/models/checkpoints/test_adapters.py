"""Adapters of PEFT: named as what they are, and merged. The truth is W + alpha / r * B A, written out."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jprune.checkpoints import load
from jprune.checkpoints.huggingface import peft
from jprune.errors import JpruneError

Q, DOWN, EMBED = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens"
START = "base_model.model."
CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "someone/model", "r": 3, "lora_alpha": 6, "bias": "none"}


@pytest.fixture
def adapter(tmp_path, rng):
    """An adapter for two kernels of the tiny model, of rank 3."""

    def make(tensors=None, **config):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
        random = {
            f"{START}{Q}.lora_A.weight": (3, 16),
            f"{START}{Q}.lora_B.weight": (32, 3),
            f"{START}{DOWN}.lora_A.weight": (3, 24),
            f"{START}{DOWN}.lora_B.weight": (16, 3),
        }
        given = {k: rng.normal(size=s).astype(np.float32) for k, s in random.items()} if tensors is None else tensors
        save_file(given, folder / "adapter_model.safetensors")
        return folder, given

    return make


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (2, 2)),
        ({"use_rslora": True}, (6 / 3**0.5,) * 2),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 9, "proj": 1}}, (2, 3)),
        ({"init_lora_weights": "gaussian", "use_dora": False, "alora_invocation_tokens": None}, (2, 2)),
    ],
)
def test_merged(folder, adapter, caplog, config, scales):
    base = load_file(folder / "model.safetensors")
    base[f"{Q}.weight"][::2] = 0  # pruned
    save_file(base, folder / "model.safetensors")
    where, pairs = adapter(**config)
    merged = load(folder, adapter=where)
    plain = load(folder)
    changed = {"blocks/0/attn/q/kernel": (Q, scales[0]), "blocks/1/mlp/down/kernel": (DOWN, scales[1])}
    for path in plain.shapes:
        want = plain.read(path)
        if path in changed:
            name, scale = changed[path]
            delta = scale * pairs[f"{START}{name}.lora_B.weight"] @ pairs[f"{START}{name}.lora_A.weight"]
            want = np.where(want == 0, 0, want + delta.T.reshape(want.shape))
            assert not np.array_equal(want, plain.read(path))
        np.testing.assert_allclose(merged.read(path), want, atol=1e-6)
    assert f"2 kernels were merged with {where}" in caplog.text
    assert merged.fingerprint() != plain.fingerprint()


def test_embeddings_whole_tensors_and_no_prefix(folder, adapter, rng):
    a, b, norm = (rng.normal(size=s).astype(np.float32) for s in ((3, 96), (16, 3), (16,)))
    tensors = {
        f"{START}embed_tokens.lora_embedding_A": a,
        f"{START}embed_tokens.lora_embedding_B": b,
        f"{START}embed_tokens.base_layer.weight": load_file(folder / "model.safetensors")[f"{EMBED}.weight"],
        f"{START}model.norm.weight": norm,
    }
    merged = load(folder, adapter=adapter(tensors)[0])
    np.testing.assert_allclose(
        merged.read("embed/embedding"), load(folder).read("embed/embedding") + 2 * (b @ a).T, atol=1e-6
    )
    np.testing.assert_array_equal(merged.read("final_norm/scale"), norm)


def test_what_is_kept_apart_is_merged_again(folder, tmp_path, rng):
    checkpoint = load(folder)
    a, b = rng.normal(size=(16, 3)), rng.normal(size=(3, 4, 8))
    (tmp_path / "kept").mkdir()
    peft.save(tmp_path / "kept", checkpoint, {"blocks/1/attn/q/kernel": (a, b)}, alpha=12, dropout=0)
    got = load(folder, adapter=tmp_path / "kept").read("blocks/1/attn/q/kernel")
    want = checkpoint.read("blocks/1/attn/q/kernel") + 4 * np.einsum("ir,rhd->ihd", a, b)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_kernels_that_are_stored_with_their_inputs_first(tmp_path, adapter, rng):
    pytest.importorskip("torch")
    import hf_families

    made = hf_families.make("GPT2LMHeadModel-0")
    base = hf_families.save(made, tmp_path / "gpt2")
    stored = load_file(base / "model.safetensors")
    key = next(key for key in stored if key.endswith("0.attn.c_attn.weight"))
    d_in, d_out = stored[key].shape
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((3, d_in), (d_out, 3)))
    name = f"{START}{key.removesuffix('.weight')}"
    where, _ = adapter({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, fan_in_fan_out=True)
    want = (stored[key] + 2 * (b @ a).T).reshape(d_in, 3, -1)
    merged = load(base, adapter=where)
    for i, part in enumerate("qkv"):
        np.testing.assert_allclose(merged.read(f"blocks/0/attn/{part}/kernel").reshape(d_in, -1), want[:, i], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "alpha_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
    ],
)
def test_what_is_no_plain_lora(folder, adapter, config, words):
    with pytest.raises(JpruneError, match=words):
        load(folder, adapter=adapter(**config)[0])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{START}model.layers.7.mlp.up_proj.lora_A.weight": np.ones((3, 16), np.float32)}, "has no|no tensor for it"),
        ({f"{START}{Q}.lora_A.weight": np.ones((3, 16), np.float32)}, "do not fit"),
        (
            {
                f"{START}{Q}.lora_A.weight": np.ones((3, 16), np.float32),
                f"{START}{Q}.lora_B.weight": np.ones((16, 3), np.float32),
            },
            r"\(32, 16\).*do not fit.*another model",
        ),
        ({f"{START}{Q}.lora_A.weight": np.ones((3, 16), np.int8)}, "I8"),
        ({f"{START}model.norm.weight": np.ones(8, np.float32)}, r"\(8,\)"),
    ],
)
def test_an_adapter_of_another_model(folder, adapter, tensors, words):
    with pytest.raises(JpruneError, match=words):
        load(folder, adapter=adapter(tensors)[0])


def test_no_adapter_there(folder, tmp_path, adapter):
    with pytest.raises(JpruneError, match=r"no adapter_config\.json there"):
        load(folder, adapter=tmp_path)
    where, _ = adapter()
    (where / "adapter_model.safetensors").rename(where / "adapter_model.bin")
    with pytest.raises(JpruneError, match="pickled adapters"):
        load(folder, adapter=where)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter_is_named_as_one(folder, adapter, with_config, weights):
    where, _ = adapter()
    if with_config:  # some trainers save the model's, too
        (where / "config.json").write_text((folder / "config.json").read_text())
    for source in (where, where / "adapter_model.safetensors"):
        with pytest.raises(JpruneError, match=r"of someone/model, not a model.*convert someone/model --adapter"):
            load(source, weights=weights)


def test_a_model_with_an_adapter_beside_it_is_the_model(folder, adapter):
    where, _ = adapter()
    for file in where.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert load(folder).shapes

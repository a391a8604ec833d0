"""Quantised Hugging Face folders: their weights are transformers' dequantised ones, and what is written is plain."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.checkpoints import huggingface, load
from jprune.checkpoints.huggingface import quantised
from jprune.checkpoints.huggingface.read import FLOATS, open_file
from jprune.errors import JpruneError
from jprune.models import decoder, families

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [8, 4]}
PT = {"format": "pt"}


def every_byte(shape):
    """Numbers of eight bits, all of them, infinities and NaNs too."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fp8(tiny, tmp_path):
    """A function that saves a small Llama whose projections are fp8, of blocks that fit or do not."""

    def write(scales=torch.float32, block=(8, 4)):
        config = tiny.config(dtype="bfloat16") | {"quantization_config": FP8 | {"weight_block_size": list(block)}}
        folder = tiny.write(tmp_path / "fp8", config, tiny.tensors(config))
        tensors = load_file(folder / "model.safetensors")
        torch.manual_seed(0)
        for key in [key for key in tensors if "_proj" in key]:
            grid = [-(-size // each) for size, each in zip(tensors[key].shape, block)]
            tensors[key] = every_byte(tensors[key].shape).view(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = (torch.rand(grid) * 2.0 ** torch.randint(-9, 3, grid)).to(scales)
        save_file(tensors, folder / "model.safetensors", PT)
        return folder, tensors

    return write


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_is_what_transformers_makes_of_it(fp8, scales):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    folder, tensors = fp8(scales)
    checkpoint = load(folder)
    for path, entry in families.table(checkpoint.config).items():
        want = tensors[entry.key]
        if (scale := tensors.get(f"{entry.key}_scale_inv")) is not None:
            want = Fp8Dequantize(None).convert({"weight": want, "weight_scale_inv": scale})["weight"]
            want = want.to(torch.bfloat16)
        assert checkpoint.shapes[path].dtype == quantised.BFLOAT16
        got = entry.write(np.ascontiguousarray(checkpoint.read(path))).astype(np.float32)
        np.testing.assert_array_equal(got, want.float().numpy(), err_msg=path)


def test_fp8_blocks_at_an_edge_may_be_smaller(fp8):
    folder, tensors = fp8(block=(7, 5))
    checkpoint = load(folder)
    for path, entry in families.table(checkpoint.config).items():
        if (scale := tensors.get(f"{entry.key}_scale_inv")) is not None:
            weight = tensors[entry.key].float()
            wide = torch.stack(
                [torch.stack([scale[i // 7, j // 5] for j in range(weight.shape[1])]) for i in range(len(weight))]
            )
            got = entry.write(np.ascontiguousarray(checkpoint.read(path))).astype(np.float32)
            np.testing.assert_array_equal(got, (weight * wide).to(torch.bfloat16).float().numpy(), err_msg=path)


def test_results_are_plain(fp8, tmp_path):
    folder, tensors = fp8()
    checkpoint = load(folder)
    (tmp_path / "out").mkdir()
    with huggingface.Writer(tmp_path / "out", checkpoint) as writer:
        for path in checkpoint.shapes:
            writer.write(path, checkpoint.read(path))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert "quantization_config" not in config
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert written.keys() == {key for key in tensors if not key.endswith("_scale_inv")}
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in written.values()) == load(folder, weights=False).nbytes
    assert checkpoint.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = every_byte((3, 5, 2, 16)), every_byte((3, 5, 2))
    save_file({"experts.up_blocks": blocks, "experts.up_scales": scales}, tmp_path / "x.safetensors", PT)
    stored, _ = open_file(tmp_path / "x.safetensors", FLOATS | quantised.DTYPES)
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    left, tensors, _ = quantised.plain(config, stored, tmp_path)
    assert left == {"torch_dtype": "bfloat16"}
    want = convert_moe_packed_tensors(blocks, scales).float().numpy()
    read = tensors["experts.up"]
    assert read.shape == want.shape
    assert read.stored_bytes == blocks.nbytes + scales.nbytes
    np.testing.assert_array_equal(read.read().astype(np.float32), want)
    np.testing.assert_array_equal(read.rows(1, 2).astype(np.float32), want[1:2])


def test_a_model_of_mxfp4_computes_what_transformers_does_with_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    hf = pytest.importorskip("hf_families")
    family, architecture, variant = hf.VARIANTS["GptOss-1"]
    sizes = hf.sizes(family, layers=1) | variant | {"hidden_size": 64, "intermediate_size": 32}
    made = hf.model(architecture, sizes)
    tensors = load_file(hf.save(made, tmp_path) / "model.safetensors")
    for name, outputs, inputs in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        key = f"model.layers.0.mlp.experts.{name}"
        blocks = every_byte((3, outputs, inputs // 32, 16))
        scales = 122 + every_byte((3, outputs, inputs // 32)) % 4  # of numbers below 1
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        getattr(made.model.layers[0].mlp.experts, name).data = convert_moe_packed_tensors(blocks, scales).float()
        del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", PT)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint, tokens = load(tmp_path), hf.tokens(12)
    ours = jax.jit(lambda p: decoder.apply(checkpoint.config, p, jnp.asarray(tokens)))(checkpoint.params())
    want = hf.logits(made, tokens)
    np.testing.assert_allclose(ours, want, atol=1e-4 * np.abs(want).max())


def test_a_tensor_is_read_in_the_memory_that_it_takes(tmp_path, monkeypatch):
    """And not in that of float32, of which a chunk is there at a time."""
    monkeypatch.setattr(quantised, "_CHUNK", 1 << 14)
    torch.manual_seed(0)
    tensors = {
        "a.weight": every_byte((1024, 512)).view(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.rand(8, 4),
        "b_blocks": every_byte((64, 32, 8, 16)),
        "b_scales": every_byte((64, 32, 8)),
    }
    save_file(tensors, tmp_path / "x.safetensors", PT)
    stored, _ = open_file(tmp_path / "x.safetensors", FLOATS | quantised.DTYPES)
    for method, name in (("fp8", "a.weight"), ("mxfp4", "b")):
        settings = {"quant_method": method, "weight_block_size": [128, 128]}
        read = quantised.plain({"quantization_config": settings}, stored, tmp_path)[1][name]
        tracemalloc.start()
        assert read.read().nbytes == read.nbytes == 1 << 20
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.5 * read.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, r"quantised \(gptq\); only fp8 and mxfp4 are read.*unquantised model, or a GGUF"),
        ({"quant_method": ["fp8"]}, r"quantised \(\['fp8'\]\); only"),
        ({"weight_block_size": None}, "weight_block_size of fp8 weights is .*expected two positive numbers"),
        ({"weight_block_size": [4, 8]}, r"weight_scale_inv' has shape .* blocks of \(4, 8\)"),
    ],
)
def test_what_is_not_read_is_refused(fp8, change, message):
    folder, _ = fp8()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FP8 | change}))
    with pytest.raises(JpruneError, match=message):
        load(folder)


def test_damaged_files_of_either_kind_are_refused(fp8):
    folder, tensors = fp8()
    key, path = "model.layers.1.mlp.up_proj.weight", folder / "model.safetensors"

    def refused(tensors, message, **config):
        save_file(tensors, path, PT)
        content = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(JpruneError, match=message):
            load(folder)

    flat, scale = tensors[key].reshape(24, 4, 4), tensors[f"{key}_scale_inv"]
    refused(
        tensors | {key: flat, f"{key}_scale_inv": scale[:, :1].contiguous()}, r"has shape \(3, 1\), but .* \(24, 4, 4\)"
    )
    refused(tensors | {f"{key}_scale_inv": scale.to(torch.uint8)}, "do not say its scales")
    refused(tensors, "quantised .fp8.; only", quantization_config="fp8")
    mxfp4 = {"quantization_config": {"quant_method": "mxfp4"}}
    blocks, scales = every_byte((3, 5, 2, 16)), every_byte((3, 5, 2))
    refused({"x_blocks": blocks}, "x_blocks' has shape .* its scales None", **mxfp4)
    refused({"x_blocks": blocks, "x_scales": scales[:2].contiguous()}, r"its scales \(2, 5, 2\)")
    refused({"x_blocks": blocks.float(), "x_scales": scales}, "expected bytes")


@pytest.mark.parametrize("said", [True, False])
def test_weights_without_scales_are_refused(fp8, said):
    folder, tensors = fp8()
    if not said:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != f"{key}_scale_inv"}, folder / "model.safetensors", PT)
    with pytest.raises(JpruneError, match=r"is stored as F8_E4M3, and config\.json and the files do not say"):
        load(folder)

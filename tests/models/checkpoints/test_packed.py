"""Packed folders: what is written is read again to the bit, what is damaged is refused, and the decoder runs them."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jprune import trees
from jprune.checkpoints import formats, load
from jprune.checkpoints.packed import write
from jprune.checkpoints.packed.write import Writer
from jprune.errors import JpruneError
from jprune.models import decoder, stacked
from jprune.sparse import PackedKernel, Packing, rooms

EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}


def sparse(rng, shape, share, dtype):
    """Numbers of which a share are zeros; every other output has none at the first input."""
    values = rng.standard_normal(shape, np.float32)
    values[rng.random(shape) < share] = 0
    return values.astype(dtype)


def params_of(checkpoint, rng, dtype=ml_dtypes.bfloat16, share=0.6):
    return {
        path: sparse(rng, leaf.shape, share if path.startswith("blocks") and "kernel" in path else 0, dtype)
        for path, leaf in checkpoint.shapes.items()
    }


def packed(folder, checkpoint, params, **options):
    folder.mkdir()
    with Writer(folder, checkpoint, **options) as writer:
        for path in reversed(checkpoint.shapes):
            writer.write(path, params[path])
    return load(folder), writer.reports


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A Llama whose kernels are large enough to be worth packing."""
    config = tiny.config() | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return load(tiny.write(tmp_path_factory.mktemp("packed") / "model", config, tiny.tensors(config)))


@pytest.fixture(scope="module")
def kept(model, tmp_path_factory):
    """That model packed, which stays as it is."""
    out = tmp_path_factory.mktemp("kept") / "packed"
    packed(out, model, params_of(model, np.random.default_rng(0)))
    return out


@pytest.fixture
def out(kept, tmp_path):
    """A copy of it."""
    return shutil.copytree(kept, tmp_path / "packed")


@pytest.fixture
def experts(tmp_path, tiny):
    config = tiny.config() | EXPERTS | {"hidden_size": 128, "head_dim": 32}
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "config.json").write_text(json.dumps(config))
    return load(tmp_path / "experts", weights=False)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_comes_back_to_the_bit(model, tmp_path, rng, dtype, monkeypatch):
    monkeypatch.setattr(write, "PART_BYTES", 2**16)
    params = params_of(model, rng, dtype)
    again, reports = packed(tmp_path / "packed", model, params)
    assert again.is_packed
    assert again.config == model.config
    assert len(list((tmp_path / "packed").glob("packed-*"))) > 2
    assert {report.path for report in reports} == {
        path for path in model.shapes if "blocks" in path and "kernel" in path
    }
    assert all(report.bytes < report.bytes_before and report.error == 0 for report in reports)
    (tmp_path / "back").mkdir()
    formats.write(tmp_path / "back", again)
    for path, want in params.items():
        for read in (again, load(tmp_path / "back")):
            got = read.read(path)
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(np.ascontiguousarray(got).view(np.uint8), want.view(np.uint8))
    assert again.fingerprint() != model.fingerprint()
    files = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    assert 0.9 * files < again.stored_bytes < files


def test_each_kernel_in_the_smallest_format(model, tmp_path, rng):
    params = params_of(model, rng, share=0.0)
    kernel = params["blocks/0/mlp/up/kernel"].reshape(16, 8, -1)
    kernel[:, 2:] = 0  # 2 of 8
    params["blocks/0/mlp/down/kernel"] = sparse(rng, (256, 128), 0.6, ml_dtypes.bfloat16)
    again, reports = packed(tmp_path / "packed", model, params)
    found = {report.path: report.format for report in reports if report.format != "dense"}
    assert found == {"blocks/0/mlp/up/kernel": "capped:2", "blocks/0/mlp/down/kernel": "bitmap"}
    assert isinstance(again.params("blocks/0", packed=True)["mlp"]["up"]["kernel"], PackedKernel)
    with pytest.raises(JpruneError, match=r"blocks/1/mlp/down/kernel: capped:4 holds at most 4 values .* would hold"):
        packed(tmp_path / "capped", model, params, packing=Packing(format="capped:4"))
    with pytest.raises(JpruneError, match="'nothing' matches none"):
        Writer(tmp_path, model, where=["nothing"])
    for wrong in ({"format": "tiled_csl"}, {"format": "capped:5"}, {"format": ""}):
        with pytest.raises(JpruneError, match=f"`{next(iter(wrong))}` is"):
            Packing(**wrong)


@pytest.mark.parametrize(("values", "most"), [("16", 2**-8), ("int8", 1 / 127), ("float8_e4m3fn", 2**-4)])
def test_rounding_is_told(model, tmp_path, rng, values, most):
    params = params_of(model, rng, np.float32)
    again, reports = packed(tmp_path / "packed", model, params, packing=Packing(values=values), where=["mlp/"])
    assert len(reports) == 6
    for report in reports:
        want, got = params[report.path], again.read(report.path)
        assert (got[want == 0] == 0).all()
        assert np.abs(got.astype(np.float32) - want).max() <= most * np.abs(want).max()
        error = np.linalg.norm(got.astype(np.float32) - want) / np.linalg.norm(want)
        assert report.error == pytest.approx(error, rel=1e-4)
    assert again.shapes["blocks/0/mlp/up/kernel"].dtype == (jnp.bfloat16 if values == "16" else jnp.float32)
    assert again.shapes["blocks/0/attn/q/kernel"].dtype == jnp.float32


def test_the_decoder_multiplies_by_packed_kernels(model, tmp_path, rng):
    """In a scan over both blocks, against the dense weights."""
    params = {path: values / 8 for path, values in params_of(model, rng, np.float32).items()}
    again, _ = packed(tmp_path / "packed", model, params)
    kept = again.params(packed=True)
    tokens = jnp.asarray(rng.integers(0, 96, (2, 7)), jnp.int32)
    want = jax.jit(lambda p: decoder.apply(model.config, p, tokens))(trees.unflatten(params))
    runs = stacked.runs(model.config, kept)
    assert runs == (range(2),)
    scanned = jax.jit(lambda p: stacked.apply(model.config, p, tokens))(stacked.stack(kept, runs))
    np.testing.assert_allclose(scanned, want, rtol=2e-4, atol=2e-4)
    apart = stacked.unstack(stacked.stack(kept, runs))["blocks"]["1"]["attn"]["o"]["kernel"]
    np.testing.assert_array_equal(apart.dense(), params["blocks/1/attn/o/kernel"])


def test_experts(experts, tmp_path, rng):
    params = {path: values / 8 for path, values in params_of(experts, rng, np.float32).items()}
    kernel = params["blocks/0/mlp/experts/up/kernel"]
    kernel[1, ::2] = 0  # experts store different numbers of values
    again, reports = packed(tmp_path / "packed", experts, params)
    assert "blocks/0/mlp/router/kernel" not in {report.path for report in reports}
    np.testing.assert_array_equal(again.read("blocks/0/mlp/experts/up/kernel"), kernel)
    kept = again.params("blocks/0", packed=True)
    assert kept["mlp"]["experts"]["up"]["kernel"].shape == kernel.shape
    x = jnp.asarray(rng.standard_normal((1, 5, 128)), jnp.float32)
    block = jax.jit(decoder.block(experts.config, 0))
    dense = trees.unflatten({p.removeprefix("blocks/0/"): v for p, v in params.items() if p.startswith("blocks/0/")})
    np.testing.assert_allclose(block(kept, x), block(dense, x), rtol=2e-4, atol=2e-4)


def test_few_programs_serve_all_layers():
    words = {"blocks/0/q": 100, "blocks/1/q": 96, "blocks/2/q": 90, "blocks/10/q": 89, "blocks/0/k": 97, "x": 0}
    assert rooms(words) == {**words, "blocks/1/q": 100, "blocks/10/q": 90}


def damaged(folder, name, change):
    """Changes one array of a packed folder."""
    file = next(f for f in folder.glob("packed-*") if name in load_file(f))
    arrays = load_file(file)
    arrays[name] = change(arrays[name].copy())
    save_file(arrays, file)


def put(index, value):
    def change(array):
        array.reshape(-1)[index] = value
        return array

    return change


def headed(**changed):
    """The header with other values."""
    return lambda array: np.frombuffer(json.dumps({**json.loads(array.tobytes()), **changed}).encode(), np.uint8)


KERNEL = "blocks/0/mlp/up/kernel"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("bits", put(0, 0), "not those that its bits say"),
        ("rows", put(5, 3), "not those that its bits say"),
        ("tiles", put(1, 2**30), "places up to|not those that its bits say"),
        ("tiles", put(0, -1), "places up to|not those that its bits say"),
        ("words", lambda words: words[:-8], "places up to|bytes of them"),
        ("words", lambda words: np.append(words, words), "bytes of them"),
        ("rows", lambda rows: rows.astype(np.int32), "'rows' is int32; expected int16"),
        ("bits", lambda bits: bits.astype(np.float32), "."),
        ("header", headed(version=2), "newer than 1, .* update jprune"),
        ("header", headed(shape=[128, 128]), "expected"),
        ("header", headed(dtype="float16"), "expected"),
        ("header", headed(tile=[0, 64]), "."),
        ("header", headed(tile=[64, 64]), "."),
        ("header", headed(values="int8"), "values int8"),
        ("header", headed(format="tiled_csl"), "unknown|expected"),
        ("header", lambda header: header[:-9], "header is not JSON"),
    ],
)
def test_damaged_kernels(out, name, change, said):
    damaged(out, f"{KERNEL}/{name}", change)
    checkpoint = load(out)
    with pytest.raises(JpruneError, match=f"packed-00001.safetensors: {KERNEL}: .*({said}).*pack the model again$"):
        checkpoint.read(KERNEL)
    assert checkpoint.read("blocks/1/mlp/up/kernel").any()


def test_damaged_capped_and_quantised_kernels(model, tmp_path, rng):
    params = params_of(model, rng)
    params[KERNEL].reshape(16, 8, -1)[:, 4:] = 0
    packed(tmp_path / "capped", model, params, packing=Packing(format="capped:4", values="int8"), where=[KERNEL])
    for name, change, said in (
        ("bits", put(0, -1), "capped:4 with 8 values in a group of 8"),
        ("scale", put(0, 1e37), "such that weights fit bfloat16"),
        ("header", headed(capacity=9), "."),
    ):
        shutil.copytree(tmp_path / "capped", tmp_path / name)
        damaged(tmp_path / name, f"{KERNEL}/{name}", change)
        with pytest.raises(JpruneError, match=said):
            load(tmp_path / name).read(KERNEL)


def test_damaged_folders(out):
    index = json.loads((out / "packed.json").read_text())
    file = out / "packed-00001.safetensors"
    content = file.read_bytes()

    def refused(said, **changed):
        (out / "packed.json").write_text(json.dumps({**index, **changed}))
        with pytest.raises(JpruneError, match=said):
            load(out)

    def line(**changed):
        return {**index["parameters"], KERNEL: {**index["parameters"][KERNEL], **changed}}

    refused("format_version 2, expected 1; update jprune", format_version=2)
    refused("expected an object 'parameters'", parameters=[])
    refused("is outside the folder", parameters=line(file="../packed-00001.safetensors"))
    refused("packed-00009.safetensors is missing", parameters=line(file="packed-00009.safetensors"))
    refused("is no shape", parameters=line(shape=[-1, 2]))
    refused("expected dtype, file", parameters=line(format=None) | {KERNEL: {}})
    refused("as bitmap of int8; expected a kernel", parameters=line(dtype="int8"))
    refused("no array 'blocks/0/mlp/up/kernel'", parameters=line(format="dense"))
    refused("has shape .* but config.json asks for", parameters=line(shape=[128, 257]))
    refused(
        "1 tensors that LlamaForCausalLM needs are missing",
        parameters={path: stored for path, stored in index["parameters"].items() if path != KERNEL},
    )
    (out / "packed.json").write_text(json.dumps(index))
    file.write_bytes(content[:-1])
    with pytest.raises(JpruneError, match=r"truncated or damaged safetensors"):
        load(out)
    file.write_bytes(content)
    file_of = load(out)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(JpruneError, match="truncated since it was opened"):
        file_of.params()


def test_a_parameter_that_was_never_written(model, tmp_path):
    writer = Writer(tmp_path, model)
    with pytest.raises(JpruneError, match="parameters were not written"):
        writer.close()
    with pytest.raises(JpruneError, match="expected shape"):
        writer.write(KERNEL, np.zeros(3, np.float32))


def test_half_of_a_packed_model_is_removed(model, out):
    """What a killed process left beside the weights that a run writes on the way."""
    for file in Path(model.source).iterdir():
        shutil.copy(file, out)
    assert load(out).is_packed
    formats.discard(out)
    assert not load(out).is_packed
    np.testing.assert_array_equal(load(out).read(KERNEL), model.read(KERNEL))

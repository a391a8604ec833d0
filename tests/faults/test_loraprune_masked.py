"""What LoRAPrune trains is what it writes: the masked model computes as the smaller one, or the one with zeros."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jprune
from jprune import trees
from jprune.anatomy.units import units_of_blocks
from jprune.models import decoder, stacked
from jprune.pipeline.training import loraprune_model
from jprune.structured import shrink
from jprune.structured.units import positions
from jprune.train import lora
from jprune.train.quantise import dequantise_tree
from jprune.tuning import LoRAPrune
from jprune.tuning.weights import block_kernels

SHORT = {"steps": 6, "every": 2, "batch_size": 4, "micro_batch": 4, "warmup": 0, "rank": 2, "learning_rate": 0.02}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
OLMO = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}


def logits(config, params, tokens):
    return np.asarray(jax.jit(lambda p, t: decoder.apply(config, p, t))(params, jnp.asarray(tokens)))


def masked_logits(checkpoint, method, masks, frozen, trainable, tokens):
    """What the training sees, without dropout."""
    aside = {run: ({kind: tree["blocks"][run] for kind, tree in trainable.items()}, None) for run in frozen["blocks"]}
    hidden = stacked.hidden(checkpoint.config, around=lambda block: masks.around(block, 0.0))
    head = decoder.head(checkpoint.config)
    return np.asarray(jax.jit(lambda p, *args: head(p, hidden(p, *args)))(frozen, jnp.asarray(tokens), aside))


def trained(task, rng, drop):
    """Adapters as after some training, and masks without what `drop` says, by path."""
    adapters = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape).astype(np.float32), task.trainable["adapters"])
    return {"adapters": adapters, "keep": jax.tree.map(drop, task.trainable["keep"])}


@pytest.mark.parametrize(
    ("options", "base"),
    [
        ({**OLMO, "num_key_value_heads": 4}, "float32"),
        (QWEN, "int8"),
        ({"num_key_value_heads": 1}, "float32"),
    ],
    ids=["heads of their own, normed together", "grouped queries, biases, int8", "one KV head"],
)
def test_masked_is_smaller(tiny_model, learnable, rng, options, base):
    """The masked model computes what the smaller one does, that is written from the same base."""

    def change(tensors):
        for key, x in tensors.items():
            # Smaller kernels than the fixture's, which blow rounding up; biases that are not 0.
            tensors[key] = rng.standard_normal(x.shape).astype(x.dtype) if key.endswith("bias") else 0.3 * x

    checkpoint = jprune.load(tiny_model(change=change, **options))
    method = LoRAPrune(**SHORT, ratio=0.5, base_dtype=base)
    masks = method.masks(checkpoint)
    task = method.task(checkpoint, 6, masks)

    def drop(mask):
        gone = np.argsort(rng.random(mask.shape), axis=-1) < mask.shape[-1] // 2
        return np.where(gone, np.uint8(0), mask)

    state = trained(task, rng, drop)
    state["keep"]["blocks"]["0-2"]["mlp"][2] = 1  # as if protected
    state["keep"]["blocks"]["0-2"]["attention"][2] = 1
    smaller, read = masks.result(state)
    assert smaller.config.layer(0).d_ff == 28
    assert smaller.config.layer(2).d_ff == 56
    params = trees.unflatten({path: read(path) for path in smaller.shapes})
    if base == "int8":  # the base that training saw, instead of the stored one
        whole = stacked.unstack(dequantise_tree(task.frozen, jnp.float32))
        adapters, in_axes = stacked.unstack(state["adapters"]), block_kernels(checkpoint)
        merged = lora.merge(whole, adapters, alpha=method.alpha, in_axes=in_axes)
        units = units_of_blocks(checkpoint, ("attention", "mlp"))
        params = shrink(merged, positions(units, masks.kept(state["keep"])))
    want = logits(smaller.config, params, learnable[:4])
    got = masked_logits(checkpoint, method, masks, task.frozen, state, learnable[:4])
    scale = np.abs(want).max()
    np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)
    whole = masked_logits(
        checkpoint, method, masks, task.frozen, {**state, "keep": task.trainable["keep"]}, learnable[:4]
    )
    assert np.abs(whole - got).max() > 0.01 * scale


def test_masked_weights_are_zeros(tiny_model, learnable, rng):
    """Kernel and adapter go together: the masked model computes what the written one with its zeros does."""
    checkpoint = jprune.load(tiny_model())
    method = LoRAPrune(**SHORT, sparsity=0.5)
    masks = method.masks(checkpoint)
    task = method.task(checkpoint, 6, masks)
    state = trained(task, rng, lambda mask: rng.integers(0, 256, mask.shape, np.uint8) & mask)
    whole, read = masks.result(state)
    params = {path: read(path) for path in whole.shapes}
    want = logits(whole.config, trees.unflatten(params), learnable[:4])
    got = masked_logits(checkpoint, method, masks, task.frozen, state, learnable[:4])
    scale = np.abs(want).max()
    np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)
    kernel = params["blocks/1/mlp/up/kernel"]
    bits = np.unpackbits(state["keep"]["blocks"]["0-2"]["mlp"]["up"]["kernel"][1], axis=-1)[:, :56]
    np.testing.assert_array_equal(kernel == 0, bits == 0)


def test_a_sparse_run(tiny_model, learnable, tmp_path):
    """Exact counts of each output, in the dtype of the checkpoint, though the base was int8."""
    folder = tiny_model(dtype=ml_dtypes.bfloat16, torch_dtype="bfloat16")
    method = LoRAPrune(**SHORT, sparsity=0.4, base_dtype="int8")
    report = loraprune_model(folder, tmp_path / "out", method=method, data=learnable)
    after = jprune.load(tmp_path / "out")
    for path in (p for p in after.shapes if p.startswith("blocks") and p.endswith("kernel")):
        kernel = after.read(path)
        assert kernel.dtype == ml_dtypes.bfloat16
        axes = (0, 1) if "/o/" in path else (0,)
        d_in = int(np.prod([kernel.shape[axis] for axis in axes]))
        assert (np.count_nonzero(kernel == 0, axis=axes) == int(0.4 * d_in)).all(), path
    assert report.parameters == report.parameters_after
    assert report.pruned[0] == 3 * (12 * (32 + 16 + 16 + 32 + 56 + 56) + 22 * 32)
    assert after.config == jprune.load(folder).config

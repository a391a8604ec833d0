"""What a family's table must pass to exist, for every variant it names; see docs/add-a-family.md.

The truth is transformers: models of random weights are saved by it, loaded by us, and compared. What can be done with
a family once it exists, and other sizes, is in test_every_family_pruned.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import coupled_axes, trees
from jprune.checkpoints import load
from jprune.models import decoder, families
from jprune.trace import matmuls, stages

pytest.importorskip("torch")
hf = pytest.importorskip("hf_families")


@pytest.mark.parametrize("name", hf.VARIANTS)
def test_logits_and_files_are_those_of_transformers(name, tmp_path):
    hf.check(name, tmp_path)


@pytest.mark.parametrize("name", hf.FIRST)
def test_a_block_is_understood(name, tmp_path):
    """Every kernel is a matmul that `matmuls` finds, and the stages computed one by one are the block."""
    checkpoint = load(hf.save(hf.make(name), tmp_path))
    config = checkpoint.config
    params = jax.tree.map(jnp.asarray, checkpoint.params("blocks/0"))
    x = jax.random.normal(jax.random.key(0), (1, 6, config.d_model))
    f = decoder.block(config, 0)
    found = {m.path: m for m in matmuls(f, params, x, stacked=True)}
    assert set(found) == {path for path in trees.flatten(params) if path.endswith("kernel")}
    one, other = ("kv_down", "k_rope") if config.kv_rank else ("q", "k")
    assert found[f"attn/{one}/kernel"].input_id == found[f"attn/{other}/kernel"].input_id
    assert found["attn/o/kernel"].in_axes == (0, 1)
    up = found["mlp/experts/up/kernel" if config.has_experts(0) else "mlp/up/kernel"]
    before = 3 if config.has_experts(0) else 2
    assert up.stage == (0 if config.parallel else before + bool(config.kv_rank))
    cut = stages(f, params, x, stacked=True)

    @jax.jit
    def in_stages(params, x):
        carry = cut.start(x)
        for segment in cut.segments:
            carry = segment(params, carry)
        return cut.finish(carry)

    np.testing.assert_allclose(in_stages(params, x), jax.jit(f)(params, x), atol=1e-5)


@pytest.mark.parametrize("name", hf.FIRST)
def test_groups_are_found(name):
    """Heads and feed-forward channels can be left out; heads with ALiBi cannot, for their slopes go by number."""
    family, architecture, variant = hf.FIRST[name]
    config = families.config({"architectures": [architecture]} | hf.sizes(family) | variant)
    x = jax.ShapeDtypeStruct((1, 6, config.d_model), jnp.float32)
    groups = coupled_axes(decoder.block(config, 0), decoder.abstract_params(config)["blocks"]["0"], x)
    down = ("mlp/experts/down/kernel", 1) if config.has_experts(0) else ("mlp/down/kernel", 0)
    assert [g.frozen for g in groups.at(*down)] == [None]
    assert any(g.frozen is None for g in groups.at("attn/o/kernel", 0)) == (not config.alibi)

"""Coupled axes of every family of decoders, from one config.json each: what can be pruned, and masked is smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smaller import agree, random_keep

from jprune.models import decoder, families
from jprune.trace import coupled_axes

pytest.importorskip("torch")
hf = pytest.importorskip("hf_families")

FIRST = {a.removesuffix("ForCausalLM"): (f, a, f.variants[0]) for f in families.FAMILIES for a in f.architectures}


@pytest.mark.parametrize("name", FIRST)
def test_family(name, rng):
    family, architecture, variant = FIRST[name]
    options = hf.sizes(family, kv_heads=2, group=2, head_dim=8) | variant
    hf_config = hf.model(architecture, options).config.to_dict() | {"architectures": [architecture]}
    config = families.config(hf_config)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[0] if x.ndim > 1 else 1), jnp.float32),
        decoder.abstract_params(config),
    )
    tokens = jnp.asarray(rng.integers(0, hf.VOCAB, (2, 5)))

    def f(params, tokens):
        return decoder.apply(config, params, tokens)

    groups = coupled_axes(f, params, tokens)
    prunable = {(m.path, m.axis) for g in groups.prunable for m in g.members}
    assert {("embed/embedding", 1), ("blocks/0/attn/k/kernel", 0)} <= prunable
    assert any("/down/kernel" in path and axis == np.ndim(leaf(params, path)) - 2 for path, axis in prunable)
    for heads in groups.at("blocks/0/attn/k/kernel", 1):  # none where there is one head
        assert heads.frozen is None or "constant array" in heads.frozen  # ALiBi's slopes are numbers of single heads
    # The decoder's annotations want one head_dim for queries, keys and values, though its equations do not.
    head_dims = {(f"blocks/0/attn/{n}/kernel", 2) for n in "kv"}
    names = [g.name for g in groups.prunable if head_dims.isdisjoint((m.path, m.axis) for m in g.members)]
    names = [name for name in names if not name.startswith("blocks/1/")]
    agree(f, params, (tokens,), groups, random_keep(groups, rng, names), rtol=2e-3)


def leaf(params, path):
    for key in path.split("/"):
        params = params[key]
    return params

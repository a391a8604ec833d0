"""Groups: their names, members, positions and errors; our decoder's; how atoms lie on fused axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smaller import agree, random_keep

import jprune
from jprune import trees
from jprune.errors import JpruneError
from jprune.models import decoder, families
from jprune.trace import Group, Member, coupled_axes
from jprune.trace.jaxpr import trace


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def lies(group):
    """{(path, axis): [(offset, length, stride), ...]}"""
    places = {}
    for m in group.members:
        places.setdefault((m.path, m.axis), []).append((m.offset, m.length, m.stride))
    return places


def decoder_config(tiny_config, **options):
    sizes = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
    return families.config({**tiny_config, **sizes, **options})


FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_block_of_every_family(tiny_config, family):
    config = decoder_config(tiny_config, **FAMILIES[family])
    params = decoder.abstract_params(config)["blocks"]["0"]
    groups = coupled_axes(decoder.block(config, 0), params, shape(2, 7, 36))
    kv, query, channel = (
        groups.at(*x)[i] for x, i in ((("attn/k/kernel", 1), 0), (("attn/o/kernel", 0), 1), (("mlp/up/kernel", 1), 0))
    )
    assert [g.size for g in (kv, query, channel)] == [3, 2, 56]
    assert [g.frozen for g in (kv, query, channel)] == [None] * 3
    assert not any(g.renormalised for g in (kv, query, channel))
    assert all(g.proven for g in (kv, query, channel))
    heads = {("attn/q/kernel", 1): [(0, 6, 2)], ("attn/o/kernel", 0): [(0, 6, 2)]}
    heads |= {(f"attn/{n}/kernel", 1): [(0, 3, 1)] for n in "kv"}
    bias = {("attn/q/bias", 0): [(0, 6, 2)], ("attn/k/bias", 0): [(0, 3, 1)], ("attn/v/bias", 0): [(0, 3, 1)]}
    assert lies(kv) == heads | (bias if "attn/q/bias" in trees.flatten(params) else {})
    assert lies(query).keys() >= {("attn/q/kernel", 1), ("attn/o/kernel", 0)}
    assert lies(channel) == {(f"mlp/{n}/kernel", a): [(0, 56, 1)] for n, a in (("down", 0), ("gate", 1), ("up", 1))}
    assert "constant array" in groups.at("attn/k/kernel", 2)[0].frozen  # the rotary embedding's frequencies
    assert "an argument of f" in groups.at("mlp/up/kernel", 0)[0].frozen


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_of_every_family(tiny_config, family, rng):
    config = decoder_config(tiny_config, num_hidden_layers=2, **FAMILIES[family])
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[0] if x.ndim > 1 else 1), jnp.float32),
        decoder.abstract_params(config),
    )
    tokens = jnp.asarray(rng.integers(0, 96, (2, 7)))

    def f(params, tokens):
        return decoder.apply(config, params, tokens)

    groups = jprune.coupled_axes(f, params, tokens)
    (hidden,) = groups.at("embed/embedding", 1)
    assert hidden.size == 36
    assert hidden.renormalised
    assert hidden.proven
    assert "indexed by gather" in groups.at("embed/embedding", 0)[0].frozen
    places = (("attn/k/kernel", 1, 0), ("attn/o/kernel", 0, 1), ("mlp/down/kernel", 0, 0))
    names = [groups.at(f"blocks/{i}/{path}", axis)[k].name for i in (0, 1) for path, axis, k in places]
    assert len(set(names)) == 6
    assert {g.name for g in groups.prunable} > set(names)
    agree(f, params, (tokens,), groups, random_keep(groups, rng, [hidden.name, *names]))


def mlp(p, x):
    gate, up = jnp.split(x @ p["gate_up"], 2, -1)
    return (jax.nn.silu(gate) * up) @ p["down"]


def test_a_fused_kernel_has_its_unit_twice():
    groups = coupled_axes(mlp, {"gate_up": shape(4, 6), "down": shape(3, 5)}, shape(2, 4))
    assert [g.name for g in groups] == ["down[0]", "down[1]", "gate_up[0]"]
    group = groups["down[0]"]
    assert lies(group) == {("down", 0): [(0, 3, 1)], ("gate_up", 1): [(0, 6, 1)]}
    np.testing.assert_array_equal(group.positions(group.members[1], [1]), [1, 4])
    np.testing.assert_array_equal(group.positions(group.members[1], [2, 0]), [0, 2, 3, 5])
    assert groups.at("gate_up", 1) == (group,)
    assert groups.prunable == (group,)
    assert len(groups) == 3
    assert groups[0] == groups["down[0]"]
    assert groups[1:] == (groups[1], groups[2])


def test_heads_with_their_query_key_and_value_together():
    """The fused kernel of GPT-NeoX: [d, heads x (q, k, v) x head_dim]."""

    def f(p, x):
        q, k, v = jnp.split((x @ p["qkv"]).reshape(*x.shape[:2], 2, 9), 3, axis=-1)
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        return jnp.einsum("bhts,bshk->bthk", weights, v).reshape(*x.shape[:2], -1) @ p["o"]

    groups = coupled_axes(f, {"qkv": shape(4, 18), "o": shape(6, 5)}, shape(2, 3, 4))
    heads, dim = groups.at("qkv", 1)
    assert lies(heads) == {("o", 0): [(0, 6, 3)], ("qkv", 1): [(0, 18, 9)]}
    assert lies(dim) == {("o", 0): [(0, 6, 1)], ("qkv", 1): [(0, 18, 1)]}
    assert [g.name for g in groups.at("o", 0)] == ["o[0].0", "o[0].1"]


def test_segments_of_different_lengths():
    """As fused grouped-query attention: four query heads, two keys', two values'."""

    def f(p, x):
        a, b, c = jnp.split((x @ p["w"]).reshape(-1, 8, 3), [4, 6], axis=1)
        return jnp.einsum("bgrk,bgk,bgk->bgrk", a.reshape(-1, 2, 2, 3), b, c).reshape(-1, 12) @ p["o"]

    groups = coupled_axes(f, {"w": shape(5, 24), "o": shape(12, 4)}, shape(2, 5))
    kv, query, dim = groups.at("o", 0)
    assert lies(kv)["w", 1] == [(0, 12, 6), (12, 6, 3), (18, 6, 3)]
    assert lies(query)["w", 1] == [(0, 12, 3)]
    assert lies(dim)["w", 1] == [(0, 24, 1)]
    np.testing.assert_array_equal(kv.positions(kv.members[-1], [1]), [21, 22, 23])


def test_shared_zeros_and_masks_do_not_couple_layers():
    def f(p, x):
        for name in "ab":
            h = x @ p[name]
            x = x + jnp.where(h > 0, h, jnp.zeros(h.shape)) @ p[name + "_out"]
        return x

    params = {"a": shape(3, 4), "a_out": shape(4, 3), "b": shape(3, 4), "b_out": shape(4, 3)}
    assert [g.name for g in coupled_axes(f, params, shape(2, 3)).prunable] == ["a[1]", "b[1]"]


def test_what_f_does_not_read_is_frozen():
    groups = coupled_axes(lambda p, x: x @ p["a"], {"a": shape(3, 4), "b": shape(5)}, shape(2, 3))
    assert groups["b[0]"].frozen == "f does not read it"
    assert not groups.prunable


def test_bad_input(rng):
    params = {"gate_up": jnp.ones((4, 6)), "down": jnp.ones((3, 5))}
    groups = coupled_axes(mlp, params, jnp.ones((2, 4)))
    with pytest.raises(JpruneError, match=r"no group 'up'; there are down\[0\], down\[1\]"):
        _ = groups["up"]
    with pytest.raises(JpruneError, match="no parameter 'down' with an axis 2"):
        groups.at("down", 2)
    with pytest.raises(JpruneError, match=r"expected a bool mask \[3\], got bool\[2\]"):
        groups.masked({"down[0]": np.ones(2, bool)})
    with pytest.raises(JpruneError, match="no unit would remain of 3"):
        groups.masked({"down[0]": np.zeros(3, bool)})
    with pytest.raises(JpruneError, match=r"down\[1\] cannot be pruned: axis 1 of an output of f"):
        groups.masked({"down[1]": np.arange(5) > 0})
    groups.masked({"down[1]": np.ones(5, bool)})
    with pytest.raises(JpruneError, match="units 0 to 2, got 0 to 3"):
        groups[0].positions(groups[0].members[0], [0, 3])
    with pytest.raises(JpruneError, match="expected parameters with the tree that was traced"):
        groups.masked({})({"gate_up": params["gate_up"]}, jnp.ones((2, 4)))
    with pytest.raises(JpruneError, match="length 0"):
        Member(path="x", axis=0, length=0, whole=1)
    assert isinstance(groups[0], Group)


def test_a_function_that_cannot_be_traced():
    def f(p, x):
        if x.sum() > 0:
            return p
        return x

    with pytest.raises(JpruneError, match=r"test_axes.py:\d+ \(f: if x.sum\(\) > 0:\) with TracerBoolConversionError"):
        coupled_axes(f, jnp.ones(3), jnp.ones(3))
    with pytest.raises(JpruneError, match=r"test_axes.py:\d+ .* with TypeError: "):
        trace(lambda p, x: p @ x, jnp.ones((2, 3)), jnp.ones((2, 3)))

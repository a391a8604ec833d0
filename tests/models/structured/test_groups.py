"""Units out of groups: which groups become what, what one unit holds, and what is kept of it."""

import dataclasses

import handmade_groups
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handmade_groups import group

from jprune import trees
from jprune.errors import JpruneError
from jprune.structured import shrink
from jprune.structured.kinds import block_units, hidden_units
from jprune.structured.units import merge
from jprune.trace import ParamMatmul

HEADS, KV, HEAD_DIM, D, FF = 6, 2, 4, 10, 7


def abstract(shapes):
    return trees.unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()})


def listed(in_axes):
    return [ParamMatmul(path=path, in_axes=axes, out_axes=(), stage=0, input_id=0) for path, axes in in_axes.items()]


def units_of(heads=HEADS, kv=KV, *, kinds=("attention", "mlp"), change=lambda groups: groups):
    groups, shapes, in_axes = handmade_groups.block(heads, kv, HEAD_DIM, D, FF)
    return {u.kind: u for u in block_units(change(groups), abstract(shapes), listed(in_axes), kinds=kinds)}, shapes


def test_a_decoder_block():
    units, shapes = units_of(kinds=("attention", "query", "mlp"))
    attention, query, mlp = (units[kind] for kind in ("attention", "query", "mlp"))
    assert [u.count for u in units.values()] == [KV, HEADS, FF]
    assert [u.sets for u in units.values()] == [1, KV, 1]
    assert [u.width for u in units.values()] == [HEAD_DIM, HEAD_DIM, 1]
    # In the order of the matmuls; what is none comes last.
    assert [m.path.split("/")[-2] for m in attention.members] == ["q", "k", "v", "o", "q"]
    # q, o and q's bias of 3 query heads; k and v.
    assert attention.parameters == 3 * HEAD_DIM * (2 * D + 1) + 2 * HEAD_DIM * D
    assert query.parameters == HEAD_DIM * (2 * D + 1)
    assert mlp.parameters == 3 * D + 1
    before = abstract(shapes)
    for u, kept in ((attention, [1]), (query, [0, 2, 3, 4]), (mlp, [0, 1, 6])):
        after = shrink(before, u.keep(kept))
        removed = sum(x.size for x in jax.tree.leaves(before)) - sum(x.size for x in jax.tree.leaves(after))
        assert removed == (u.count - len(kept)) * u.parameters


def test_what_a_kv_head_keeps():
    units, _ = units_of(kinds=("attention", "query"))
    assert jax.tree.map(np.ndarray.tolist, units["attention"].keep([1])) == {
        "attn/q/kernel": {1: [3, 4, 5]},
        "attn/k/kernel": {1: [1]},
        "attn/v/kernel": {1: [1]},
        "attn/o/kernel": {0: [3, 4, 5]},
        "attn/q/bias": {0: [3, 4, 5]},
    }
    ragged = units["query"].keep(np.array([0, 2, 3, 4]))
    assert {path: axes[0 if "o" in path or "bias" in path else 1].tolist() for path, axes in ragged.items()} == {
        "attn/q/kernel": [0, 2, 3, 4],
        "attn/o/kernel": [0, 2, 3, 4],
        "attn/q/bias": [0, 2, 3, 4],
    }
    both = merge([units["attention"].keep([1]), units["query"].keep([0, 2, 3, 4])])
    assert both["attn/q/kernel"][1].tolist() == [3, 4]
    with pytest.raises(JpruneError, match=r"query: equally many units must stay in each of its 2 sets, got \[0 1 3\]"):
        units["query"].keep([0, 1, 3])
    with pytest.raises(JpruneError, match="attention: positions 0 to 2 do not lie along axis 0"):
        units["attention"].keep([0, 2])


def test_multi_head_and_multi_query():
    units, _ = units_of(4, 4)
    assert (units["attention"].count, units["attention"].width) == (4, HEAD_DIM)
    with pytest.raises(JpruneError, match="expected a prunable group of the kind 'query', found none"):
        units_of(4, 4, kinds=("query",))
    # One KV head, which has to stay: units are its query heads, whichever way they are asked for.
    for kind in ("attention", "query"):
        units, _ = units_of(4, 1, kinds=(kind,))
        assert (units[kind].count, units[kind].sets) == (4, 1)
        assert {m.path for m in units[kind].members} == {"attn/q/kernel", "attn/o/kernel", "attn/q/bias"}


def test_dimensions_that_are_not_turned_are_no_heads():
    """With rotary embeddings on part of each head, the other dimensions of q and k can go together (and of v and o)."""
    rest = group(
        "D", HEAD_DIM - 2, ("attn/q/kernel", 2, HEAD_DIM - 2, 1, 2), ("attn/k/kernel", 2, HEAD_DIM - 2, 1, 2)
    )  # fmt: skip
    for heads, kv in ((HEADS, KV), (4, 4)):
        units, _ = units_of(heads, kv, change=lambda groups: [*groups, rest])
        plain, _ = units_of(heads, kv)
        assert {kind: u.members[0].path for kind, u in units.items()} == {
            "attention": "attn/q/kernel",
            "mlp": plain["mlp"].members[0].path,
        }
        for kind, u in units.items():
            assert (u.name, u.count, u.width) == (kind, plain[kind].count, plain[kind].width)


def test_at():
    units, _ = units_of()
    placed = units["attention"].at("blocks/13")
    assert (placed.name, placed.layer, placed.kind) == ("blocks/13/attention", 13, "attention")
    assert set(placed.keep([0])) == {f"blocks/13/{path}" for path in units["attention"].keep([0])}
    assert units["mlp"].at("model/decoder", layer=2).layer == 2
    assert units["mlp"].at("decoder").layer is None


def test_reshape_style():
    """Kernels of two axes, q, k and v fused, gate and up fused: segments, and three atoms on one axis."""
    h, kv, d = 6, 2, 4
    fused = (h + 2 * kv) * d
    groups = [
        group("K", kv, *(("qkv", 1, n * d, n // kv * d, at) for n, at in ((h, 0), (kv, h * d), (kv, h * d + kv * d))),
              ("o", 0, h * d, h // kv * d)),
        group("G", h // kv, ("qkv", 1, h * d, d), ("o", 0, h * d, d)),
        group("D", d, ("qkv", 1, h * d), ("qkv", 1, kv * d, 1, h * d), frozen="rotary"),
        group("V", d, ("qkv", 1, kv * d, 1, h * d + kv * d), ("o", 0, h * d)),
        group("F", 5, ("gate_up", 1, 5), ("gate_up", 1, 5, 1, 5), ("down", 0, 5)),
        group("R", 10, ("qkv", 0, 10), ("o", 1, 10), ("gate_up", 0, 10), ("down", 1, 10), frozen="argument"),
    ]  # fmt: skip
    shapes = {"qkv": (10, fused), "o": (h * d, 10), "gate_up": (10, 10), "down": (5, 10)}
    matmuls = listed(dict.fromkeys(shapes, (0,)))
    attention, query, mlp = block_units(groups, abstract(shapes), matmuls, kinds=("attention", "query", "mlp"))
    assert (attention.count, attention.width, query.count, query.sets) == (kv, d, h, kv)
    kept = attention.keep([1])
    expected = [*range(12, 24), *range(28, 32), *range(36, 40)]
    assert kept["qkv"][1].tolist() == expected
    assert kept["o"][0].tolist() == list(range(12, 24))
    # Query head 1 of each KV head; keys and values stay.
    assert query.keep([1, 4])["qkv"][1].tolist() == [*range(4, 8), *range(16, 20), *range(24, 40)]
    assert mlp.keep([0, 4])["gate_up"][1].tolist() == [0, 4, 5, 9]
    assert attention.parameters == (16 + 4) * 10 + 12 * 10
    assert mlp.parameters == 30


def test_experts():
    """A group through stacked kernels and a router; channels of all experts are feed-forward channels."""
    groups = [
        group("E", 3, ("up", 0, 3), ("down", 0, 3), ("router", 1, 3)),
        group("F", 5, ("up", 2, 5), ("down", 1, 5)),
        group("R", 4, ("up", 1, 4), ("down", 2, 4), ("router", 0, 4), frozen="argument"),
    ]
    shapes = {"up": (3, 4, 5), "down": (3, 5, 4), "router": (4, 3)}
    expert, channel = block_units(groups, abstract(shapes), listed({"router": (0,)}), kinds=("expert", "mlp"))
    assert (expert.kind, expert.count, expert.parameters) == ("expert", 3, 2 * 20 + 4)
    assert (channel.kind, channel.count, channel.parameters) == ("mlp", 5, 3 * 8)
    frozen = [dataclasses.replace(groups[0], frozen="top_k at moe.py:3"), *groups[1:]]
    with pytest.raises(JpruneError, match=r"'expert', found none; E is frozen: top_k at moe\.py:3"):
        block_units(frozen, abstract(shapes), listed({"router": (0,)}), kinds=("expert",))


def test_frozen():
    def freeze(groups):
        return [dataclasses.replace(g, frozen="reshape at m.py:9") if g.size == KV else g for g in groups]

    with pytest.raises(JpruneError, match=r"'attention', found none; attn/k/kernel:1 is frozen: reshape at m\.py:9"):
        units_of(change=freeze)
    assert set(units_of(change=freeze, kinds=("mlp",))[0]) == {"mlp"}
    with pytest.raises(JpruneError, match=r"'mlp', found none; .*it is an axis of an argument"):
        units_of(change=lambda groups: [g for g in groups if g.size != FF])
    with pytest.raises(JpruneError, match="attention, query, mlp and expert, got 'hidden'"):
        units_of(kinds=("hidden",))


def test_two_of_a_kind():
    groups, shapes, in_axes = handmade_groups.block(HEADS, KV, HEAD_DIM, D, FF)
    groups.append(group("second", 3, ("up2", 1, 3), ("down2", 0, 3)))
    shapes |= {"up2": (D, 3), "down2": (3, D)}
    in_axes |= {"up2": (0,), "down2": (0,)}
    units = block_units(groups, abstract(shapes), listed(in_axes), kinds=("mlp",))
    assert [u.name for u in units] == ["mlp/mlp/down/kernel:0", "mlp/second"]


def test_hidden():
    groups, shapes, in_axes = handmade_groups.block(HEADS, KV, HEAD_DIM, D, FF)
    with pytest.raises(JpruneError, match=r"hidden dimension is frozen: .*: it is an axis of an argument"):
        hidden_units(groups, abstract(shapes), listed(in_axes))
    groups = [dataclasses.replace(g, frozen=None) if g.size == D else g for g in groups]
    hidden = hidden_units(groups, abstract(shapes), listed(in_axes))
    assert (hidden.kind, hidden.count, hidden.layer, hidden.width) == ("hidden", D, None, 1)
    size = sum(np.prod(shape) for shape in shapes.values())
    small = shrink(abstract(shapes), hidden.keep(list(range(1, D))))
    assert sum(x.size for x in jax.tree.leaves(small)) == size - hidden.parameters
    with pytest.raises(JpruneError, match="expected a hidden dimension, found none"):
        hidden_units([], abstract(shapes), listed(in_axes))

"""Counts as the authors' program has them, ranking, sizes, targets, and what is refused."""

import dataclasses

import handmade_groups
import jax
import jax.numpy as jnp
import numpy as np
import numpy_llm_pruner
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune import trees
from jprune.errors import JpruneError
from jprune.structured import shrink, surgery
from jprune.structured.kinds import block_units
from jprune.structured.selection import Target, fit, select, unprotected
from jprune.structured.units import UnitMember, Units, positions
from jprune.trace import ParamMatmul


def units(name, count, *, width=1, kind="mlp", sets=1, layer=None):
    """Units in one kernel [count, width], which is all that selection asks for."""
    member = UnitMember(path=name, axis=0, shape=(count, width), side=(0, 1), units=np.arange(count))
    return Units(kind=kind, name=name, layer=layer, count=count, sets=sets, members=(member,))


def stay(found):
    return {name: kept.tolist() for name, kept in found.items()}


@settings(deadline=None, max_examples=100)
# Of a ratio next to nothing the program's floats make nothing.
@given(st.integers(1, 40), st.integers(1, 12), st.just(0.0) | st.floats(1e-6, 0.95), st.data())
def test_counts_of_the_program(count, width, ratio, data):
    """Also in steps: a share of what there was at first, whatever is left."""
    before = count + data.draw(st.integers(0, 10))
    one = units("u", count, width=width)
    pruned = numpy_llm_pruner.pruned_per_group(count, before, ratio, width)
    scores = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    if pruned >= count:
        with pytest.raises(JpruneError, match="u: nothing of its"):
            select([one], {"u": np.array(scores, float)}, ratio, initial={"u": before})
        return
    kept = select([one], {"u": np.array(scores, float)}, ratio, initial={"u": before})["u"]
    gone = sorted(range(count), key=lambda i: (scores[i], i))[:pruned]
    assert kept.tolist() == [i for i in range(count) if i not in gone]


def test_heads_round_up_and_channels_down():
    head, channel = units("head", 32, width=128), units("channel", 11008)
    scores = {"head": np.arange(32.0), "channel": np.arange(11008.0)}
    kept = select([head, channel], scores, 0.2)
    assert {name: len(k) for name, k in kept.items()} == {"head": 26, "channel": 8806}
    assert kept["head"].tolist() == list(range(6, 32))


def test_sizes_of_one_kind_are_apart():
    """Uniform ones are equal to those of their size alone; multiples are of one set's channels."""
    wide = [units(f"{i}/mlp", 20, layer=i) for i in range(2)]
    experts = [dataclasses.replace(units(f"{i}/experts", 18, sets=3, layer=i), size="d_expert") for i in range(2)]
    scores = {u.name: np.arange(u.count, dtype=float) for u in (*wide, *experts)}
    kept = select([*wide, *experts], scores, 0.4, uniform=True, round_to=4)
    assert {name: len(k) for name, k in kept.items()} == {"0/mlp": 12, "1/mlp": 12, "0/experts": 12, "1/experts": 12}
    with pytest.raises(JpruneError, match="6 channels hold no multiple of 7"):
        select(experts, scores, 0.4, round_to=7)


def test_query_heads_go_evenly():
    """3 of 4 stay in each of 2 sets, each set's own lowest goes."""
    query = units("query", 8, width=4, kind="query", sets=2)
    scores = {"query": np.array([3.0, 1, 2, 4, 9, 9, 9, 8])}
    for ranking in ("local", "global"):
        assert stay(select([query], scores, 0.25, ranking=ranking)) == {"query": [0, 2, 3, 4, 5, 6]}


def test_global():
    a, b = units("a", 4), units("b", 4)
    scores = {"a": np.array([1.0, 2, 9, 9]), "b": np.array([3.0, 8, 8, 8])}
    assert stay(select([a, b], scores, 0.375, ranking="global")) == {"a": [2, 3], "b": [1, 2, 3]}
    assert stay(select([a, b], scores, 0.375)) == {"a": [2, 3], "b": [2, 3]}
    # Ties: exactly as many as asked for go, the first ones.
    same = {"a": np.ones(4), "b": np.ones(4)}
    assert stay(select([a, b], same, 0.25, ranking="global")) == {"a": [2, 3], "b": [0, 1, 2, 3]}
    # Two steps of 2 units: 4 of the 8 that there were.
    left = {"a": units("a", 3), "b": units("b", 3)}
    again = select(
        list(left.values()), {"a": np.arange(3.0), "b": np.arange(3.0) + 9}, 0.5, ranking="global",
        initial={"a": 4, "b": 4},
    )  # fmt: skip
    assert stay(again) == {"a": [2], "b": [0, 1, 2]}
    with pytest.raises(JpruneError, match=r"a: nothing of its 4 units would stay at a ratio of 0\.5"):
        select([a, b], {"a": np.zeros(4), "b": np.ones(4)}, 0.5, ranking="global")


@pytest.mark.parametrize("normalise", ["mean", "max", "sum"])
def test_normalised_across_kinds(normalise):
    """Heads a thousand times more important than channels: with their own mean taken out, both lose one."""
    head, channel = units("head", 4, kind="attention", width=4), units("channel", 4)
    scores = {"head": np.array([1.0, 8, 8, 8]) * 1000, "channel": np.array([1.0, 8, 8, 8])}
    assert stay(select([head, channel], scores, 0.25, ranking="global"))["head"] == [0, 1, 2, 3]
    found = stay(select([head, channel], scores, 0.25, ranking="global", normalise=normalise))
    assert found == {"head": [1, 2, 3], "channel": [1, 2, 3]}
    zero = {"head": np.zeros(4), "channel": np.arange(4.0)}
    assert len(select([head, channel], zero, 0.1, ranking="global", normalise=normalise)["head"]) == 3


def test_uniform():
    """Globally 2 + 4 of 4 + 4 would stay: three each; each keeps its own best. Kinds do not mix."""
    a, b, head = units("a", 4), units("b", 4), units("head", 2, kind="attention", width=4)
    scores = {"a": np.array([0.0, 1, 2, 3]), "b": np.array([9.0, 7, 8, 6]), "head": np.array([99.0, 99])}
    found = select([a, b, head], scores, 0.2, ranking="global", uniform=True)
    assert stay(found) == {"a": [1, 2, 3], "b": [0, 1, 2], "head": [0, 1]}
    # Layers that were pruned before: no more than the smallest has.
    small = units("b", 2)
    found = select([a, small], {"a": np.arange(4.0), "b": np.arange(2.0)}, 0.1, initial={"a": 4, "b": 4}, uniform=True)
    assert stay(found) == {"a": [2, 3], "b": [0, 1]}


@pytest.mark.parametrize(("ratio", "size"), [(0.0, 100), (0.1, 96), (0.3, 64), (0.45, 64), (0.6, 32), (0.9, 32)])
def test_round_to(ratio, size):
    wide, head = units("wide", 100), units("head", 5, width=8, kind="attention")
    found = select([wide, head], {"wide": np.arange(100.0), "head": np.arange(5.0)}, ratio, round_to=32)
    assert len(found["wide"]) == size
    assert len(found["head"]) == -(-int(40 * (1 - ratio)) // 8)


def test_refusals():
    narrow = units("blocks/3/mlp", 16)
    scores = {"blocks/3/mlp": np.arange(16.0)}
    with pytest.raises(JpruneError, match="blocks/3/mlp: 16 channels hold no multiple of 64; lower `round_to`"):
        select([narrow], scores, 0.5, round_to=64)
    with pytest.raises(JpruneError, match=r"blocks/3/mlp: nothing of its 16 units would stay at a ratio of 0\.99"):
        select([narrow], scores, 0.99)
    with pytest.raises(JpruneError, match=r"must lie in \[0, 1\), got 1.0"):
        select([narrow], scores, 1.0)
    with pytest.raises(JpruneError, match=r"expected 16 scores, got an array of shape \(4,\)"):
        select([narrow], {"blocks/3/mlp": np.arange(4.0)}, 0.5)
    with pytest.raises(JpruneError, match="scores must be finite"):
        select([narrow], {"blocks/3/mlp": np.full(16, np.nan)}, 0.5)


def test_protected():
    all_units = [units(f"blocks/{i}", 4, layer=i) for i in range(8)]
    assert [u.layer for u in unprotected(all_units, 8, first=4, last=2)] == [4, 5]
    hidden = units("hidden", 4)
    assert unprotected([hidden], 8, first=4, last=4) == (hidden,)
    with pytest.raises(JpruneError, match="the first 4 and last 4 of 8 layers are protected, which leaves none"):
        unprotected(all_units, 8, first=4, last=4)


def model(layers=3, heads=6, kv=2, head_dim=4, d_model=10, d_ff=30):
    """Units of some blocks and the abstract parameters of all."""
    groups, shapes, in_axes = handmade_groups.block(heads, kv, head_dim, d_model, d_ff)
    block = trees.unflatten({p: jax.ShapeDtypeStruct(shape, jnp.float32) for p, shape in shapes.items()})
    matmuls = [ParamMatmul(path=p, in_axes=axes, out_axes=(), stage=0, input_id=0) for p, axes in in_axes.items()]
    found = block_units(groups, block, matmuls)
    return [u.at(f"blocks/{i}") for i in range(layers) for u in found], {
        "blocks": {str(i): block for i in range(layers)}
    }


@settings(deadline=None, max_examples=8)
@given(st.floats(0.05, 0.5), st.sampled_from(["local", "global"]), st.booleans(), st.sampled_from([1, 4]))
def test_the_target_is_met_exactly_as_counted(share, ranking, uniform, round_to):
    """What the search counts is what shrink leaves; it is at most the target, and one unit more would be too many."""
    found, params = model()
    rng = np.random.default_rng(0)
    scores = {u.name: rng.random(u.count) for u in found}
    whole = surgery.size(params)

    def choose(ratio):
        return select(
            found, scores, ratio, ranking=ranking, uniform=uniform, round_to=round_to,
            normalise="mean" if ranking == "global" else "none",
        )  # fmt: skip

    def count(kept):
        return surgery.size(params, positions(found, kept))

    kept = Target(share=share).reach(choose, count, whole)
    small = shrink(params, positions(found, kept))
    left = sum(x.size for x in jax.tree.leaves(small))
    assert left == count(kept) <= whole * (1 - share)
    assert count(fit(choose, count, left)) == left
    for ratio in np.linspace(0, share, 4):
        assert not left < count(choose(ratio)) <= whole * (1 - share)


def test_unreachable_targets():
    found, params = model()
    scores = {u.name: np.arange(float(u.count)) for u in found}
    whole = surgery.size(params)

    def choose(ratio):
        return select(found, scores, ratio)

    def count(kept):
        return surgery.size(params, positions(found, kept))

    with pytest.raises(
        JpruneError, match=rf"expected 500 parameters at most, but units can only go down to \d+ of {whole}"
    ):
        Target(parameters=500).reach(choose, count, whole)
    with pytest.raises(JpruneError, match=f"the model has {whole} parameters, no more than the {whole} asked for"):
        Target(parameters=whole).reach(choose, count, whole)


def test_targets():
    for bad in ({}, {"units": 0.1, "share": 0.1}):
        with pytest.raises(JpruneError, match="give one target"):
            Target(**bad)
    for bad in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(JpruneError, match="between 0 and 1"):
            Target(units=bad)
    with pytest.raises(JpruneError, match="must be positive, got 0"):
        Target(parameters=0)
    assert Target(units=0.3).step(1, 3, 1000).units == pytest.approx(0.1)
    assert [Target(share=0.4).step(i, 4, 1000).parameters for i in (1, 2, 3, 4)] == [900, 800, 700, 600]
    assert Target(parameters=601).step(4, 4, 1000) == Target(parameters=601)
    assert dataclasses.asdict(Target(units=0.3).step(3, 3, 7)) == dataclasses.asdict(Target(units=0.3))

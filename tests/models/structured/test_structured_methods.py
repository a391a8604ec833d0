"""The methods' configs, and the whole way from gradients to a smaller decoder, on a tiny one."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import trees
from jprune.anatomy.units import units_of_block
from jprune.errors import JpruneError
from jprune.models import decoder
from jprune.models.config import DecoderConfig
from jprune.structured import DropLayers, LLMPruner, block_units, hidden_units, importance, shrink
from jprune.structured.llm_pruner import Importance
from jprune.structured.surgery import size
from jprune.structured.units import positions
from jprune.trace import coupled_axes, matmuls

CONFIG = DecoderConfig(
    architecture="Qwen3ForCausalLM", vocab=23, d_model=20, layers=2, heads=6, kv_heads=3, head_dim=4, d_ff=14,
    context=64, qkv_bias=True, mlp_bias=True, qk_norm=True,
)  # fmt: skip
BLOCK = decoder.block(CONFIG, 0)
X = jax.ShapeDtypeStruct((1, 6, CONFIG.d_model), jnp.float32)


def units_of(params, kinds):
    """Units of all blocks of a tiny model; equal blocks are traced once for all tests."""
    return [
        u.at(f"blocks/{i}")
        for i, block in params["blocks"].items()
        for u in units_of_block(BLOCK, block, CONFIG.d_model, kinds)
    ]


def random_params(rng, scale=0.3):
    shapes = trees.flatten(decoder.abstract_params(CONFIG))
    return trees.unflatten({p: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype) for p, s in shapes.items()})


def forward(params, tokens):
    return decoder.apply(CONFIG, params, tokens)


TOKENS = jnp.arange(6)[None] * 3 % 23


@pytest.mark.parametrize(
    ("heads", "criterion"), [("kv_head", "param_first"), ("query_head", "param_mix"), ("query_head", "random")]
)
def test_pruned_is_masked(rng, heads, criterion):
    """From gradients to a smaller block, which is the block with the units' output kernels zeroed: nothing else was
    touched."""
    method = LLMPruner(importance=criterion, heads=heads)
    params = random_params(rng)["blocks"]["0"]
    units = units_of_block(BLOCK, params, CONFIG.d_model, method.kinds)
    given = ()
    if method.needs in ("gradients", "squares"):
        examples = jnp.asarray(rng.normal(size=(3, 6, CONFIG.d_model)), jnp.float32)
        squared = jax.jit(lambda p, x: importance.mean_and_square(lambda p, x: jnp.mean(BLOCK(p, x[None]) ** 2), p, x))
        given = squared(params, examples)
    scores = {
        u.name: method.score(u, importance.vectors(u, criterion, params, *given) if given else None) for u in units
    }
    kept = method.select(units, scores, 0.4)
    keep = positions(units, kept)
    small = shrink(params, keep)
    assert size(small) == size(params) - sum((u.count - len(kept[u.name])) * u.parameters for u in units)
    masked = trees.flatten(params)
    for path in ("attn/o/kernel", "mlp/down/kernel"):
        stay = keep[path][0]
        masked[path] = jnp.zeros_like(masked[path]).at[stay].set(masked[path][stay])
    x = jnp.asarray(rng.normal(size=X.shape), jnp.float32)
    run = jax.jit(BLOCK)
    np.testing.assert_allclose(run(small, x), run(trees.unflatten(masked), x), rtol=1e-4, atol=1e-5)


def mixture(params, x):
    """Every token goes through every expert, weighted by a sigmoid."""
    hidden = jax.nn.relu(jnp.einsum("td,edf->tef", x, params["up"]["kernel"]))
    weights = jax.nn.sigmoid(x @ params["router"]["kernel"])
    return jnp.einsum("te,tef,efd->td", weights, hidden, params["down"]["kernel"])


def test_experts_of_a_real_trace(rng):
    shapes = {"router": (8, 3), "up": (3, 8, 5), "down": (3, 5, 8)}
    params = {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    args = mixture, params, x
    expert, channel = block_units(coupled_axes(*args), params, matmuls(*args), kinds=("expert", "mlp"))
    assert (expert.kind, expert.count, expert.parameters) == ("expert", 3, 8 + 2 * 40)
    assert (channel.kind, channel.count, channel.parameters) == ("mlp", 5, 2 * 3 * 8)
    for u, path, gone in ((expert, "down", np.s_[1]), (channel, "down", np.s_[:, 1])):
        small = shrink(params, u.keep([i for i in range(u.count) if i != 1]))
        masked = params | {path: {"kernel": params[path]["kernel"].at[gone].set(0)}}
        np.testing.assert_allclose(mixture(small, x), mixture(masked, x), rtol=1e-4, atol=1e-5)
        found = importance.combine(u, importance.vectors(u, "l1", params))
        lost = sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params)) - sum(
            jnp.abs(leaf).sum() for leaf in jax.tree.leaves(small)
        )
        np.testing.assert_allclose(found[1], lost, rtol=1e-4)


def test_channels_of_each_expert(rng):
    """Each a unit by itself: its score and its size by hand, what stays of all, and their numbers afterwards."""
    shapes = {"router": (8, 3), "up": (3, 8, 5), "down": (3, 5, 8)}
    params = {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name, shape in shapes.items()}
    args = mixture, params, jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    (units,) = (u.of_each() for u in block_units(coupled_axes(*args), params, matmuls(*args), kinds=("mlp",)))
    assert (units.count, units.sets, units.parameters) == (15, 3, 16)
    up, down = (np.abs(params[name]["kernel"]) for name in ("up", "down"))
    scores = importance.combine(units, importance.vectors(units, "l1", params))
    np.testing.assert_allclose(scores, [up[e, :, c].sum() + down[e, c].sum() for e in range(3) for c in range(5)], 1e-5)
    kept = LLMPruner(heads="none").select([units], {units.name: scores}, 0.4)[units.name]
    keep = units.keep(kept)
    own = np.sort(np.argsort(scores.reshape(3, 5), axis=1)[:, 2:], axis=1)
    np.testing.assert_array_equal(keep["up/kernel"][2], own)
    small = shrink(params, keep)
    np.testing.assert_array_equal(
        small["down"]["kernel"], np.stack([params["down"]["kernel"][e, own[e]] for e in range(3)])
    )
    after = units.after(kept, keep)
    np.testing.assert_allclose(
        importance.combine(after, importance.vectors(after, "l1", small)), scores[kept], rtol=1e-5
    )
    with pytest.raises(JpruneError, match="equally many units must stay in each of its 3 sets"):
        units.keep(kept[1:])


def test_units_after_surgery_are_those_of_the_smaller_model(rng):
    """Numbered anew, they are what a trace of the smaller block finds."""
    params = random_params(rng)
    units = units_of(params, ("attention", "mlp"))
    kept = {u.name: np.sort(rng.permutation(u.count)[: 2 + (u.kind == "mlp")]) for u in units}
    keep = positions(units, kept)
    small = shrink(params, keep)
    for old, new in zip(units, units_of(small, ("attention", "mlp"))):
        after = old.after(kept[old.name], keep)
        assert (after.name, after.count, after.parameters) == (new.name, new.count, new.parameters)
        for a, b in zip(after.members, new.members):
            assert (a.path, a.axis, a.shape, a.side) == (b.path, b.axis, b.shape, b.side)
            np.testing.assert_array_equal(a.units, b.units)
    # Of a layer down to one KV head, which a trace would not call one.
    one = units[0].after([1], positions(units, {units[0].name: [1]}))
    assert (one.count, [m.shape[m.axis] for m in one.members if m.path.endswith("k/kernel")]) == (1, [1])


def test_hidden_dimensions(rng):
    """Channel mode: one group through the whole model, traced from tokens to logits."""
    method = LLMPruner(mode="channel", importance="l1", round_to=8)
    params = random_params(rng)
    args = forward, params, TOKENS
    units = hidden_units(coupled_axes(*args), params, matmuls(*args))
    assert method.prunable([units], CONFIG.layers) == (units,)
    kept = method.select([units], {"hidden": method.score(units, importance.vectors(units, "l1", params))}, 0.3)
    assert len(kept["hidden"]) == 16
    small = shrink(params, units.keep(kept["hidden"]))
    assert small["embed"]["embedding"].shape == (23, 16)
    assert jax.eval_shape(forward, small, TOKENS).shape == (1, 6, 23)
    # Kernels, norms and the embedding, each weight once.
    expected = np.zeros(CONFIG.d_model)
    for path, x in trees.flatten(params).items():
        axes = [i for i, n in enumerate(x.shape) if n == CONFIG.d_model]
        if axes and not path.endswith("bias"):
            expected += np.abs(np.asarray(x, np.float64)).sum(tuple(i for i in range(x.ndim) if i != axes[0]))
    found = importance.combine(units, importance.vectors(units, "l1", params), "sum")
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_the_configs_ask_for():
    assert {c: LLMPruner(importance=c).needs for c in get_args(Importance)} == {
        "param_first": "gradients",
        "param_second": "squares",
        "param_mix": "squares",
        "vectorize": "gradients",
        "l1": "weights",
        "l2": "weights",
        "random": "nothing",
    }
    assert get_args(importance.Criterion) == tuple(importance.CRITERIA)
    assert LLMPruner().kinds == ("attention", "mlp")
    assert LLMPruner(heads="query_head").kinds == ("query", "mlp")
    assert LLMPruner(mode="channel").kinds == ("hidden",)
    by_layer = LLMPruner(mode="layer", layers=5)
    assert (by_layer.kinds, by_layer.needs, by_layer.layers_left(7)) == ((), "nothing", (0, 1, 2, 3, 4))
    with pytest.raises(JpruneError, match="the first 5 layers are to stay of 5: nothing to prune"):
        by_layer.layers_left(5)
    assert jprune.LLMPruner is LLMPruner
    assert jprune.DropLayers is DropLayers


def test_protected_layers(rng):
    """By default the first 4 and last 2, and none where all layers are to have one size."""
    (mlp,) = [u for u in units_of(random_params(rng), ("mlp",)) if u.layer == 0]
    units = [dataclasses.replace(mlp, layer=i) for i in range(8)]

    def layers(**options):
        return [u.layer for u in LLMPruner(**options).prunable(units, 8)]

    assert layers() == [4, 5]
    assert layers(protect_last=0) == [4, 5, 6, 7]
    assert layers(uniform=True) == list(range(8))
    assert layers(uniform=True, protect_first=1) == list(range(1, 8))


def test_ranked_together(rng):
    """--global lets the channels of one layer go, and not a share of each."""
    (mlp,) = [u for u in units_of(random_params(rng), ("mlp",)) if u.layer == 0]
    units = [dataclasses.replace(mlp, name=name) for name in "ab"]
    scores = {"a": np.arange(14.0), "b": np.arange(14.0) + 100}
    kept = LLMPruner(globally=True).select(units, scores, 0.25)
    assert {name: len(k) for name, k in kept.items()} == {"a": 7, "b": 14}
    assert {len(k) for k in LLMPruner().select(units, scores, 0.25).values()} == {10}


def test_magnitude_takes_means_and_taylor_sums(rng):
    params = random_params(rng)
    (mlp,) = [u for u in units_of(params, ("mlp",)) if u.layer == 0]
    collected = importance.vectors(mlp, "l2", params)
    mean = LLMPruner(importance="l2").score(mlp, collected)
    np.testing.assert_allclose(mean, importance.combine(mlp, collected, "sum") / 3)
    np.testing.assert_allclose(LLMPruner().score(mlp, collected), importance.combine(mlp, collected, "sum"))
    np.testing.assert_allclose(
        LLMPruner(reduction="max").score(mlp, collected), importance.combine(mlp, collected, "max")
    )
    random = LLMPruner(importance="random")
    assert not np.array_equal(random.score(mlp), random.score(mlp, step=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_to": 0}, "round_to must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"examples": 0}, "examples must be at least 1"),
        ({"protect_last": -1}, "protect_last must not be negative"),
        ({"sequence_length": 1}, "a text needs 2 tokens"),
        ({"seed": -1}, "seed must not be negative"),
        ({"mode": "layer"}, "give layers"),
        ({"layers": 3}, "give layers"),
        ({"mode": "layer", "layers": 0}, "at least one layer must stay"),
        ({"normalise": "mean"}, "goes with `globally`"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(JpruneError, match=message):
        LLMPruner(**options)


def test_drop_layers():
    influences = np.array([0.5, 0.1, 0.3, 0.1, 0.2])
    assert DropLayers(drop=2).layers_left(5, influences) == (0, 2, 4)
    assert DropLayers(drop=1).layers_left(5, influences) == (0, 2, 3, 4)
    with pytest.raises(JpruneError, match="cannot drop 5 of 5 layers"):
        DropLayers(drop=5).layers_left(5, influences)
    with pytest.raises(JpruneError, match="must be finite"):
        DropLayers(drop=1).layers_left(2, np.array([0.1, np.nan]))
    for bad in ({"drop": 0}, {"drop": 1, "examples": 0}, {"drop": 1, "sequence_length": 0}):
        with pytest.raises(JpruneError, match="must be at least 1, got 0"):
            DropLayers(**bad)
    assert dataclasses.asdict(DropLayers(drop=3))["drop"] == 3

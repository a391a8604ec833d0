"""Stacked blocks: the same trees back, the same outputs, one block compiled for many layers."""

import dataclasses

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.errors import JpruneError
from jprune.models import decoder, stacked
from jprune.models.config import DecoderConfig
from jprune.train import lora, remat

CONFIG = DecoderConfig(
    architecture="LlamaForCausalLM", vocab=20, d_model=8, layers=5, heads=4, kv_heads=2, head_dim=2, d_ff=12,
    context=64, qkv_bias=True,
)  # fmt: skip


def params_of(config, getkey):
    """Kernels large enough that layers matter."""
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, decoder.init_params(config, getkey()))


def narrow(params, layer, d_ff):
    """The feed-forward part of one layer made smaller, as pruning does."""
    leaves = trees.flatten(params)
    for name, axis in (("gate", 1), ("up", 1), ("down", 0)):
        path = f"blocks/{layer}/mlp/{name}/kernel"
        leaves[path] = jax.lax.slice_in_dim(leaves[path], 0, d_ff, axis=axis)
    return trees.unflatten(leaves)


def equal(a, b):
    a, b = trees.flatten(a), trees.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


CASES = {
    "uniform": (CONFIG, {}, ["0-4"]),
    "one small": (CONFIG, {2: 6}, ["0-1", "2", "3-4"]),
    "two alike": (CONFIG, {1: 4, 2: 4, 4: 6}, ["0", "1-2", "3", "4"]),
    "windows": (dataclasses.replace(CONFIG, windows=(None, None, 3, 3, None)), {}, ["0-1", "2-3", "4"]),
}


@pytest.mark.parametrize("case", CASES)
def test_stacked_is_the_decoder(getkey, rng, case):
    config, sizes, names = CASES[case]
    params = params_of(config, getkey)
    for layer, d_ff in sizes.items():
        params = narrow(params, layer, d_ff)
    runs = stacked.runs(config, params)
    assert [stacked.name(run) for run in runs] == names
    assert [i for run in runs for i in run] == list(range(5))
    both = stacked.stack(params, runs)
    assert list(both["blocks"]) == names
    equal(stacked.unstack(both), params)
    tokens = jnp.asarray(rng.integers(0, 20, (2, 9)))
    want = compiled.apply(config, params, tokens)
    np.testing.assert_allclose(compiled.apply_stacked(config, both, tokens), want, atol=2e-5)
    np.testing.assert_allclose(compiled.apply_stacked(config, params, tokens), want, atol=2e-5)

    if case != "windows":  # the richest; gradients take long to compile
        return

    def loss(f, p):
        return jnp.sum(jnp.sin(f(config, p, tokens)))

    got = stacked.unstack(jax.jit(jax.grad(lambda p: loss(stacked.apply, p)))(both))
    want = jax.jit(jax.grad(lambda p: loss(decoder.apply, p)))(params)
    for path, g in trees.flatten(want).items():
        np.testing.assert_allclose(trees.flatten(got)[path], g, rtol=1e-3, atol=1e-4, err_msg=path)


def test_trees_along(getkey):
    """Masks and adapters stack along; a layer without an adapter is not in a run with those that have one."""
    params = params_of(CONFIG, getkey)
    masks = {path: x > 0 for path, x in trees.flatten(params).items() if path.endswith("kernel")}
    adapters = {f"blocks/{i}/attn/q/kernel/a": jnp.full((8, 2), i) for i in (0, 1, 3)}
    runs = stacked.runs(CONFIG, params, masks, adapters)
    assert [stacked.name(run) for run in runs] == ["0-1", "2", "3", "4"]
    both = stacked.stack(masks, runs)
    assert both["blocks"]["0-1"]["mlp"]["up"]["kernel"].shape == (2, 8, 12)
    equal(stacked.unstack(both), masks)
    np.testing.assert_array_equal(stacked.stack(adapters, runs)["blocks"]["0-1"]["attn"]["q"]["kernel"]["a"][1], 1)
    with pytest.raises(JpruneError, match="blocks/0-4/attn/q/kernel/a: expected a leaf in each of 5 layers"):
        stacked.stack(adapters, stacked.runs(CONFIG, params))


def test_numpy_and_abstract_trees(getkey):
    params = params_of(CONFIG, getkey)
    host = jax.tree.map(np.asarray, params)
    runs = stacked.runs(CONFIG, host)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(stacked.stack(host, runs)))
    abstract = decoder.abstract_params(CONFIG)
    there = stacked.stack(abstract, stacked.runs(CONFIG, abstract))
    assert there["blocks"]["0-4"]["attn"]["q"]["bias"].shape == (5, 4, 2)
    assert trees.flatten(stacked.unstack(there)) == trees.flatten(abstract)


def test_every_output_and_aside(getkey, rng):
    """`every` gives each block's output; `around` sees each layer's own part of `aside`."""
    params = narrow(params_of(CONFIG, getkey), 2, 6)
    runs = stacked.runs(CONFIG, params)
    tokens = jnp.asarray(rng.integers(0, 20, (2, 7)))
    aside = {"0-1": jnp.array([0.0, 1.0]), "2": jnp.array(2.0), "3-4": jnp.array([3.0, 4.0])}

    def around(block):
        return lambda params, aside, x: block(params, x) + aside

    run = stacked.hidden(CONFIG, around=around, every=True)
    x, every = run(stacked.stack(params, runs), tokens, aside)
    want = compiled.embed(CONFIG)(params, tokens)
    assert every.shape == (5, *want.shape)
    for i in range(5):
        want = compiled.block(CONFIG, i)(params["blocks"][str(i)], want) + i
        np.testing.assert_allclose(every[i], want, atol=1e-5)
    np.testing.assert_array_equal(x, every[-1])


def test_products_beside_adapters_are_kept_where_they_fit(getkey, rng, monkeypatch):
    """The same gradients either way; kept, the products that a block's backward pass reads are not computed twice."""
    config = dataclasses.replace(CONFIG, layers=1, windows=())
    params, tokens = params_of(config, getkey), jnp.asarray(rng.integers(0, 20, (2, 16)))

    def around(block):  # the block as `lora.adapt` sees it: read from its jaxpr
        return lambda params, aside, x: lora.adapt(block, alpha=1)(params, aside, None, x)

    adapters = lora.init(params["blocks"]["0"], {"mlp/up/kernel": (0,)}, rank=2, key=getkey())

    def loss(adapters):
        return jnp.sum(stacked.hidden(config, around=around, frozen=True)(params, tokens, {"0": adapters}) ** 2)

    results = []
    for room in (1 << 30, 0):  # half of the parameters of so small a model are less than its products take
        monkeypatch.setattr(remat, "KEEP_BYTES", room)
        step = jax.jit(jax.grad(lambda x: loss(x))).lower(adapters).compile()
        results.append((step(adapters), step.cost_analysis()["flops"]))
    (kept, few), (again, many) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), kept, again)
    block = params["blocks"]["0"]
    twice = [block["attn"][name]["kernel"].size for name in "qkvo"] + [
        block["mlp"][x]["kernel"].size for x in ("gate", "up")
    ]
    assert many - few >= 2 * tokens.size * sum(twice)


def test_a_deep_model_is_one_block_to_the_compiler(getkey):
    def size(layers):
        config = dataclasses.replace(CONFIG, layers=layers, windows=())
        params = decoder.abstract_params(config)
        params = stacked.stack(params, stacked.runs(config, params))
        tokens = jax.ShapeDtypeStruct((2, 9), jnp.int32)
        return len(jax.jit(lambda p, t: stacked.apply(config, p, t)).lower(params, tokens).as_text())

    assert size(30) < 1.1 * size(3)

"""The decoder's structure: sizes from the arrays, shared functions, the NNX face. Its values: test_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jprune import trees
from jprune.models import decoder
from jprune.models.config import DecoderConfig


def apply(config, params, tokens):
    return jax.jit(lambda p, t: decoder.apply(config, p, t))(params, tokens)


def tiny(**options) -> DecoderConfig:
    sizes = {"vocab": 50, "d_model": 24, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_ff": 32}
    return DecoderConfig(architecture="LlamaForCausalLM", context=64, **sizes | options)


def test_nnx_module_is_the_same_model_and_its_state_is_our_tree(getkey):
    config = tiny(tied=True, qk_norm=True, qkv_bias=True)
    params = decoder.init_params(config, getkey())
    model = decoder.Decoder(config, params)
    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_allclose(nnx.jit(lambda m, t: m(t))(model, tokens), apply(config, params, tokens), atol=1e-6)
    _, state = nnx.split(model)
    assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure(params)
    gradients = nnx.eval_shape(nnx.grad(lambda m: m(tokens).sum()), model)
    assert set(trees.flatten(gradients)) == set(trees.flatten(params))


def test_abstract_and_initial_parameters_agree(getkey):
    config = tiny(mlp_bias=True, o_bias=True)
    abstract = decoder.abstract_params(config, jnp.bfloat16)
    params = decoder.init_params(config, getkey(), jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    out = jax.eval_shape(lambda p, t: decoder.apply(config, p, t), abstract, jax.ShapeDtypeStruct((2, 5), jnp.int32))
    assert (out.shape, out.dtype) == ((2, 5, 50), jnp.float32)


def test_equal_layers_share_one_function():
    config = tiny(windows=(None, 4, None))
    assert decoder.block(config, 0) is decoder.block(config, 2)
    assert decoder.block(config, 0) is not decoder.block(config, 1)
    assert decoder.embed(config) is decoder.embed(config)
    assert decoder.head(config) is decoder.head(tiny())


def test_sizes_are_read_from_the_arrays_layer_by_layer(getkey):
    """Removing heads and channels whose output kernels are zero changes nothing but the shapes."""
    config = tiny()
    params = decoder.init_params(config, getkey())
    layer = params["blocks"]["1"]
    layer["attn"]["o"]["kernel"] = layer["attn"]["o"]["kernel"].at[2:].set(0)  # the second key/value head's group
    layer["mlp"]["down"]["kernel"] = layer["mlp"]["down"]["kernel"].at[:5].set(0)
    tokens = jnp.arange(12).reshape(2, 6)
    before = apply(config, params, tokens)
    for name, axis, kept in (("q", 1, 2), ("k", 1, 1), ("v", 1, 1), ("o", 0, 2)):
        kernel = layer["attn"][name]["kernel"]
        layer["attn"][name]["kernel"] = jax.lax.slice_in_dim(kernel, 0, kept, axis=axis)
    for name, axis in (("gate", 1), ("up", 1), ("down", 0)):
        layer["mlp"][name]["kernel"] = jax.lax.slice_in_dim(layer["mlp"][name]["kernel"], 5, None, axis=axis)
    np.testing.assert_allclose(apply(config, params, tokens), before, atol=1e-6)


def test_each_kernel_meets_its_input_in_one_dot_general(getkey):
    config = tiny()
    params = decoder.init_params(config, getkey())["blocks"]["0"]
    jaxpr = jax.make_jaxpr(decoder.block(config, 0))(params, jnp.zeros((2, 6, 24))).jaxpr
    names = dict(zip(jaxpr.invars, trees.flatten(params)))
    products = [names[v] for e in jaxpr.eqns if e.primitive.name == "dot_general" for v in e.invars if v in names]
    assert sorted(products) == sorted(path for path in trees.flatten(params) if path.endswith("kernel"))


def test_positions_turn_queries_and_keys(getkey):
    """Only differences of positions matter, and positions that are given are used."""
    config = tiny()
    params = decoder.init_params(config, getkey())["blocks"]["0"]
    for name in ("q", "k", "v", "o"):
        params["attn"][name]["kernel"] *= 10  # else attention is nearly uniform, and nearly nothing
    x = jax.random.normal(getkey(), (2, 6, 24))
    run = jax.jit(decoder.block(config, 0))
    shifted = run(params, x, jnp.stack([jnp.arange(6), jnp.arange(6) + 40]))
    np.testing.assert_allclose(shifted, run(params, x), atol=1e-5)
    stretched = run(params, x, 3 * jnp.arange(6))
    assert np.abs(np.asarray(stretched - run(params, x))).max() > 1e-2

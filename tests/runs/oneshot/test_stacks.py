"""Experts: stacks of kernels are found, observe what they are sent, and are pruned one by one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import devices, trees
from jprune.anatomy.kernels import Kernel, choose_kernels
from jprune.errors import JpruneError
from jprune.methods import Magnitude, SparseGPT, Wanda
from jprune.models import decoder, families
from jprune.patterns import NM, Unstructured
from jprune.pipeline.forecast import programs
from jprune.pipeline.forecast.programs import Spec, zero_parts
from jprune.pipeline.job import Job
from jprune.pipeline.oneshot.experts import solve_stacks
from jprune.pipeline.oneshot.run import _few_tokens
from jprune.pipeline.oneshot.solve import solve
from jprune.pipeline.recipe import Recipe
from jprune.statistics import Gram, Moments, SquaredNorm, Stacked
from jprune.trace import matmuls, observe, stages

EXPERTS = 3
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 20,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 1,
}


@pytest.fixture
def block(getkey):
    config = families.config(MIXTRAL)
    params = decoder.init_params(config, getkey())["blocks"]["0"]
    params = jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, params)
    return decoder.block(config, 0), params, jax.random.normal(getkey(), (2, 7, 12))


def test_stacks_are_listed_where_asked_for(block):
    found = {m.path: m for m in matmuls(*block, stacked=True)}
    up = found["mlp/experts/up/kernel"]
    assert (up.batch_axes, up.in_axes, up.out_axes) == ((0,), (1,), (2,))
    assert up.input_id == found["mlp/experts/gate/kernel"].input_id
    assert found.keys() == {m.path for m in matmuls(*block)}
    assert {m.path for m in matmuls(*block, stacked=False)} == {path for path in found if "experts" not in path}


def test_a_stack_with_its_batch_axis_last(rng):
    def f(params, x):
        return jnp.einsum("ted,dfe->etf", x, params["w"])

    params = {"w": jnp.asarray(rng.normal(size=(4, 5, 3)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(6, 3, 4)), jnp.float32)
    (found,) = matmuls(f, params, x, stacked=True)
    assert (found.batch_axes, found.in_axes, found.out_axes) == ((2,), (0,), (1,))
    gram = observe(f, Gram, stacked=True)(params, x)[1]["w"]
    np.testing.assert_allclose(gram.each.total, np.einsum("ted,tef->edf", x, x), rtol=1e-5)


def test_an_expert_observes_the_tokens_it_is_sent(block):
    """By hand: route with NumPy, and gather the rows of every expert."""
    f, params, x = block
    seen = jax.jit(observe(f, Gram, stacked=True))(params, x)[1]
    cut = stages(f, params, x, stacked=True)
    carry = cut.start(x)
    for segment in cut.segments[:3]:  # up to the router's input
        carry = jax.jit(segment)(params, carry)
    (rows,) = cut.inputs(2, carry).values()
    rows = np.asarray(rows)
    expert = np.argmax(rows @ np.asarray(params["mlp"]["router"]["kernel"]), axis=1)
    p = params["mlp"]["experts"]
    for e in range(EXPERTS):
        mine = rows[expert == e]
        own = seen["mlp/experts/gate/kernel"].of(e)
        assert own.tokens == len(mine)
        np.testing.assert_allclose(own.total, mine.T @ mine, atol=1e-4)
        gate, up = (mine @ np.asarray(p[name]["kernel"][e]) for name in ("gate", "up"))
        hidden = gate / (1 + np.exp(-gate)) * up
        np.testing.assert_allclose(seen["mlp/experts/down/kernel"].of(e).total, hidden.T @ hidden, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("per_token", [1, 2])
def test_a_run_sees_what_is_sent_and_computes_no_more(per_token, getkey):
    """The programs of a run, against the form in which every expert computes every token."""
    config = families.config(MIXTRAL | {"num_experts_per_tok": per_token})
    params = decoder.init_params(config, getkey())["blocks"]["0"]
    params = jax.tree.map(lambda x: np.asarray(x) * 10 if x.ndim > 1 else x, params)
    f, x = decoder.block(config, 0), jax.random.normal(getkey(), (2, 7, 12))
    y, seen = jax.jit(observe(f, Gram, where="kernel"))(params, x)
    shapes = tuple((path, leaf.shape, leaf.dtype) for path, leaf in trees.flatten(params).items())
    spec = Spec(f, shapes, frozenset(seen), (x.shape, x.dtype), devices.one_device())
    carry = spec.start((x,))
    for stage, own in enumerate(spec.stages().matmuls):
        read = {m.path: m.input_id for m in own}
        known = {i: zero_parts(Gram, 1, spec.sharding, *_sizes(seen[path]))() for path, i in read.items()}
        carry, found = programs.observe(spec, stage, stage, True)((params,), carry, known)
        for path, i in read.items():
            for a, b in zip(jax.tree.leaves(found[i]), jax.tree.leaves(seen[path]), strict=True):
                np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))
            if "experts" in path:
                assert spec.stages().sorted_inputs(stage, carry)[i].rows.shape[0] == 14 * per_token
    (out,) = programs.finish(spec, stage + 1)((params,), carry)
    np.testing.assert_allclose(out, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max()))


def _sizes(statistic):
    """Inputs, and kernels if it is of a stack."""
    return (statistic.d_in, len(statistic.tokens)) if isinstance(statistic, Stacked) else (statistic.d_in,)


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()])
def test_every_kernel_of_a_stack_is_pruned_by_itself(method, rng):
    values = jnp.asarray(rng.normal(size=(3, 8, 6)), jnp.float32)
    kernel = Kernel(
        path="w", unit="u", shape=(3, 8, 6), in_axes=(1,), batch_axes=(0,), stage=0, pattern=Unstructured(0.5)
    )
    x = jnp.asarray(rng.normal(size=(3, 20, 8)), jnp.float32).at[1, 4:].set(0)  # expert 1 sees four tokens
    statistic = method.statistic and Stacked.zeros(method.statistic, 8, 3).update(x)

    def together(matrices, own, number):
        return method.together(matrices, own, {"w": kernel.pattern}, {})

    results, few = solve_stacks({"w": kernel}, {"w": values}, statistic, together, least=5)
    pruned, loss = results["w"]
    assert few == ((1,) if statistic else ())
    assert (loss is None) == (not isinstance(method, SparseGPT))
    for e in range(3):
        own = None if statistic is None else method.statistic.zeros(8).update(x[e])
        reference = method if e != 1 else Magnitude()
        pattern = Unstructured(0.5, "output" if isinstance(method, Wanda) else None)
        expected = reference(values[e], own, pattern)
        if not (e == 1 and isinstance(method, SparseGPT)):  # its block-wise mask is no plain magnitude mask
            np.testing.assert_allclose(pruned[e], expected.kernel, atol=1e-5)
        assert np.mean(np.asarray(pruned[e]) == 0) == 0.5
    none_few = solve_stacks({"w": kernel}, {"w": values}, statistic, together, least=0)[1]
    assert none_few == ()


def test_zeros_of_a_stack_are_kept(rng):
    """Of each expert's kernel half go, the zeros that it has among them; SparseGPT would revive some."""
    x = np.stack([rng.normal(size=(40, 8)) @ rng.normal(size=(8, 8)) for _ in range(EXPERTS)])
    values = np.where(rng.random((EXPERTS, 8, 6)) < 0.3, 0, rng.normal(size=(EXPERTS, 8, 6))).astype(np.float32)
    kernel = Kernel(
        path="w", unit="u", shape=values.shape, in_axes=(1,), batch_axes=(0,), stage=0, pattern=Unstructured(0.5)
    )

    def pruned(**options):
        statistic = Stacked.zeros(Gram, 8, EXPERTS).update(jnp.asarray(x, jnp.float32))
        recipe = Recipe(pattern=kernel.pattern, expert_tokens=1, **options)
        job = Job(checkpoint=None, method=SparseGPT(block_size=4, refit=2), recipe=recipe, kernels=(kernel,))
        return np.asarray(solve(job, {"w": kernel}, {"w": jnp.asarray(values)}, statistic)[0]["w"])

    kept, anew = pruned(keep_zeros=True), pruned()
    assert ((kept == 0).sum(axis=(1, 2)) == 24).all()
    assert (kept[values == 0] == 0).all()
    assert (anew[values == 0] != 0).any()


@pytest.mark.parametrize(("least", "few"), [(0, (1,)), (1, (1,)), (41, (0, 1, 2))])
def test_an_expert_that_no_token_reached_is_pruned_by_magnitude_and_named(rng, least, few):
    x = jnp.asarray(rng.normal(size=(EXPERTS, 40, 8)), jnp.float32).at[1].set(0)
    values = jnp.asarray(rng.normal(size=(EXPERTS, 8, 6)), jnp.float32)
    kernel = Kernel(
        path="w", unit="u", shape=values.shape, in_axes=(1,), batch_axes=(0,), stage=0, pattern=Unstructured(0.5)
    )
    job = Job(
        checkpoint=None,
        method=Wanda(),
        recipe=Recipe(pattern=kernel.pattern, expert_tokens=least),
        kernels=(kernel,),
    )
    pruned, reports = solve(job, {"w": kernel}, {"w": values}, Stacked.zeros(SquaredNorm, 8, EXPERTS).update(x))
    assert reports[0].few_tokens == few
    expected = Magnitude()(values[1], None, Unstructured(0.5, "output")).kernel
    np.testing.assert_array_equal(pruned["w"][1], expected)
    assert "1 experts of w saw fewer than 1 " in _few_tokens(job, [{"path": "w", "few_tokens": [1]}])[0] or least > 1


def test_the_batch_axis_may_be_anywhere(rng):
    values = jnp.asarray(rng.normal(size=(8, 6, 3)), jnp.float32)
    kernel = Kernel(
        path="w", unit="u", shape=(8, 6, 3), in_axes=(0,), batch_axes=(2,), stage=0, pattern=Unstructured(0.5)
    )

    def halves(matrices, own, number):
        return Magnitude().together(matrices, own, {"w": kernel.pattern}, {})

    pruned, _ = solve_stacks({"w": kernel}, {"w": values}, None, halves, least=0)[0]["w"]
    for e in range(3):
        expected = Magnitude()(values[..., e], None, Unstructured(0.5)).kernel
        np.testing.assert_array_equal(pruned[..., e], expected)


def test_what_adds_up_of_a_stack(rng):
    x = jnp.asarray(rng.normal(size=(2, 10, 4)), jnp.float32)
    whole = Stacked.zeros(SquaredNorm, 4, 2).update(x)
    halves = Stacked.zeros(SquaredNorm, 4, 2).update(x[:, :3]).merge(Stacked.zeros(SquaredNorm, 4, 2).update(x[:, 3:]))
    np.testing.assert_allclose(whole.each.total, halves.each.total, rtol=1e-6)
    np.testing.assert_array_equal(halves.tokens, [10, 10])
    assert whole.d_in == 4
    assert dataclasses.replace(whole.of(1)).tokens == 10
    with pytest.raises(JpruneError, match="Moments would count the zeros"):
        Stacked.zeros(Moments, 4, 2)


def test_routers_are_left_alone_unless_asked_for(tmp_path, tiny_experts):
    checkpoint = jprune.load(tiny_experts)
    tokens = np.random.default_rng(0).integers(0, 20, (4, 16)).astype(np.int32)
    plain = jprune.prune_model(
        checkpoint, tmp_path / "a", method=Wanda(), pattern=Unstructured(0.5), calibration=tokens, expert_tokens=60
    )
    assert {k.path.split("/", 2)[2] for k in plain.kernels} == {
        *(f"attn/{name}/kernel" for name in "qkvo"),
        *(f"mlp/experts/{name}/kernel" for name in ("gate", "up", "down")),
    }
    few = {k.path: k.few_tokens for k in plain.kernels if k.few_tokens}
    assert set(few) == {f"blocks/0/mlp/experts/{name}/kernel" for name in ("gate", "up", "down")}
    assert any("saw fewer than 60" in notice for notice in plain.notices)
    asked = jprune.prune_model(
        checkpoint, tmp_path / "b", method=Magnitude(), pattern=Unstructured(0.5), where=("router",)
    )
    assert [k.path for k in asked.kernels] == ["blocks/0/mlp/router/kernel"]


SINGLE = ("experts/1/(gate|up)", "experts/2/down")


@pytest.mark.parametrize("method", [Magnitude(), SparseGPT()])
def test_single_experts_are_pruned_as_if_they_were_alone(method, tmp_path, tiny_experts):
    """By the dense block's statistics, since nothing before them is pruned; everything else stays to the bit."""
    whole = jprune.load(tiny_experts)
    tokens = np.random.default_rng(0).integers(0, 20, (4, 16)).astype(np.int32)
    options = {"method": method, "pattern": Unstructured(0.33), "where": SINGLE, "calibration": tokens}
    plan = jprune.plan_run(whole, **options)
    report = jprune.prune_model(whole, tmp_path / "out", expert_tokens=0, **options)
    params = jax.tree.map(jnp.asarray, whole.params())

    def seen_by(params, tokens):
        x = decoder.embed(whole.config)(params, tokens)
        return observe(decoder.block(whole.config, 0), Gram, stacked=True)(params["blocks"]["0"], x)[1]

    seen = jax.jit(seen_by)(params, tokens)
    out = jprune.load(tmp_path / "out")
    chosen = {f"blocks/0/mlp/experts/{name}/kernel": (e,) for name, e in (("gate", 1), ("up", 1), ("down", 2))}
    assert {k.path: k.experts for k in report.kernels} == chosen
    for path in whole.shapes:
        before, after = whole.read(path), out.read(path)
        for e in chosen.get(path, ()):
            gram = method.statistic and seen[path.removeprefix("blocks/0/")].of(e)
            expected = method(jnp.asarray(before[e]), gram, options["pattern"]).kernel
            np.testing.assert_allclose(after[e], expected, atol=1e-4, err_msg=path)
            before, after = np.delete(before, e, 0), np.delete(after, e, 0)
        assert after.tobytes() == before.tobytes(), path
    zeros = math.floor(120 * 0.33)
    assert [(k.zeros, k.size) for k in report.kernels] == [(zeros, 120)] * 3
    assert [(k.zeros, k.chosen) for k in plan.kernels] == [(zeros, k.experts) for k in report.kernels]


def test_experts_have_names_of_their_own(tiny_experts):
    checkpoint = jprune.load(tiny_experts)
    up, down = (f"blocks/0/mlp/experts/{name}/kernel" for name in ("up", "down"))

    def chosen(where=(), skip=()):
        return {k.path: k.chosen for k in choose_kernels(checkpoint, Unstructured(0.5), where=where, skip=skip)}

    assert chosen(["experts/1/up", "down"], ["/2/down", "mlp/experts/0/"]) == {up: (1,), down: (1,)}
    assert chosen(["experts/[0-2]/up"]) == chosen(["experts/up", "experts/1/up"]) == {up: None}
    assert chosen(skip=["experts/1/"]) == {path: (0, 2) if "experts" in path else None for path in chosen()}
    with pytest.raises(JpruneError, match="matches none of the 9 kernels; near misses: blocks/0/mlp/experts/up/kernel"):
        chosen(["experts/3/up/kernel"])
    with pytest.raises(JpruneError, match="leave no kernel"):
        chosen(["experts/1/"], ["experts"])


def test_the_part_of_a_stack_that_is_pruned(rng):
    values = rng.normal(size=(8, 3, 6, 2))
    kernel = Kernel(
        path="w",
        unit="u",
        shape=values.shape,
        in_axes=(0,),
        batch_axes=(3, 1),
        stage=0,
        pattern=NM(2, 4),
        chosen=(1, 5),
    )
    expected = np.stack([values[:, 1, :, 0], values[:, 2, :, 1]])
    np.testing.assert_array_equal(kernel.part(values), expected)
    np.testing.assert_array_equal(kernel.part(jnp.asarray(values)), jnp.asarray(expected))
    assert (kernel.size, kernel.whole, kernel.d_out, kernel.zeros) == (expected.size, values.size, 6, 48)
    joined = np.asarray(kernel.joined(jnp.asarray(values), jnp.zeros(values.shape)))
    np.testing.assert_allclose(kernel.part(joined), expected, rtol=1e-6)
    assert np.count_nonzero(joined) == expected.size
    assert [kernel.takes(i) for i in range(6)] == [False, True, False, False, False, True]


@pytest.fixture
def tiny_experts(tmp_path):
    """A small Mixtral on disk, one tensor an expert."""
    import json

    from safetensors.numpy import save_file

    config = families.config(MIXTRAL)
    params = trees.flatten(decoder.init_params(config, jax.random.key(0)))
    tensors = {}
    for path, e in families.table(config).items():
        for index, key in enumerate(e.keys):
            tensors[key] = np.zeros(e.shape, np.float32)
            e.write_to(index, 10 * np.asarray(params[path]), tensors[key])
    folder = tmp_path / "mixtral"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(MIXTRAL | {"architectures": ["MixtralForCausalLM"]}))
    return folder

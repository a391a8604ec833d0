"""Structured runs: the units that go are those a whole-model calculation would choose, and the result is the masked
model."""

import json

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest

from jprune import trees
from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.models import decoder
from jprune.pipeline.shrink.plan import plan_shrink
from jprune.pipeline.shrink.run import shrink_model
from jprune.statistics import Gram
from jprune.structured import DropLayers, LLMPruner
from jprune.structured.selection import Target
from jprune.trace.observe import observe

OPEN = {"protect_first": 0, "protect_last": 0, "compensate": False}
FIRST = {**OPEN, "importance": "param_first"}
TOKENS = np.random.default_rng(7).integers(0, 96, (4, 16), dtype=np.int32)


@pytest.fixture
def checkpoint(tiny_model):
    return load(tiny_model())


def logits(checkpoint, params=None):
    params = jax.tree.map(jnp.asarray, checkpoint.params() if params is None else params)
    return compiled.apply(checkpoint.config, params, jnp.asarray(TOKENS))


def whole_gradient(checkpoint, tokens):
    """The gradient of the mean loss by all parameters at once."""

    def loss(params):
        out = jax.nn.log_softmax(compiled.apply(checkpoint.config, params, jnp.asarray(tokens))[:, :-1])
        return -jnp.mean(jnp.take_along_axis(out, jnp.asarray(tokens)[:, 1:, None], axis=-1))

    return trees.flatten(jax.grad(loss)(jax.tree.map(jnp.asarray, checkpoint.params())))


def test_removes_what_matters_least(checkpoint, tmp_path):
    """Against |w g| summed by hand from the gradient of the whole model; the result computes as the masked model."""
    report = shrink_model(
        checkpoint, tmp_path / "out", method=LLMPruner(**FIRST), target=Target(units=0.5), calibration=TOKENS
    )
    smaller = load(tmp_path / "out")
    w = {path: np.asarray(x) for path, x in trees.flatten(checkpoint.params()).items()}
    g = whole_gradient(checkpoint, TOKENS)
    said = {path: np.abs(w[path] * np.asarray(g[path])) for path in w}
    for i in range(3):
        q, k, v, o = (said[f"blocks/{i}/attn/{name}/kernel"] for name in "qkvo")
        heads = (
            q.reshape(32, 2, 2, 8).sum((0, 2, 3))
            + k.sum((0, 2))
            + v.sum((0, 2))
            + o.reshape(2, 2, 8, 32).sum((1, 2, 3))
        )
        gate, up, down = (said[f"blocks/{i}/mlp/{name}/kernel"] for name in ("gate", "up", "down"))
        channels = gate.sum(0) + up.sum(0) + down.sum(1)
        head = int(np.argmax(heads))
        stay = np.sort(np.argsort(channels)[28:])
        kept = trees.flatten(smaller.params(f"blocks/{i}"))
        np.testing.assert_array_equal(kept["attn/k/kernel"], w[f"blocks/{i}/attn/k/kernel"][:, [head]])
        np.testing.assert_array_equal(kept["attn/q/kernel"], w[f"blocks/{i}/attn/q/kernel"][:, 2 * head : 2 * head + 2])
        np.testing.assert_array_equal(kept["mlp/up/kernel"], w[f"blocks/{i}/mlp/up/kernel"][:, stay])
        # Masking what writes into the residual stream is enough.
        gone = np.setdiff1d(range(56), stay)
        w[f"blocks/{i}/mlp/down/kernel"] = w[f"blocks/{i}/mlp/down/kernel"].copy()
        w[f"blocks/{i}/mlp/down/kernel"][gone] = 0
        w[f"blocks/{i}/attn/o/kernel"] = w[f"blocks/{i}/attn/o/kernel"].copy()
        w[f"blocks/{i}/attn/o/kernel"][2 - 2 * head : 4 - 2 * head] = 0
    np.testing.assert_allclose(logits(smaller), logits(checkpoint, trees.unflatten(w)), atol=1e-4)
    assert report.parameters == (
        sum(x.size for x in w.values()),
        sum(x.size for x in trees.flatten(smaller.params()).values()),
    )
    assert report.sizes == ({"d_model": 32, "heads": 2, "kv_heads": 1, "d_ff": 28},) * 3
    record = json.loads((tmp_path / "out" / "jprune.json").read_text())
    assert record["parameters"]["after"] == report.parameters[1]
    assert record["format"] == "hf"
    assert record["recipe"]["ratio"] == 0.5


def test_refits_what_is_left(checkpoint, tmp_path):
    """Against least squares in float64, kernel by kernel, by what reaches each in the model that is smaller so far."""
    tokens = np.random.default_rng(1).integers(0, 96, (8, 24), dtype=np.int32)
    method = LLMPruner(**{**OPEN, "compensate": True}, importance="l2", compensation_damping=1e-3)
    target = Target(units=0.5)
    report = shrink_model(checkpoint, tmp_path / "out", method=method, target=target, calibration=tokens)
    smaller = load(tmp_path / "out")
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    x = compiled.embed(checkpoint.config)(params, jnp.asarray(tokens))
    block = compiled.block(checkpoint.config, 0)
    observed = jax.jit(observe(decoder.block(checkpoint.config, 0), Gram))
    for i in range(3):
        leaves, left = (trees.flatten(c.params(f"blocks/{i}")) for c in (checkpoint, smaller))
        for path, feeds, axis in (("attn/o/kernel", "attn/q/kernel", 1), ("mlp/down/kernel", "mlp/up/kernel", 1)):
            before, after = (np.moveaxis(tree[feeds], axis, 0) for tree in (leaves, left))
            stay = np.array([any(np.array_equal(unit, kept) for kept in after) for unit in before])
            assert stay.sum() == len(before) / 2
            gram = np.asarray(observed(trees.unflatten(leaves), x)[1][path].total, np.float64)
            kernel = leaves[path].reshape(len(gram), 32).astype(np.float64)
            rows = np.repeat(stay, len(gram) // len(stay))
            damping = 1e-3 * np.mean(np.diag(gram)[rows])
            inner = gram[np.ix_(rows, rows)] + damping * np.eye(rows.sum())
            expected = np.linalg.solve(inner, gram[rows] @ kernel + damping * kernel[rows])
            np.testing.assert_allclose(left[path].reshape(-1, 32), expected, atol=2e-3 * np.abs(expected).max())
            whole = np.zeros((len(gram), 32), np.float32)
            whole[rows] = left[path].reshape(-1, 32)
            leaves[path] = whole.reshape(leaves[path].shape)
        x = block(trees.unflatten(leaves), x)
    assert report.own_json()["refitted"] == 6
    record = json.loads((tmp_path / "out" / "jprune.json").read_text())
    assert [k["pattern"] for k in record["compensation"]["kernels"]] == ["16 inputs", "28 inputs"] * 3
    assert record["compensation"]["calibration"]["windows"] == 8


def test_says_why_nothing_is_refitted(checkpoint, tmp_path):
    """Without a tokenizer there is no text; and then no weight that stays has changed."""
    method = LLMPruner(**{**OPEN, "compensate": True}, importance="l2")
    told, plain = (
        shrink_model(checkpoint, tmp_path / name, method=m, target=Target(units=0.5))
        for name, m in (("a", method), ("b", LLMPruner(**OPEN, importance="l2")))
    )
    assert any("was not refitted" in notice and "tokenizer" in notice for notice in told.notices)
    assert not plain.notices
    for path in load(tmp_path / "a").shapes:
        np.testing.assert_array_equal(load(tmp_path / "a").read(path), load(tmp_path / "b").read(path))


@pytest.mark.parametrize("importance", ["param_second", "param_mix", "vectorize", "l1", "l2", "random"])
def test_every_importance_reaches_the_target(checkpoint, tmp_path, importance):
    method = LLMPruner(importance=importance, examples=3, **OPEN)
    report = shrink_model(
        checkpoint, tmp_path / "out", method=method, target=Target(share=0.2), calibration=TOKENS[:3], evaluate=TOKENS
    )
    before, after = report.parameters
    assert 0.7 * before < after <= 0.8 * before
    assert report.after is not None
    assert np.isfinite(report.after.value)


def test_steps_reach_the_same_size(checkpoint, tmp_path):
    once, often = (
        shrink_model(
            checkpoint,
            tmp_path / f"out{steps}",
            method=LLMPruner(steps=steps, **OPEN),
            target=Target(units=0.5),
            calibration=TOKENS,
        )
        for steps in (1, 3)
    )
    assert once.sizes == often.sizes
    assert once.parameters == often.parameters


def test_steps_down_to_one_kv_head(tiny_model, tmp_path):
    """With one KV head left a layer's query heads become a group; they are no units of this run."""
    checkpoint = load(tiny_model(num_attention_heads=8, num_key_value_heads=4, head_dim=4))
    method = LLMPruner(steps=4, importance="l2", **OPEN)
    report = shrink_model(checkpoint, tmp_path / "out", method=method, target=Target(units=0.75))
    assert {(s["heads"], s["kv_heads"]) for s in report.sizes} == {(2, 1)}


def test_layers(checkpoint, tmp_path):
    """Of three layers the one that turns its input least goes; the others run as before."""
    report = shrink_model(checkpoint, tmp_path / "out", method=DropLayers(drop=1), calibration=TOKENS)
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    x = compiled.embed(checkpoint.config)(params, jnp.asarray(TOKENS))
    cosines = []
    for i in range(3):
        y = compiled.block(checkpoint.config, i)(params["blocks"][str(i)], x)
        a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
        cosines.append(np.mean((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)))
        x = y
    stay = tuple(i for i in range(3) if i != int(np.argmax(cosines)))
    assert report.layers == stay
    x = compiled.embed(checkpoint.config)(params, jnp.asarray(TOKENS))
    for i in stay:
        x = compiled.block(checkpoint.config, i)(params["blocks"][str(i)], x)
    np.testing.assert_allclose(logits(load(tmp_path / "out")), decoder.head(checkpoint.config)(params, x), atol=1e-5)


def test_first_layers(checkpoint, tmp_path):
    report = shrink_model(checkpoint, tmp_path / "out", method=LLMPruner(mode="layer", layers=2))
    assert report.layers == (0, 1)
    assert load(tmp_path / "out").config.layers == 2


def test_global_ranking_gives_layers_sizes_of_their_own(checkpoint, tmp_path):
    method = LLMPruner(globally=True, normalise="mean", **OPEN)
    report = shrink_model(checkpoint, tmp_path / "out", method=method, target=Target(units=0.3), calibration=TOKENS)
    assert len({s["d_ff"] for s in report.sizes}) > 1
    smaller = load(tmp_path / "out")
    assert [smaller.config.layer(i).d_ff for i in range(3)] == [s["d_ff"] for s in report.sizes]
    assert sum(s["d_ff"] + s["kv_heads"] for s in report.sizes) == int(3 * (56 + 2) * 0.7)


def test_refusals(checkpoint, tmp_path):
    out = tmp_path / "out"
    one_open = LLMPruner(protect_first=1, protect_last=1)
    with pytest.raises(JpruneError, match="`uniform`"):
        shrink_model(checkpoint, out, method=one_open, target=Target(units=0.5), format="hf", calibration=TOKENS)
    with pytest.raises(JpruneError, match="how small"):
        shrink_model(checkpoint, out, method=LLMPruner(), calibration=TOKENS)
    with pytest.raises(JpruneError, match="protected"):
        shrink_model(checkpoint, out, method=LLMPruner(), target=Target(units=0.5), calibration=TOKENS)
    with pytest.raises(JpruneError, match="target"):
        shrink_model(checkpoint, out, method=DropLayers(drop=1), target=Target(units=0.5), calibration=TOKENS)
    with pytest.raises(JpruneError, match="at least one must stay"):
        shrink_model(checkpoint, out, method=DropLayers(drop=3), calibration=TOKENS)
    with pytest.raises(JpruneError, match="nothing to prune"):
        shrink_model(checkpoint, out, method=LLMPruner(mode="layer", layers=3))
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_plan_of_a_config_alone(tiny_config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    plan = plan_shrink(tmp_path, method=LLMPruner(**OPEN), target=Target(units=0.5))
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 56
    before = 2 * 96 * 32 + 3 * (block + 64) + 32
    assert plan.parameters == (before, before - 3 * block // 2)
    assert plan.sizes == ({"d_model": 32, "heads": 2, "kv_heads": 1, "d_ff": 28},) * 3
    everything = plan_shrink(tmp_path, method=LLMPruner(globally=True, **OPEN), target=Target(units=0.5))
    assert everything.parameters == (before, None)
    assert everything.sizes is None


def test_a_home_of_ones_own(checkpoint, tmp_path, monkeypatch):
    """What `~` is, is asked before anything is looked at; afterwards the report names the folder that is there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    method = LLMPruner(mode="layer", layers=2)
    report = shrink_model(checkpoint, "~/smaller", method=method)
    assert report.out == tmp_path / "smaller"
    assert (tmp_path / "smaller" / "jprune.json").exists()
    with pytest.raises(JpruneError, match="exists; give another folder"):
        shrink_model(checkpoint, "~/smaller", method=method)


def test_an_importance_of_the_users_own(checkpoint, tmp_path):
    """The class that docs/add-a-method.md shows."""
    method = pages.run(pages.ROOT / "docs/add-a-method.md")["LargestWeight"]()
    report = shrink_model(checkpoint, tmp_path / "out", method=method, target=Target(units=0.25))
    smaller = load(tmp_path / "out")
    assert report.own_json()["method"] == "LargestWeight"
    for i in range(3):
        w = {name: np.asarray(checkpoint.read(f"blocks/{i}/mlp/{name}/kernel")) for name in ("gate", "up", "down")}
        largest = np.maximum(np.abs(np.stack([w["gate"], w["up"]])).max((0, 1)), np.abs(w["down"]).max(1))
        stay = np.sort(np.argsort(largest, kind="stable")[14:])
        np.testing.assert_array_equal(smaller.read(f"blocks/{i}/mlp/up/kernel"), w["up"][:, stay])

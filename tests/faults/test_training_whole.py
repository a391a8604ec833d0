"""Whole training runs: stopped and resumed, by hand, with the weights of domains moved, to the end of a target."""

import dataclasses
import json
import os
import signal

import compiled
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_model import sparse
from two_domains import DATA, LOADING, OPTIONS, series

import jprune
from jprune import SparseGPT, Unstructured
from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.pipeline import prune_and_tune, prune_model
from jprune.pipeline.training import shear_model, tune_model
from jprune.structured.shape import Shape
from jprune.train.loop import Interrupted
from jprune.tuning import Full, Lora, Shearing
from jprune.tuning.masked_model import shape_of
from jprune.tuning.shearing import count

QUICK = {"batch_size": 4, "micro_batch": 2, "warmup": 0, "mask_momentum": 0.0}
SHORT = {"steps": 3, "batch_size": 4, "micro_batch": 4, "learning_rate": 0.01}
METHOD = Full(steps=24, batch_size=8, micro_batch=8, warmup=0, learning_rate=0.01)


def test_a_resumed_shearing_is_the_same(tiny_model, learnable, tmp_path):
    checkpoint = load(tiny_model())
    method = Shearing(target="hidden=24,intermediate=40", steps=6, **QUICK)
    straight = shear_model(checkpoint, tmp_path / "straight", method=method, data=learnable)

    def press(progress):
        if progress.phase == "train" and progress.done >= 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        shear_model(checkpoint, tmp_path / "out", method=method, data=learnable, progress=press)
    assert not (tmp_path / "out").exists()
    resumed = shear_model(checkpoint, tmp_path / "out", method=method, data=learnable, resume=True)
    assert resumed.resumed_from >= 3
    assert resumed.losses == straight.losses
    assert any("expected hidden 31" in notice for notice in resumed.notices)  # six steps are too few
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_rounds_are_the_same_as_by_hand(tiny_model, token_rows, tmp_path):
    """prune_model and tune_model, one after the other, with the seed going up; a dense teacher in both."""
    folder = tiny_model()
    tuning = Full(**SHORT, teacher=str(folder), seed=5)
    common = {"calibration": token_rows["calibration"], "keep_zeros": True}
    model = folder
    for number, sparsity in enumerate((0.3, 0.6)):
        pattern = Unstructured(sparsity)
        prune_model(model, tmp_path / f"p{number}", method=SparseGPT(), pattern=pattern, seed=number, **common)
        model = tmp_path / f"t{number}"
        own = dataclasses.replace(tuning, seed=5 + number)
        tune_model(tmp_path / f"p{number}", model, method=own, data=token_rows["data"])
    report = prune_and_tune(folder, tmp_path / "out", sparsity=0.6, rounds=(0.3, 0.6), tuning=tuning, **token_rows)
    by_hand, together = jprune.load(model), jprune.load(tmp_path / "out")
    for path in by_hand.shapes:
        np.testing.assert_array_equal(by_hand.read(path), together.read(path), err_msg=path)
    losses = [json.loads((tmp_path / f"t{number}" / "jprune.json").read_text())["losses"] for number in (0, 1)]
    assert [each.first_loss for each in report.rounds] == pytest.approx([x[0] for x in losses], abs=1e-6)


def test_a_domain_that_lags_gets_more_and_catches_up_faster(tiny_model, tmp_path):
    folder = tiny_model()
    fixed = tune_model(folder, tmp_path / "fixed", method=METHOD, **OPTIONS)
    followed = tune_model(folder, tmp_path / "dynamic", method=METHOD, dynamic_loading=LOADING, **OPTIONS)
    weights = [x for _, x in series(tmp_path / "dynamic", "domain_weight/little")]
    assert weights[0] == 0.1  # until the first evaluation
    assert weights[-1] > 0.3
    assert {x for _, x in series(tmp_path / "fixed", "domain_weight/little")} == {0.1}
    gaps = {}
    for name in ("fixed", "dynamic"):
        measured = series(tmp_path / name, "domain_loss/little")
        assert [step for step, _ in measured] == list(range(2, 25, 2))
        gaps[name] = [loss - 1.0 for _, loss in measured]
    assert gaps["dynamic"][0] == gaps["fixed"][0]
    assert gaps["dynamic"][-1] < 0.7 * gaps["fixed"][-1]
    assert sum(gaps["dynamic"]) < 0.9 * sum(gaps["fixed"])
    # The weights in the metrics are those that the losses in the metrics lead to.
    state = {"much": 0.9, "little": 0.1}
    for step, weight in series(tmp_path / "dynamic", "domain_weight/little"):
        losses = {name: dict(series(tmp_path / "dynamic", f"domain_loss/{name}")).get(step) for name in DATA}
        if None not in losses.values():
            state = LOADING.reweighing(state, losses, {"much": 1.0, "little": 1.0})
        np.testing.assert_allclose(weight, state["little"], rtol=1e-12)
    # What is reported.
    found = followed.json()["domains"]["little"]
    assert found["weight"] == {"first": 0.1, "last": weights[-1]}
    assert (found["windows"], found["held_out"], found["reference_loss"]) == (38, 2, 1.0)
    assert found["loss"] == {"first": gaps["dynamic"][0] + 1.0, "last": gaps["dynamic"][-1] + 1.0}
    assert fixed.json()["domains"]["much"]["reference_loss"] is None
    assert fixed.domains["much"]["epochs"] > 1
    assert any("domain 'much': its 38 windows were gone through 4" in notice for notice in fixed.notices)
    drawn = sum(found["epochs"] * 38 for found in followed.domains.values())
    np.testing.assert_allclose(drawn, 24 * 8, atol=0.01)
    record = json.loads((tmp_path / "dynamic" / "jprune.json").read_text())
    assert record["domains"] == followed.json()["domains"]
    # The loss of the whole is the mean by the first proportions.
    [(_, first), *_] = series(tmp_path / "dynamic", "evaluation_loss")
    parts = {name: series(tmp_path / "dynamic", f"domain_loss/{name}")[0][1] for name in DATA}
    np.testing.assert_allclose(first, 0.9 * parts["much"] + 0.1 * parts["little"], rtol=1e-12)


def test_layers_of_different_sizes(tiny_model, learnable, tmp_path):
    """A structurally pruned model keeps its shapes."""
    whole = jprune.load(tiny_model())
    axes = {"gate": 1, "up": 1, "down": 0}
    smaller = whole.select({f"blocks/1/mlp/{name}/kernel": {axis: range(20)} for name, axis in axes.items()})
    report = tune_model(
        smaller, tmp_path / "out", method=Lora(**SHORT | {"learning_rate": 0.02}, rank=2), data=learnable
    )
    tuned = jprune.load(tmp_path / "out")
    assert {p: s.shape for p, s in tuned.shapes.items()} == {p: s.shape for p, s in smaller.shapes.items()}
    assert report.losses[-1] < report.losses[0]


def test_without_a_gate(tiny_model, learnable, tmp_path):
    """By default whatever kernels the blocks of a family have get adapters; not its projections outside of them."""
    opt = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "ffn_dim": 56, "word_embed_proj_dim": 24}
    model = tiny_model(**opt, do_layer_norm_before=False, num_key_value_heads=4)
    report = tune_model(model, tmp_path / "out", method=Lora(**SHORT, rank=2), data=learnable)
    before, after = jprune.load(model), jprune.load(tmp_path / "out")
    changed = {path for path in before.shapes if not np.array_equal(before.read(path), after.read(path))}
    assert changed == {p for p in before.shapes if p.startswith("blocks/") and p.endswith("kernel")}
    assert report.trainable_parameters == 3 * 2 * (4 * 64 + 2 * (32 + 56))


def test_domains_stopped_and_resumed(tiny_model, tmp_path):
    """A run that dies between a checkpoint and the next ends as one that did not, weights and draws included."""

    class Dies(Exception):
        pass

    def die(p):
        if p.phase == "train" and p.done >= 8:
            raise Dies

    folder = tiny_model()
    method = Full(steps=10, batch_size=8, micro_batch=8, warmup=0, learning_rate=0.01)
    options = OPTIONS | {"method": method, "dynamic_loading": LOADING, "checkpoint_every": 3}
    with pytest.raises(Dies):
        tune_model(folder, tmp_path / "out", progress=die, **options)
    with pytest.raises(JpruneError, match="was begun with domains"):
        tune_model(folder, tmp_path / "out", resume=True, **options | {"dynamic_loading": None})
    again = tune_model(folder, tmp_path / "out", resume=True, **options)
    whole = tune_model(folder, tmp_path / "whole", **options)
    assert again.resumed_from == 6
    assert again.losses == whole.losses
    assert again.domains == whole.domains
    names = ["evaluation_loss", *(f"domain_{what}/{name}" for what in ("weight", "loss", "epochs") for name in DATA)]
    for name in names:
        assert series(tmp_path / "out", name) == series(tmp_path / "whole", name)
    a, b = jprune.load(tmp_path / "out"), jprune.load(tmp_path / "whole")
    for path in a.shapes:
        np.testing.assert_array_equal(a.read(path), b.read(path))


def test_the_target_of_shearing_is_reached(tiny_model, learnable, tmp_path):
    """Expected sizes are within one per cent of the target at the end, and the result has them exactly."""
    target = "layers=2,hidden=24,heads=2,kv_heads=1,intermediate=40"
    method = Shearing(target=target, steps=250, mask_learning_rate=0.3, **QUICK)
    checkpoint = load(tiny_model())
    report = shear_model(checkpoint, tmp_path / "out", method=method, data=learnable, evaluate=learnable[:4])
    wanted = {"layers": 2, "hidden": 24, "heads": 2, "kv_heads": 1, "intermediate": 40}
    for name, size in wanted.items():
        assert abs(report.expected[name] - size) <= 0.01 * size, report.expected
    assert report.sizes == ({"d_model": 24, "heads": 2, "kv_heads": 1, "d_ff": 40},) * 2
    result = load(tmp_path / "out")
    assert shape_of(result) == Shape(**wanted)
    after = sum(np.prod(x.shape) for x in result.shapes.values())
    by_hand = 2 * 96 * 24 + 2 * (24 * 8 * (2 + 1 + 1 + 2) + 3 * 24 * 40 + 2 * 24) + 24
    assert report.parameters_after == after == by_hand == count(checkpoint.config)(Shape(**wanted))
    record = json.loads((tmp_path / "out" / "jprune.json").read_text())
    assert record["parameters"] == {"before": report.parameters, "after": by_hand}
    assert record["recipe"]["method"] == "shearing"
    assert len(record["kept"]["layer"]) == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 250
    assert {"expected/layers", "expected/kv_heads", "multiplier/mlp/1", "lagrangian"} <= lines[0].keys()
    assert lines[0]["expected/hidden"] > 31
    assert report.losses[-1] < np.log(96)  # it has learnt, too
    assert np.isfinite(report.after.value)
    assert not any("expected" in notice for notice in report.notices)
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("way", [Full, Lora])
def test_teacher(tiny_model, learnable, tmp_path, way):
    """A sparse student comes nearer to the model that it was; here by hidden states too."""
    folder = tiny_model()
    student = sparse(tiny_model("student"), 0.3)
    method = way(**SHORT | {"steps": 8}, teacher=str(folder), temperature=2.0, hidden_loss=0.5)
    report = tune_model(student, tmp_path / "out", method=method, data=learnable)
    assert report.losses[-1] < (0.8 if way is Full else 0.95) * report.losses[0]
    teacher, models = jprune.load(folder), [jprune.load(x) for x in (student, tmp_path / "out")]
    want, far, near = (compiled.apply(m.config, m.params(), learnable) for m in (teacher, *models))
    assert jnp.mean((near - want) ** 2) < jnp.mean((far - want) ** 2)
    other = tiny_model("other", vocab_size=97)
    with pytest.raises(JpruneError, match="teacher's vocabulary has 97 tokens and the model's 96"):
        tune_model(student, tmp_path / "no", method=way(**SHORT, teacher=str(other)), data=learnable)

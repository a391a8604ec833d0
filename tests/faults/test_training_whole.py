"""Whole training runs against others: stopped and resumed, by hand, and with the weights of domains moved."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from two_domains import DATA, LOADING, OPTIONS, series

import jprune
from jprune import SparseGPT, Unstructured
from jprune.checkpoints import load
from jprune.pipeline import prune_and_tune, prune_model
from jprune.pipeline.training import shear_model, tune_model
from jprune.train.loop import Interrupted
from jprune.tuning import Full, Shearing

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

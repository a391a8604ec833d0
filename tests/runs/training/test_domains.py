"""Tuning over several domains: their weights, with dynamic loading and without, and what is refused."""

import json

import numpy as np
import pytest

import jprune
from jprune.errors import JpruneError
from jprune.pipeline.options import DynamicLoading
from jprune.pipeline.training import tune_model
from jprune.train.shearing.dynamic_loading import Reweighing
from jprune.tuning import Full


def counting(first, step, n=40, length=12):
    """Windows of a language of its own 48 tokens, in which every token says the next."""
    start = np.random.default_rng(first).integers(0, 48, (n, 1))
    return (first + (start + step * np.arange(length)) % 48).astype(np.int32)


DATA = {"much": counting(0, 1), "little": counting(48, 5)}
OPTIONS = {"data": DATA, "proportions": {"much": 0.9, "little": 0.1}, "evaluate_every": 2}
METHOD = Full(steps=24, batch_size=8, micro_batch=8, warmup=0, learning_rate=0.01)
LOADING = DynamicLoading(reference_losses={"much": 1.0, "little": 1.0}, reweighing=Reweighing(step_size=0.5))


def series(out, name):
    """(step, value) of a metric, where it was measured."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


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


def test_losses_equal_to_the_measured_references_leave_the_weights(tiny_model, tmp_path):
    """The reference is the model itself, which hardly learns: only the smoothing is left."""
    folder = tiny_model()
    method = Full(steps=2, batch_size=4, micro_batch=4, warmup=0, learning_rate=1e-30)
    loading = DynamicLoading(reference=str(folder), reweighing=Reweighing(smoothing=0.1))
    options = OPTIONS | {"evaluate_every": 1}
    report = tune_model(folder, tmp_path / "out", method=method, dynamic_loading=loading, **options)
    for found in report.domains.values():
        np.testing.assert_allclose(found["reference_loss"], found["loss"]["first"], rtol=1e-6)
    weights = [x for _, x in series(tmp_path / "out", "domain_weight/little")]
    np.testing.assert_allclose(weights, [0.1 * 0.9 + 0.05, (0.1 * 0.9 + 0.05) * 0.9 + 0.05], rtol=1e-6)
    # An independent measurement of a reference: perplexity by the standard protocol over the same windows.
    from jprune.evaluate.perplexity import perplexity

    value = perplexity(jprune.load(folder), DATA["much"][[10, 30]]).value
    np.testing.assert_allclose(report.domains["much"]["reference_loss"], np.log(value), rtol=1e-5)


def test_stopped_and_resumed(tiny_model, tmp_path):
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


def test_other_data_to_evaluate_on(tiny_model, tmp_path):
    """A source for one domain, windows held out for the other, and a text for the perplexity before and after."""
    method = Full(epochs=1, batch_size=32, micro_batch=32, warmup=0)
    own = counting(48, 5, n=3, length=6)
    options = {"method": method, "data": DATA, "evaluate_windows": 2}
    report = tune_model(tiny_model(), tmp_path / "a", evaluate={"little": own}, **options)
    assert {name: found["held_out"] for name, found in report.domains.items()} == {"much": 2, "little": 2}
    assert {name: found["windows"] for name, found in report.domains.items()} == {"much": 38, "little": 40}
    assert report.domains["much"]["weight"]["last"] == 38 / 78
    assert report.steps == (38 + 40) // 32  # an epoch is of all domains together
    assert list(report.evaluation_losses) == [2]  # at the end in any case
    assert report.before is None
    report = tune_model(tiny_model("other"), tmp_path / "b", evaluate=DATA["much"], **options)
    assert report.before.windows == report.after.windows == 2
    assert "100 % of the evaluation windows" not in str(report.notices)  # windows of 12 tokens tell nothing


def test_bad_input(tiny_model, tmp_path):
    folder = tiny_model()
    empty = tmp_path / "empty.npy"
    np.save(empty, np.zeros((0, 12), np.int32))

    def refused(match, **options):
        with pytest.raises(JpruneError, match=match):
            tune_model(folder, tmp_path / "out", method=METHOD, **OPTIONS | options)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.run").exists()

    refused("domain 'little': .*empty", data={**DATA, "little": str(empty)})
    refused("domain 'little': .* it has 1 windows, and 1 held out", data={**DATA, "little": DATA["little"][:1]})
    refused("domain 'little': .* does not exist", data={**DATA, "little": "nowhere.txt"})
    refused(
        "domain 'little': .* at window 3, position 0",
        data={**DATA, "little": DATA["little"] + 48 * (np.arange(40)[:, None] > 2)},
    )
    refused("must have one length, and have 12 .much., 8 .little.", data={**DATA, "little": DATA["little"][:, :8]})
    refused("proportions: 'x' is no domain of the data; there are much, little", proportions={"x": 1.0})
    refused("`evaluate`: 'x' is no domain", evaluate={"x": DATA["much"]})
    missing = DynamicLoading(reference_losses={"much": 1.0})
    refused("reference losses: none is given for 'little'; every domain needs one", dynamic_loading=missing)
    other = DynamicLoading(reference=str(tiny_model("other", vocab_size=97)))
    refused("vocabulary of the reference model .* has 97 tokens and the model's 96", dynamic_loading=other)
    refused("are about domains; give `data` NAME=SOURCE", data=DATA["much"], proportions=None, dynamic_loading=LOADING)
    with pytest.raises(JpruneError, match="needs either a reference loss for every domain"):
        DynamicLoading()
    with pytest.raises(JpruneError, match="reference loss of domain 'a' must be a number above 0; it is 0"):
        DynamicLoading(reference_losses={"a": 0})


def test_devices_change_nothing(tiny_model, tmp_path, four_devices):
    """Parameters and the reference model's cut up over two of four devices; draws, losses and weights are the same."""
    folder = tiny_model()
    method = Full(steps=2, batch_size=8, micro_batch=8, warmup=0, learning_rate=0.01)
    loading = DynamicLoading(reference=str(tiny_model("reference")))
    options = OPTIONS | {"method": method, "dynamic_loading": loading, "evaluate_every": 1}
    one = tune_model(folder, tmp_path / "one", **options)
    with four_devices():
        four = tune_model(folder, tmp_path / "four", fsdp=2, **options)
    np.testing.assert_allclose(four.losses, one.losses, rtol=1e-4)
    for name, found in one.domains.items():
        assert four.domains[name]["epochs"] == found["epochs"]
        np.testing.assert_allclose(four.domains[name]["weight"]["last"], found["weight"]["last"], rtol=1e-4)
        np.testing.assert_allclose(four.domains[name]["reference_loss"], found["reference_loss"], rtol=1e-5)

"""Tuning over several domains: their weights, with dynamic loading and without, and what is refused."""

import numpy as np
import pytest
from two_domains import DATA, LOADING, OPTIONS, counting, series

import jprune
from jprune.errors import JpruneError
from jprune.pipeline.options import DynamicLoading
from jprune.pipeline.training import tune_model
from jprune.train.shearing.dynamic_loading import Reweighing
from jprune.tuning import Full

METHOD = Full(steps=24, batch_size=8, micro_batch=8, warmup=0, learning_rate=0.01)


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

"""The script behind the quality table of docs/results.md."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jprune.checkpoints import load
from jprune.cli.main import main
from jprune.models import decoder


def test_rows_means_and_divergence(run_script, tiny_model, token_file, tmp_path):
    model, text, other = str(tiny_model()), token_file(8, 24), token_file(3, 24, seed=1)
    words = ["--model", model, "--methods", "magnitude", "sparsegpt", "--patterns", "0.5", "--seeds", "0", "1"]
    words += ["--texts", text, other, "--samples", "4", "--sequence-length", "24", "--windows", "2"]
    words += ["--divergence-windows", "2", "--out", tmp_path / "rows.json"]
    run_script("reproduce_quality", *words)
    quality = run_script("reproduce_quality", *words)  # goes on where it was: nothing is left to do
    result = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["method"], row["seed"]) for row in result["rows"]] == [
        ("magnitude", 0), ("sparsegpt", 0), ("magnitude", 1), ("sparsegpt", 1),
    ]  # fmt: skip
    found = quality.by_method(result)
    values = [row["perplexity"][other] for row in result["rows"] if row["method"] == "sparsegpt"]
    mean, deviation = found["0.5", "sparsegpt"][other]
    np.testing.assert_allclose([mean, deviation], [np.mean(values), np.std(values, ddof=1)])
    assert found["0.5", "magnitude"]["divergence"][1] == 0  # no seed has a part in it
    assert "± " in quality.table(result)
    rows = [
        {"method": method, "pattern": "0.5", "seed": seed, "perplexity": {"t": value}}
        for method, seed, value in (("sparsegpt", 0, 10.0), ("sparsegpt", 1, 30.0), ("admm", 1, 15.0), ("admm", 2, 1.0))
    ]
    assert quality.of_sparsegpt(rows, "admm", "0.5", "t") == " (-50.0 %, 1 of the seeds)"
    assert quality.of_sparsegpt(rows, "admm", "0.6", "t") == quality.of_sparsegpt(rows, "sparsegpt", "0.5", "t") == ""

    # Of whole models at once, by hand.
    pruned = tmp_path / "pruned"
    assert main(["prune", "magnitude", model, "--sparsity", "0.5", "--out", str(pruned)]) == 0
    windows = np.load(text)[:2]
    params = (jax.tree.map(jnp.asarray, load(m).params()) for m in (model, pruned))
    logits = (decoder.apply(load(model).config, each, jnp.asarray(windows)) for each in params)
    ours, theirs = (np.asarray(jax.nn.log_softmax(x[:, :-1]), np.float64) for x in logits)  # nothing follows the last
    want = (np.exp(ours) * (ours - theirs)).sum(-1).mean()
    np.testing.assert_allclose(found["0.5", "magnitude"]["divergence"][0], want, rtol=1e-4)

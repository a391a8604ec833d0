"""What pruning one block alone does to a model's predictions, against models of which one block was pruned."""

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import Magnitude, Unstructured, Wanda
from jprune.models import decoder
from jprune.pipeline.oneshot import allocate

PATTERN = Unstructured(0.6)


def log_probabilities(model, tokens):
    params = jax.tree.map(jnp.asarray, model.params())
    x = compiled.embed(model.config)(params, jnp.asarray(tokens))
    for i in range(model.config.layers):
        x = compiled.block(model.config, i)(params["blocks"][str(i)], x)
    return jax.nn.log_softmax(jax.jit(decoder.head(model.config))(params, x))


def test_damage_is_that_of_a_model_with_one_block_pruned(tiny_model, token_file, tmp_path, monkeypatch):
    folder, file = tiny_model(), token_file()
    recipe = dict(pattern=PATTERN, calibration=file, micro_batch=2)
    found, scores = [], allocate._scores
    monkeypatch.setattr(allocate, "_scores", lambda *args: found.append(scores(*args)) or found[-1])
    options = dict(method=Magnitude(), allocate="loss", where=("blocks/[01]/attn/q",))
    report = jprune.prune_model(folder, tmp_path / "out", **recipe, **options)
    uniform = jprune.prune_model(folder, tmp_path / "uniform", **recipe, **options | {"allocate": "uniform"})
    assert report.sparsity == uniform.sparsity
    assert list(report.allocation["sparsities"]) == ["blocks/0", "blocks/1"]

    tokens = np.load(file)[:2]  # those that tell damage
    p, expected = log_probabilities(jprune.load(folder), tokens), []
    for i in range(2):
        # One kernel of it: later ones would be pruned by inputs that have changed, as in the pass they have not.
        jprune.prune_model(folder, tmp_path / f"{i}", **recipe, method=Wanda(), where=(f"blocks/{i}/attn/q",))
        q = log_probabilities(jprune.load(tmp_path / f"{i}"), tokens)
        expected.append(float((jnp.exp(p) * (p - q)).sum(-1).mean()))
    assert found == [pytest.approx(expected, rel=1e-3)]

"""Hidden dimensions go: the result is the masked model, whose norms divide by the kept length."""

import compiled
import jax
import jax.numpy as jnp
import numpy as np

from jprune.anatomy.units import model_groups
from jprune.checkpoints import load
from jprune.models import decoder
from jprune.pipeline.shrink.run import shrink_model
from jprune.structured import LLMPruner
from jprune.structured.selection import Target
from jprune.trace import coupled_axes

TOKENS = np.random.default_rng(7).integers(0, 96, (4, 16), dtype=np.int32)


def test_hidden_dimensions(tiny_model, tmp_path):
    checkpoint = load(tiny_model())
    report = shrink_model(
        checkpoint, tmp_path / "out", method=LLMPruner(mode="channel"), target=Target(units=0.25), calibration=TOKENS
    )
    smaller = load(tmp_path / "out")
    assert smaller.config.d_model == 24
    assert {s["d_model"] for s in report.sizes} == {24}
    whole, part = (np.asarray(c.read("final_norm/scale")) for c in (checkpoint, smaller))
    embedding, left = (np.asarray(c.read("embed/embedding")) for c in (checkpoint, smaller))
    keep = np.array([any(np.array_equal(embedding[:, i], left[:, j]) for j in range(24)) for i in range(32)])
    assert keep.sum() == 24
    np.testing.assert_array_equal(whole[keep], part)
    groups = model_groups(checkpoint)
    (hidden,) = [g for g in groups.prunable if g.renormalised]
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    np.testing.assert_allclose(
        compiled.apply(smaller.config, jax.tree.map(jnp.asarray, smaller.params()), jnp.asarray(TOKENS)),
        groups_logits(checkpoint, hidden.name, keep, params),
        atol=1e-4,
    )


def groups_logits(checkpoint, name, keep, params):
    """Logits of the masked model, window by window (it is traced for eight tokens)."""
    f = lambda p, t: decoder.apply(checkpoint.config, p, t)  # noqa: E731
    return coupled_axes(f, params, jnp.asarray(TOKENS)).masked({name: keep})(params, jnp.asarray(TOKENS))

"""What is done with models, done with every family: generation, pruning, and whatever sizes they have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.methods import Magnitude, SparseGPT, Wanda
from jprune.models import decoder, generate
from jprune.patterns import Unstructured
from jprune.pipeline import prune_model
from jprune.pipeline.shrink.run import shrink_model
from jprune.structured import LLMPruner
from jprune.structured.selection import Target

pytest.importorskip("torch")
hf = pytest.importorskip("hf_families")

DIFFERENT = {"OPT-0", "Bloom-0", "Gemma2-0", "Phi-0", "Qwen2Moe-0", "DeepseekV3-0", "GptOss-0"}
"""One of each kind: positions, norms before and after, parallel, experts, latent attention. What a method computes of a
kernel knows no family, so these alone are pruned with every statistic, and by gradients."""


@settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(list(hf.VARIANTS)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    wide=st.booleans(),
    tied=st.booleans(),
    length=st.integers(9, 16),
)
def test_logits_and_files_whatever_the_sizes(tmp_path_factory, name, kv_heads, group, wide, tied, length):
    head_dim = 16 if wide and "rope_scaling" not in hf.VARIANTS[name][2] else 8
    sizes = {"kv_heads": kv_heads, "group": group, "head_dim": head_dim, "tied": tied}
    hf.check(name, tmp_path_factory.mktemp(name), length=length, **sizes)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a random model of a variant and loads it."""
    return lambda name, **options: load(hf.save(hf.make(name, **options), tmp_path / name))


@pytest.mark.parametrize("name", hf.FIRST)
def test_generation_with_a_cache_equals_without(name, saved):
    checkpoint = saved(name)
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    prompt = [3, 1, 4, 1, 5]
    generated = generate.generate(checkpoint.config, params, prompt, max_tokens=7)
    everything = np.asarray([prompt + generated])
    logits = jax.jit(lambda p, t: decoder.apply(checkpoint.config, p, t))(params, everything)
    np.testing.assert_array_equal(np.argmax(logits[0, len(prompt) - 1 : -1], -1), generated)


@pytest.mark.parametrize("name", hf.FIRST)
def test_every_statistic_prunes_it(name, saved, tmp_path):
    checkpoint = saved(name, layers=len(hf.VARIANTS[name][2].get("layer_types", "1")))
    for method in (Magnitude, Wanda, SparseGPT) if name in DIFFERENT else [Wanda]:
        out = tmp_path / method.__name__
        prune_model(
            checkpoint,
            out,
            method=method(),
            pattern=Unstructured(0.5),
            calibration=hf.tokens(16, batch=4),
            expert_tokens=0,
        )
        pruned = load(out)
        for path in checkpoint.shapes:
            before, after = checkpoint.read(path), pruned.read(path)
            routing = "/router/" in path or "/shared_gate/" in path
            if path.startswith("blocks/") and path.endswith("kernel") and not routing:
                assert np.mean(after == 0) == pytest.approx(0.5, abs=0.01), path
            else:
                np.testing.assert_array_equal(after, before, err_msg=path)


REFUSED = {
    "Bloom-0": "ALiBi|constant array",
    **dict.fromkeys(("DeepseekV2-0", "DeepseekV3-0"), "heads of latent attention cannot be removed yet.*`heads` none"),
}
"""By what their message says: heads whose slopes go by number, and those of several widths."""


@pytest.mark.parametrize("name", hf.FIRST)
def test_heads_and_channels_are_removed_or_it_says_why_not(name, saved, tmp_path):
    checkpoint = saved(name)
    out = tmp_path / "half"
    options = {"target": Target(units=0.5), "calibration": hf.tokens(16, batch=4), "format": "jprune"}
    method = LLMPruner(
        importance="param_first" if name in DIFFERENT else "l2",
        protect_first=0,
        protect_last=0,
        examples=4,
        sequence_length=16,
        compensate=name in DIFFERENT,
    )
    if name in REFUSED:
        with pytest.raises(JpruneError, match=REFUSED[name]):
            shrink_model(checkpoint, out, method=method, **options)
        return
    report = shrink_model(checkpoint, out, method=method, **options)
    half = load(out)
    readers = 3 if half.config.d_shared else 2
    assert report.own_json()["refitted"] == (readers * half.config.layers if method.compensate else 0)
    for i in range(half.config.layers):
        before, after = checkpoint.config.layer(i), half.config.layer(i)
        for width in ("d_expert", "d_shared") if half.config.has_experts(i) else ("d_ff",):
            assert getattr(after, width) == getattr(before, width) / 2
        kind = "kv_heads" if before.kv_heads > 1 else "heads"  # a single KV head stays
        assert getattr(after, kind) == getattr(before, kind) / 2
    params = jax.tree.map(jnp.asarray, half.params())
    assert np.isfinite(jax.jit(lambda p, t: decoder.apply(half.config, p, t))(params, hf.tokens(6))).all()

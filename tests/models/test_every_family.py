"""What a family's table must pass to exist, for every variant it names; see docs/add-a-family.md.

The truth is transformers: models of random weights are saved by it, loaded by us, and compared.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jprune import coupled_axes, trees
from jprune.checkpoints import huggingface, load
from jprune.errors import JpruneError
from jprune.methods import METHODS
from jprune.models import decoder, families, generate
from jprune.patterns import Unstructured
from jprune.pipeline import prune_model
from jprune.pipeline.shrink.run import shrink_model
from jprune.structured import LLMPruner
from jprune.structured.selection import Target
from jprune.trace import matmuls, stages

pytest.importorskip("torch")
hf = pytest.importorskip("hf_families")
pytestmark = pytest.mark.usefixtures("one_device")

VARIANTS = {
    f"{architecture.removesuffix('ForCausalLM')}-{number}": (family, architecture, variant)
    for family in families.FAMILIES
    for architecture in family.architectures
    for number, variant in enumerate(family.variants)
}
FIRST = {name: case for name, case in VARIANTS.items() if name.endswith("-0")}


def tokens(length, batch=2):
    return np.random.default_rng(1).integers(0, hf.VOCAB, (batch, length)).astype(np.int32)


def check_against_transformers(name, folder, *, length=12, **sizes):
    """Logits, and files that are read and written again."""
    family, architecture, variant = VARIANTS[name]
    model = hf.model(architecture, hf.sizes(family, **sizes) | variant)
    checkpoint = load(hf.save(model, folder / "source"))
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    ours = jax.jit(lambda p, t: decoder.apply(checkpoint.config, p, t))(params, tokens(length))
    theirs = hf.logits(model, tokens(length))
    assert np.abs(theirs).max() > 0.1  # the comparison means something
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4

    (folder / "copy").mkdir()
    with huggingface.Writer(folder / "copy", checkpoint) as writer:
        for path in checkpoint.shapes:
            writer.write(path, checkpoint.read(path))
    before, after = (load_file(folder / each / "model.safetensors") for each in ("source", "copy"))
    assert before.keys() == after.keys()
    for key, stored in before.items():
        assert after[key].tobytes() == stored.tobytes(), key


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_files_are_those_of_transformers(name, tmp_path):
    check_against_transformers(name, tmp_path)


@settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(list(VARIANTS)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    wide=st.booleans(),
    tied=st.booleans(),
    length=st.integers(9, 16),
)
def test_logits_and_files_whatever_the_sizes(tmp_path_factory, name, kv_heads, group, wide, tied, length):
    head_dim = 16 if wide and "rope_scaling" not in VARIANTS[name][2] else 8
    folder = tmp_path_factory.mktemp(name)
    sizes = {"kv_heads": kv_heads, "group": group, "head_dim": head_dim, "tied": tied}
    check_against_transformers(name, folder, length=length, **sizes)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a random model of a case, without group heads where a family has none, and loads it."""

    def save(name, **options):
        family, architecture, variant = VARIANTS[name]
        return load(hf.save(hf.model(architecture, hf.sizes(family, **options) | variant), tmp_path / name))

    return save


@pytest.mark.parametrize("name", FIRST)
def test_a_block_is_understood(name, saved):
    """Every kernel is a matmul that `matmuls` finds, and the stages computed one by one are the block."""
    checkpoint = saved(name)
    config = checkpoint.config
    params = jax.tree.map(jnp.asarray, checkpoint.params("blocks/0"))
    x = jax.random.normal(jax.random.key(0), (1, 6, config.d_model))
    f = decoder.block(config, 0)
    found = {m.path: m for m in matmuls(f, params, x, stacked=True)}
    assert set(found) == {path for path in trees.flatten(params) if path.endswith("kernel")}
    assert found["attn/q/kernel"].input_id == found["attn/k/kernel"].input_id
    assert found["attn/o/kernel"].in_axes == (0, 1)
    up = found["mlp/experts/up/kernel" if config.has_experts(0) else "mlp/up/kernel"]
    assert up.stage == (0 if config.parallel else 3 if config.has_experts(0) else 2)
    cut = stages(f, params, x, stacked=True)

    @jax.jit
    def in_stages(params, x):
        carry = cut.start(x)
        for segment in cut.segments:
            carry = segment(params, carry)
        return cut.finish(carry)

    np.testing.assert_allclose(in_stages(params, x), jax.jit(f)(params, x), atol=1e-5)


@pytest.mark.parametrize("name", FIRST)
def test_groups_are_found(name):
    """Heads and feed-forward channels can be left out; heads with ALiBi cannot, for their slopes go by number."""
    family, architecture, variant = FIRST[name]
    config = families.config({"architectures": [architecture]} | hf.sizes(family) | variant)
    x = jax.ShapeDtypeStruct((1, 6, config.d_model), jnp.float32)
    groups = coupled_axes(decoder.block(config, 0), decoder.abstract_params(config)["blocks"]["0"], x)
    down = ("mlp/experts/down/kernel", 1) if config.has_experts(0) else ("mlp/down/kernel", 0)
    assert [g.frozen for g in groups.at(*down)] == [None]
    assert any(g.frozen is None for g in groups.at("attn/o/kernel", 0)) == (not config.alibi)


@pytest.mark.parametrize("name", FIRST)
def test_generation_with_a_cache_equals_without(name, saved):
    checkpoint = saved(name)
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    prompt = [3, 1, 4, 1, 5]
    generated = generate.generate(checkpoint.config, params, prompt, max_tokens=7)
    everything = np.asarray([prompt + generated])
    logits = jax.jit(lambda p, t: decoder.apply(checkpoint.config, p, t))(params, everything)
    np.testing.assert_array_equal(np.argmax(logits[0, len(prompt) - 1 : -1], -1), generated)


@pytest.mark.parametrize("name", FIRST)
def test_every_method_prunes_it(name, saved, tmp_path):
    checkpoint = saved(name, layers=len(VARIANTS[name][2].get("layer_types", "1")))
    for method in METHODS.values():
        out = tmp_path / method.__name__
        prune_model(
            checkpoint,
            out,
            method=method(),
            pattern=Unstructured(0.5),
            calibration=tokens(16, batch=4),
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


REFUSED = {"Bloom-0": "ALiBi|constant array", **dict.fromkeys(("Mixtral-0", "Qwen2Moe-0", "Qwen3Moe-0"), "d_expert")}
"""By what their message says: heads whose slopes go by number, and the channels of experts."""


@pytest.mark.parametrize("name", FIRST)
def test_heads_and_channels_are_removed_or_it_says_why_not(name, saved, tmp_path):
    checkpoint = saved(name)
    out = tmp_path / "half"
    options = {"target": Target(units=0.5), "calibration": tokens(16, batch=4), "format": "jprune"}
    method = LLMPruner(protect_first=0, protect_last=0, examples=4, sequence_length=16)
    if name in REFUSED:
        with pytest.raises(JpruneError, match=REFUSED[name]):
            shrink_model(checkpoint, out, method=method, **options)
        return
    shrink_model(checkpoint, out, method=method, **options)
    half = load(out)
    for i in range(half.config.layers):
        before, after = checkpoint.config.layer(i), half.config.layer(i)
        assert after.d_ff == before.d_ff / 2
        kind = "kv_heads" if before.kv_heads > 1 else "heads"  # a single KV head stays
        assert getattr(after, kind) == getattr(before, kind) / 2
    params = jax.tree.map(jnp.asarray, half.params())
    assert np.isfinite(decoder.apply(half.config, params, jnp.asarray(tokens(6)))).all()

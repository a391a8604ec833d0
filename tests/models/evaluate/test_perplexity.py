import math

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import devices, trees
from jprune.errors import JpruneError
from jprune.evaluate import passing
from jprune.evaluate import perplexity as module
from jprune.evaluate.perplexity import mean_nll, perplexity
from jprune.models import decoder
from jprune.models.config import DecoderConfig


class Model:
    """A model in memory with the face of a checkpoint; remembers what was read."""

    def __init__(self, config, params):
        self.config, self.model = config, decoder.in_blocks(config)
        self.tree = jax.tree.map(np.asarray, params)
        self.reads = []

    def params(self, prefix):
        self.reads.append(prefix)
        tree = self.tree
        for key in prefix.split("/"):
            tree = tree[key]
        return tree


def make(key, *, tied=False, dtype=jnp.float32, **options):
    config = DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab=37,
        d_model=16,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=4,
        d_ff=24,
        context=64,
        tied=tied,
        **options,
    )
    # Twenty times the usual deviation: else every token is as likely as another, and a wrong target would go unseen.
    params = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim > 1 else leaf, decoder.init_params(config, key))
    return Model(config, jax.tree.map(lambda leaf: leaf.astype(dtype), params))


@pytest.fixture
def tokens(rng):
    return rng.integers(0, 37, (7, 12), dtype=np.int32)


def reference(model, tokens):
    """Cross-entropy of each window, token by token in float64, from the whole model's logits."""
    params = jax.tree.map(jnp.asarray, model.tree)
    logits = np.asarray(compiled.apply(model.config, params, jnp.asarray(tokens)), np.float64)
    nll = []
    for window, rows in zip(tokens, logits):
        losses = []
        for position in range(len(window) - 1):
            row = rows[position]
            losses.append(-math.log(math.exp(row[window[position + 1]]) / sum(math.exp(value) for value in row)))
        nll.append(sum(losses) / len(losses))
    return np.array(nll)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("batch", [None, 1, 3, 7, 100])
def test_equals_the_whole_model(getkey, tokens, tied, batch):
    model = make(getkey(), tied=tied)
    expected = reference(model, tokens)
    assert expected.std() > 0.1
    np.testing.assert_allclose(mean_nll(model, tokens, batch=batch), expected, rtol=1e-5)
    result = perplexity(model, tokens, batch=batch)
    assert result.value == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert (result.tokens, result.sequence_length, result.windows) == (84, 12, 7)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_in_chunks_and_tiles(getkey, tokens, monkeypatch, tied):
    model = make(getkey(), tied=tied)
    expected = reference(model, tokens)
    for rows, tile in ((5, 10), (11, 1)) if tied else ((1, 37), (5, 36)):  # the last of 4 tiles begins in the third
        monkeypatch.setattr(module, "LOGITS_BYTES", 4 * tile * rows)
        monkeypatch.setattr(module, "TILE", tile)
        module._jit_nll.cache_clear()
        np.testing.assert_allclose(mean_nll(model, tokens), expected, rtol=1e-6)
    module._jit_nll.cache_clear()


def test_logits_stay_small_with_a_big_vocabulary():
    vocab, d_model = 256_000, 16
    config = DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab=vocab,
        d_model=d_model,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=2,
        d_ff=4,
        context=4096,
    )
    params = {key: decoder.abstract_params(config)[key] for key in ("final_norm", "head")}
    x = jax.ShapeDtypeStruct((2, 2048, d_model), jnp.float32)
    ids = jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    compiled = (
        module._jit_nll(decoder.head(config), decoder.head_of, devices.one_device()).lower(params, x, ids).compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * module.LOGITS_BYTES


def test_bfloat16_is_close(getkey, tokens):
    model = make(getkey(), dtype=jnp.bfloat16)
    expected = reference(Model(model.config, jax.tree.map(lambda a: a.astype(np.float32), model.tree)), tokens)
    np.testing.assert_allclose(mean_nll(model, tokens), expected, rtol=1e-5)
    np.testing.assert_allclose(mean_nll(model, tokens, dtype=jnp.bfloat16), expected, rtol=0.03)


def test_streams_each_part_once_and_reports_progress(getkey, tokens):
    model = make(getkey())
    steps = []
    mean_nll(model, tokens, batch=2, progress=lambda done, total: steps.append((done, total, len(model.reads))))
    assert model.reads == ["embed", "blocks/0", "blocks/1", "blocks/2", "final_norm", "head"]
    assert steps == [(1, 4, 2), (2, 4, 3), (3, 4, 4), (4, 4, 6)]


def test_equal_blocks_and_ragged_batches_compile_once(getkey, tokens, four_devices):
    model = make(getkey(), windows=(None, 4, None), norm_eps=2e-6)  # an epsilon of its own: functions of its own
    with four_devices():
        mean_nll(model, tokens, batch=1)  # seven windows: four, one for each device, and three
        lie = devices.batch(devices.make_mesh(), 4)
    for index in range(3):
        assert passing._jit_in_place(decoder.block(model.config, index), lie)._cache_size() == 1
    assert decoder.block(model.config, 0) is decoder.block(model.config, 2)
    np.testing.assert_allclose(mean_nll(model, tokens), reference(model, tokens), rtol=1e-5)


def test_changed_weights_change_the_result(getkey, tokens):
    model = make(getkey())
    value = perplexity(model, tokens).value
    flat = trees.flatten(model.tree)
    flat["blocks/1/mlp/down/kernel"] = np.zeros_like(flat["blocks/1/mlp/down/kernel"])
    assert perplexity(Model(model.config, trees.unflatten(flat)), tokens).value != value


def test_uniform_logits_give_the_vocabulary_size(getkey, tokens):
    model = make(getkey())
    model.tree["head"]["kernel"] = np.zeros_like(model.tree["head"]["kernel"])
    assert perplexity(model, tokens).value == pytest.approx(37, rel=1e-6)


@pytest.mark.parametrize("shape", [(0, 12), (3, 1), (3, 0)])
def test_too_few_tokens(getkey, shape):
    with pytest.raises(JpruneError, match="at least one window of at least two tokens"):
        perplexity(make(getkey()), np.zeros(shape, np.int32))


@pytest.mark.parametrize("bad", [-1, 37])
def test_ids_outside_the_vocabulary(getkey, tokens, bad):
    tokens[2, 3] = bad
    with pytest.raises(JpruneError, match=r"outside the model's vocabulary \[0, 37\)"):
        perplexity(make(getkey()), tokens)


def test_bad_batch(getkey, tokens):
    with pytest.raises(JpruneError, match="windows in a batch must be at least 1; it is 0"):
        perplexity(make(getkey()), tokens, batch=0)


def test_non_finite_weights(getkey, tokens):
    model = make(getkey())
    model.tree["final_norm"]["scale"] = np.full(16, np.nan, np.float32)
    with pytest.raises(JpruneError, match="cross-entropy of window 0 is nan in float32"):
        perplexity(model, tokens)

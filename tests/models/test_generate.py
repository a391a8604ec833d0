"""Generation with a cache equals running the whole text again for every token; sampling follows its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.errors import JpruneError
from jprune.models import decoder, generate
from jprune.models.config import DecoderConfig
from jprune.models.continuation import Continuation
from jprune.models.rope import Rope

PROMPT = [3, 14, 15, 9, 2, 6]


def tiny(**options):
    sizes = {"vocab": 40, "d_model": 24, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_ff": 32}
    return DecoderConfig(architecture="LlamaForCausalLM", **{"context": 300} | sizes | options)


def lively(config, key, dtype=jnp.float32):
    """Random parameters whose layers outweigh the embedding, so that the argmax changes from token to token."""
    scale = {"o/kernel": 400, "down/kernel": 400} | {f"{name}/kernel": 20 for name in ("q", "k", "v", "gate", "up")}
    params = trees.flatten(decoder.init_params(config, key, dtype))
    return trees.unflatten({path: scale.get("/".join(path.split("/")[-2:]), 1) * x for path, x in params.items()})


def without_cache(config, params, prompt, count):
    tokens = list(prompt)
    run = jax.jit(lambda p, t: decoder.apply(config, p, t))
    for _ in range(count):
        padded = np.zeros((1, len(prompt) + count), np.int32)  # one shape: later tokens are not seen
        padded[0, : len(tokens)] = tokens
        tokens.append(int(run(params, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": True, "qkv_bias": True, "qk_norm": True},
        {"windows": (None, 3, 1)},
        {"windows": (4, 4, 4), "kv_heads": 1},
        {"rope": Rope(kind="yarn", factor=2.0, context=128, attention_factor=1.07)},
        {"rope": Rope(kind="dynamic", factor=2.0, context=300)},
    ],
)
def test_greedy_equals_the_forward_without_cache(getkey, options):
    config = tiny(**options)
    params = lively(config, getkey())
    expected = without_cache(config, params, PROMPT, 24)
    assert len(set(expected)) > 3
    assert generate.generate(config, params, PROMPT, max_tokens=24) == expected


@pytest.mark.parametrize("length", [1, 127, 128, 129])
def test_padding_of_the_prompt_is_not_seen(getkey, length):
    config = tiny(windows=(None, 50, None))
    params = lively(config, getkey())
    prompt = np.random.default_rng(0).integers(0, 40, length).tolist()
    assert generate.generate(config, params, prompt, max_tokens=4) == without_cache(config, params, prompt, 4)


def test_layers_of_different_sizes(getkey):
    config = tiny()
    params = lively(config, getkey())
    attention = params["blocks"]["1"]["attn"]
    for name, axis, kept in (("q", 1, 2), ("k", 1, 1), ("v", 1, 1), ("o", 0, 2)):
        attention[name]["kernel"] = jax.lax.slice_in_dim(attention[name]["kernel"], 0, kept, axis=axis)
    assert generate.generate(config, params, PROMPT, max_tokens=8) == without_cache(config, params, PROMPT, 8)


@pytest.mark.parametrize("options", [{"windows": (None, 3, 1)}, {"rope": None, "positions": 300}, {"alibi": True}])
def test_prompts_of_different_lengths_go_together(getkey, options):
    config = tiny(**options)
    params = lively(config, getkey())
    prompts = [PROMPT, [7], [int(i) for i in np.random.default_rng(0).integers(0, 40, 127)]]
    alone = [generate.generate(config, params, prompt, max_tokens=9) for prompt in prompts]
    assert alone[1] == without_cache(config, params, prompts[1], 9)
    together = np.array(list(generate.stream_batch(config, params, prompts, max_tokens=9))).T
    assert together.tolist() == alone

    # Each ends where it would alone; nothing is computed when all have.
    end = alone[0][2]
    ended = np.array(list(generate.stream_batch(config, params, prompts, max_tokens=9, eos_id=end))).T
    ends = [own.index(end) if end in own else len(own) for own in alone]
    assert ended.shape[1] == max(ends)
    for own, row, at in zip(alone, ended.tolist(), ends):
        assert row == own[:at] + [generate.ENDED] * (max(ends) - at)


def test_a_growing_text_stops_and_hides_what_may_be_a_stop():
    pieces = {0: "one ", 1: "two", 2: "\n", 3: "\nthree", 4: "caf\ufffd"}

    def said(tokens, stop=()):
        text = Continuation(lambda ids: "".join(pieces[i] for i in ids), stop)
        return text, [text.add(token) for token in tokens]

    text, shown = said([0, 1, 2, 3], ["\n\n", "", "never"])
    assert (shown, text.text, text.stopped, text.rest()) == (["one ", "two", "", ""], "one two", True, "")
    text, shown = said([1, 2, 1], ["\n\n"])
    assert (shown, text.stopped, text.rest()) == (["two", "", "\ntwo"], False, "")
    text, shown = said([1, 2], ["\n\n"])
    assert (shown, text.rest()) == (["two", ""], "\n")
    text, shown = said([4])
    assert (shown, text.rest()) == ([""], "caf\ufffd")


def test_numpy_bfloat16_parameters(getkey):
    config = tiny()
    params = jax.tree.map(np.asarray, lively(config, getkey(), jnp.bfloat16))
    assert len(generate.generate(config, params, PROMPT, max_tokens=5)) == 5
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))


def test_stops_before_an_end_token(getkey):
    config = tiny()
    params = lively(config, getkey())
    tokens = generate.generate(config, params, PROMPT, max_tokens=12)
    end = next(token for token in tokens if token != tokens[0])
    expected = tokens[: tokens.index(end)]
    assert generate.generate(config, params, PROMPT, max_tokens=12, eos_id=end) == expected
    assert generate.generate(config, params, PROMPT, max_tokens=12, eos_id=[end, tokens[-1]])[:1] == tokens[:1]
    assert generate.generate(config, params, PROMPT, max_tokens=0) == []


def test_sampling_is_seeded_and_cold_sampling_is_greedy(getkey):
    config = tiny()
    params = lively(config, getkey())

    def run(**options):
        return generate.generate(config, params, PROMPT, max_tokens=12, **options)

    assert run(temperature=1.0, seed=1) == run(temperature=1.0, seed=1)
    assert run(temperature=1.0, seed=1) != run(temperature=1.0, seed=2)
    assert run(temperature=1e-4) == run()
    assert run(temperature=2.0, top_p=1e-6) == run()


def test_one_program_serves_all_equal_layers(getkey):
    config = tiny(d_ff=36)
    params = lively(config, getkey())
    generate.generate(config, params, PROMPT, max_tokens=3)
    layer = generate._layer(config, 0)
    assert layer is generate._layer(config, 2)
    before = layer._cache_size()
    generate.generate(config, params, [*PROMPT, 1], max_tokens=5)
    assert layer._cache_size() == before


@pytest.mark.parametrize(
    ("top_p", "allowed"),
    [(0.3, [1]), (0.5, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (1.0, [0, 1, 2, 3])],
)
def test_nucleus(top_p, allowed):
    probabilities = np.array([0.15, 0.5, 0.05, 0.3])
    logits = jnp.tile(jnp.log(probabilities).astype(jnp.float32), (4000, 1))
    drawn = generate.sample(logits, jnp.float32(1.0), jnp.float32(top_p), jax.random.key(0))
    counts = np.bincount(drawn, minlength=4) / 4000
    expected = np.zeros(4)
    expected[allowed] = probabilities[allowed] / probabilities[allowed].sum()
    np.testing.assert_allclose(counts, expected, atol=0.04)
    assert set(np.flatnonzero(counts)) <= set(allowed)


def test_temperature_divides_the_logits():
    logits = jnp.tile(jnp.array([0.0, 1.0]), (4000, 1))
    drawn = generate.sample(logits, jnp.float32(0.5), jnp.float32(1.0), jax.random.key(0))
    assert abs(np.mean(drawn) - 1 / (1 + np.exp(-2))) < 0.03


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([40], {}, "token 40 .* vocabulary of 40"),
        ([-1], {}, "token -1"),
        ([1] * 295, {}, "context of 300; max_tokens may be 0 to 5"),
        ([1], {"max_tokens": -1}, "max_tokens -1"),
        ([1], {"temperature": -1.0}, "temperature >= 0"),
        ([1], {"top_p": 0.0}, "0 < top_p"),
    ],
)
def test_bad_input(prompt, options, message):
    with pytest.raises(JpruneError, match=message):
        generate.stream(tiny(), {}, prompt, **{"max_tokens": 6} | options)

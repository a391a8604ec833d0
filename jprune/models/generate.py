"""Text generation with a key/value cache: greedy, by temperature, and nucleus (top-p) sampling.

One compiled program runs one layer; it is called for each layer in turn with that layer's parameters and its cache
(donated, so updated in place). Compiling thus costs one layer however deep the model is, and layers of other sizes, as
surgery leaves them, only add a program per distinct shape. The prompt is padded to a multiple of `BUCKET`, so that
prompts of similar length share a program; padding lies after the prompt, where causality hides it and the next tokens
overwrite it. Prompts of different lengths go together the same way: from the first new token on each text stands at a
place of its own in its cache.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jprune.annotations import Array, Float, Int, Key
from jprune.errors import JpruneError
from jprune.models import decoder
from jprune.models.attention import Cache
from jprune.models.config import DecoderConfig

BUCKET = 128  # prompt lengths and cache capacities are rounded up to a multiple
ENDED = -1
"""In place of a token: the text has ended."""


def generate(
    config: DecoderConfig,
    params: decoder.Params,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
) -> list[int]:
    """The tokens that follow a prompt; see `stream`."""
    return list(
        stream(
            config,
            params,
            prompt_ids,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            eos_id=eos_id,
        )
    )


def stream(
    config: DecoderConfig,
    params: decoder.Params,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, one by one.

    Args:
      params: the whole model; it computes in the dtype of its embedding.
      max_tokens: the number of tokens to stop after.
      temperature: 0 takes the likeliest token, else logits are divided by it before sampling.
      top_p: sample among the likeliest tokens whose probabilities first reach this sum (Holtzman et al.,
        arXiv:1904.09751).
      seed: equal seeds give equal tokens.
      eos_id: token or tokens that end the text; they are not yielded.

    Raises:
      JpruneError: an option outside its range, an empty prompt, a token outside the vocabulary, or prompt and
        max_tokens together beyond the model's context.
    """
    steps = stream_batch(
        config,
        params,
        [prompt_ids],
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        eos_id=eos_id,
    )
    return (int(tokens[0]) for tokens in steps)


def stream_batch(
    config: DecoderConfig,
    params: decoder.Params,
    prompts: Sequence[Sequence[int]] | Int[np.ndarray, "B T"],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yield the tokens that follow several prompts, of any lengths, one of each at a time; see `stream`.

    A text that has ended has `ENDED` for a token from then on; when all have, nothing more is yielded.
    """
    _check_sampling(temperature, top_p)
    checked = [check_prompt(config, prompt, max_tokens) for prompt in prompts]
    if not checked:
        raise JpruneError("there is no prompt; give at least one")
    ends = [] if eos_id is None else list(eos_id) if isinstance(eos_id, Collection) else [eos_id]
    steps = _tokens(config, params, checked, max_tokens, temperature, top_p, jax.random.key(seed))
    return _until(steps, ends)


def _until(steps: Iterator[Int[np.ndarray, " B"]], ends: Sequence[int]) -> Iterator[Int[np.ndarray, " B"]]:
    """Tokens as they come, `ENDED` from each text's end on."""
    ended: bool | np.ndarray = False
    for tokens in steps:
        ended |= np.isin(tokens, ends)
        if np.all(ended):
            return
        yield np.where(ended, ENDED, tokens)


def _check_sampling(temperature: float, top_p: float) -> None:
    if temperature < 0 or not 0 < top_p <= 1:
        raise JpruneError(f"expected temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")


def check_prompt(
    config: DecoderConfig, prompt_ids: Sequence[int] | np.ndarray, max_tokens: int
) -> Int[np.ndarray, " T"]:
    """The tokens of a prompt, which a model can continue by so many; else a `JpruneError` says why it cannot."""
    prompt = np.asarray(prompt_ids, np.int32)
    length = len(prompt)
    if length == 0:
        raise JpruneError(
            "the prompt is empty: give at least one token (the model's beginning-of-text token, for example)"
        )
    if max_tokens < 0 or length + max_tokens > config.context:
        raise JpruneError(
            f"a prompt of {length} tokens and max_tokens {max_tokens} do not fit into the model's context of "
            f"{config.context}; max_tokens may be 0 to {max(config.context - length, 0)}"
        )
    if prompt.min() < 0 or prompt.max() >= config.vocab:
        bad = prompt[(prompt < 0) | (prompt >= config.vocab)][0]
        raise JpruneError(
            f"token {bad} in the prompt is outside the vocabulary of {config.vocab}; is the tokenizer this model's?"
        )
    return prompt


def _tokens(
    config: DecoderConfig,
    params: decoder.Params,
    prompts: Sequence[np.ndarray],
    max_tokens: int,
    temperature: float,
    top_p: float,
    key: Key[Array, ""],
) -> Iterator[Int[np.ndarray, " B"]]:
    lengths = np.array([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    params = jax.tree.map(jnp.asarray, params)  # onto the device once, not at every step
    blocks = [params["blocks"][str(i)] for i in range(config.layers)]
    ends = {name: part for name, part in params.items() if name != "blocks"}
    layers = [_layer(config, i) for i in range(config.layers)]
    capacity = _rounded(longest + max_tokens)
    padded = np.zeros((len(prompts), min(_rounded(longest), capacity)), np.int32)
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = prompt
    x = decoder.embed(config)(ends, jnp.asarray(padded))
    caches: list[list[Array]] = []
    for layer, block in zip(layers, blocks):
        cache = decoder.empty_cache(block, len(prompts), capacity, x.dtype)
        x, keys, values = layer(block, x, cache.keys, cache.values, None)
        caches.append([keys, values])

    # Prompts of one length stand at one place; of others, each text has a place of its own.
    apart = len(set(lengths.tolist())) > 1
    held = jnp.asarray(lengths if apart else longest, jnp.int32)
    x = x[jnp.arange(len(prompts)), held - 1][:, None] if apart else x[:, longest - 1 : longest]
    pick = _pick(config, greedy=temperature == 0, apart=apart)
    layers = [_layer(config, i, apart=apart) for i in range(config.layers)]
    for step in range(max_tokens):
        token, x = pick(ends, x, temperature, top_p, jax.random.fold_in(key, step), held)
        yield np.asarray(token)
        if step + 1 == max_tokens:
            return
        for i, (layer, block) in enumerate(zip(layers, blocks)):
            x, *grown = layer(block, x, *caches[i], held)
            caches[i] = grown
        held += 1


def _rounded(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def _layer(config: DecoderConfig, index: int, *, apart: bool = False) -> Callable[..., tuple[Array, Array, Array]]:
    """The jitted layer: `(params, x, keys, values, length) -> (x, keys, values)`; length None for an empty cache.

    Where texts stand `apart`, each has a length of its own, and `length` is [B].
    """
    return _jitted_layer(decoder.cached_block(config, index), apart)


@functools.cache
def _jitted_layer(block: Callable[..., tuple[Array, Cache]], apart: bool) -> Callable[..., tuple[Array, Array, Array]]:
    def one(params, x, keys, values, length):
        x, cache = block(params, x, Cache(keys, values, 0 if length is None else length))
        return x, cache.keys, cache.values

    def each(params, x, keys, values, length):
        return tuple(out[0] for out in one(params, x[None], keys[None], values[None], length))

    @functools.partial(jax.jit, donate_argnames=("x", "keys", "values"))
    def layer(params, x, keys, values, length):
        run = jax.vmap(each, in_axes=(None, 0, 0, 0, 0)) if apart else one
        return run(params, x, keys, values, length)

    return layer


def _pick(config: DecoderConfig, *, greedy: bool, apart: bool) -> Callable[..., tuple[Array, Array]]:
    """The jitted end of a step: `(params, x [B, 1, d_model], ...) -> (token [B], its embedding [B, 1, d_model])`."""
    return _jitted_pick(decoder.embed(config), decoder.head(config), greedy, apart)


@functools.cache
def _jitted_pick(embed: Callable, head: Callable, greedy: bool, apart: bool) -> Callable[..., tuple[Array, Array]]:
    def each(params, token, position):
        return embed(params, token[None, None], position)[0]

    @jax.jit
    def pick(params, x, temperature, top_p, key, position):
        logits = head(params, x)[:, -1]
        token = jnp.argmax(logits, axis=-1) if greedy else sample(logits, temperature, top_p, key)
        if apart:
            return token, jax.vmap(each, in_axes=(None, 0, 0))(params, token, position)
        return token, embed(params, token[:, None], position)

    return pick


def sample(
    logits: Float[Array, "B vocab"], temperature: Float[Array, ""], top_p: Float[Array, ""], key: Key[Array, ""]
) -> Int[Array, "B"]:
    """One token a row, drawn from softmax(logits / temperature) restricted to its nucleus.

    The nucleus is the smallest set of likeliest tokens whose probabilities sum to at least `top_p`; it holds at least
    the likeliest token.
    """
    logits = logits / temperature
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities  # what stands before each token
    least = jnp.min(jnp.where(likelier < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits >= least, logits, -jnp.inf))

"""The demo model as it is: fetched (93 MB, once), read, understood, written and read by others."""

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.checkpoints import demo, huggingface, load

ENGLISH = (
    "The history of science is the study of how people have come to understand the natural world. For most of that "
    "history, knowledge was passed on by word of mouth, and only slowly did writing, printing and the founding of "
    "universities make it possible to compare observations over long periods of time. Galileo Galilei pointed a "
    "telescope at the sky and saw that Jupiter had moons of its own."
)


MULTILINGUAL = (
    ENGLISH,
    "Привет, мир! 你好，世界。これはテストです 12345",
    "émigré naïve cafe\u0301 😀👩‍👩‍👧 ٣٤٥ ½ 三",
    "<|im_start|>user\nhi<|im_end|>\n",
    "def f(x):\n    return x**2  # ok\r\n\t",
)


def test_the_real_model(tmp_path):
    transformers = pytest.importorskip("transformers")

    assert demo.fetch().stat().st_size == demo.SIZE
    checkpoint = load("demo")
    config = checkpoint.config
    assert (config.layers, config.d_model, config.d_ff, config.vocab) == (30, 576, 1536, 49152)
    assert (config.heads, config.kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope.theta, config.norm_eps, config.context, config.tied) == (100000.0, 1e-5, 8192, True)
    assert checkpoint.parameters == 134_515_008
    assert (checkpoint.suggested.samples, checkpoint.suggested.training_length) == (16, 256)

    # A wrong permutation of q and k, or a wrong tokenizer, would give a perplexity in the hundreds.
    ids = checkpoint.tokenizer.encode(ENGLISH, add_special_tokens=False)
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    logits = compiled.apply(config, params, jnp.asarray([ids], jnp.int32))[0]
    losses = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
    assert np.exp(losses.mean()) < 20
    capital = checkpoint.tokenizer.encode("The capital of France is", add_special_tokens=False)
    logits = compiled.apply(config, params, jnp.asarray([capital], jnp.int32))[0, -1]
    assert checkpoint.tokenizer.decode([int(logits.argmax())]) == " Paris"

    with huggingface.Writer(tmp_path, checkpoint, dict.fromkeys(checkpoint.shapes, jnp.bfloat16)) as writer:
        for path in checkpoint.shapes:
            writer.write(path, checkpoint.read(path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config == config
    for text in MULTILINGUAL:
        ids = checkpoint.tokenizer.encode(text, add_special_tokens=False)
        assert theirs.encode(text) == again.tokenizer.encode(text) == ids
        assert checkpoint.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (theirs.bos_token, theirs.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")

"""Random small models of every family, made and computed by transformers: the truth our families are held against."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from jprune.checkpoints import huggingface, load
from jprune.models import decoder, families

VOCAB, CONTEXT = 40, 64
VARIANTS = {
    f"{architecture.removesuffix('ForCausalLM')}-{number}": (family, architecture, variant)
    for family in families.FAMILIES
    for architecture in family.architectures
    for number, variant in enumerate(family.variants)
}
"""Family, architecture and config.json keys by name."""
FIRST = {name: case for name, case in VARIANTS.items() if name.endswith("-0")}


def tokens(length, batch=2):
    return np.random.default_rng(1).integers(0, VOCAB, (batch, length)).astype(np.int32)


def sizes(family, *, kv_heads=2, group=2, head_dim=8, layers=2, tied=None):
    """config.json keys of these sizes, under the names the family has for them; what it cannot choose is left out."""
    free = {key: family.names.get(key, key) in family.defaults for key in ("num_key_value_heads", "head_dim")}
    free["num_key_value_heads"] &= "kv_lora_rank" not in family.defaults  # latent attention has as many
    group = group if free["num_key_value_heads"] else 1
    heads = kv_heads * group
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 12 * heads if free["head_dim"] else heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": 28,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": tied,
    }
    named = {family.names.get(key, key): value for key, value in common.items() if value is not None}
    return {key: value for key, value in named.items() if key in family.defaults}


def model(architecture, options, *, seed=0):
    """A torch model with all weights random, norms and biases too, large enough that attention is far from uniform."""
    model_class = getattr(transformers, architecture)
    # A copy: transformers writes into nested options.
    given = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2} | copy.deepcopy(options)
    config = model_class.config_class(**given)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    made = model_class(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.15)
    made.tie_weights()
    return made


def make(name, **options):
    """A model of a variant; `options` are those of `sizes`."""
    family, architecture, variant = VARIANTS[name]
    return model(architecture, sizes(family, **options) | variant)


def save(made, folder):
    """As transformers saves it, quietly."""
    transformers.utils.logging.disable_progress_bar()
    made.save_pretrained(folder)
    return folder


def logits(made, tokens):
    with torch.no_grad():
        return made(torch.from_numpy(np.asarray(tokens)).long(), use_cache=False).logits.float().numpy()


def check(name, folder, *, length=12, **options):
    """Of a variant, ours and transformers' logits are equal, and the files that are read and written again."""
    theirs = make(name, **options)
    checkpoint = load(save(theirs, folder / "source"))
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    got = jax.jit(lambda p, t: decoder.apply(checkpoint.config, p, t))(params, tokens(length))
    want = logits(theirs, tokens(length))
    assert np.abs(want).max() > 0.1  # the comparison means something
    assert np.abs(np.asarray(got) - want).max() <= 1e-4

    (folder / "copy").mkdir()
    with huggingface.Writer(folder / "copy", checkpoint) as writer:
        for path in checkpoint.shapes:
            writer.write(path, checkpoint.read(path))
    before, after = (load_file(folder / each / "model.safetensors") for each in ("source", "copy"))
    assert before.keys() == after.keys()
    for key, stored in before.items():
        assert after[key].tobytes() == stored.tobytes(), key

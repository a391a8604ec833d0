"""Random small models of every family, made and computed by transformers: the truth our families are held against."""

import copy

import numpy as np
import torch
import transformers

VOCAB, CONTEXT = 40, 64


def sizes(family, *, kv_heads=2, group=2, head_dim=8, layers=2, tied=None):
    """config.json keys of these sizes, under the names the family has for them; what it cannot choose is left out."""
    free = {key: family.names.get(key, key) in family.defaults for key in ("num_key_value_heads", "head_dim")}
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


def save(made, folder):
    """As transformers saves it, quietly."""
    transformers.utils.logging.disable_progress_bar()
    made.save_pretrained(folder)
    return folder


def logits(made, tokens):
    with torch.no_grad():
        return made(torch.from_numpy(np.asarray(tokens)).long(), use_cache=False).logits.float().numpy()

"""MaxText: a Hugging Face folder made into its stacked decoder and back, by the tables of its own converters.

Those (`to_maxtext`, `to_huggingface`) go between folders and checkpoints of MaxText; their tables and functions work
on arrays. They know of the rotary halves that MaxText interleaves, and of the scale that its query kernels hold.
"""

import json

from maxtext.checkpoint_conversion.utils.hf_shape import HF_SHAPE
from maxtext.checkpoint_conversion.utils.param_mapping import HOOK_FNS, PARAM_MAPPING
from maxtext.checkpoint_conversion.utils.tensor_handling import get_hf_loading_function
from maxtext.checkpoint_conversion.utils.utils import process_maxtext_param
from maxtext_decoder import configured, made
from safetensors.numpy import load_file

import jprune

BLOCKS = "(self_attention|mlp)/.*/kernel"
LIKE = "llama3.1-8b"
"""A model of MaxText's whose names and layouts ours has."""


def config(hf):
    """What MaxText calls a config.json's entries; rotary halves are interleaved as for Llama 3.1, and not scaled."""
    if hf.get("rope_scaling") or hf["tie_word_embeddings"]:
        raise SystemExit("config.json has rope_scaling or tied embeddings, which this recipe was not tried with")
    return configured(
        base_emb_dim=hf["hidden_size"],
        base_mlp_dim=hf["intermediate_size"],
        base_num_decoder_layers=hf["num_hidden_layers"],
        base_num_query_heads=hf["num_attention_heads"],
        base_num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        vocab_size=hf["vocab_size"],
        normalization_layer_epsilon=hf["rms_norm_eps"],
        rope_max_timescale=hf["rope_theta"],
        rope_type="llama3.1",
        rope_use_scale=False,
    )


def load(folder):
    """The model as a function of its variables, and tokens to calibrate it with."""
    hf, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    logits, variables, args = made(config(hf))
    leaves = jprune.trees.flatten(variables)
    hooks = HOOK_FNS[LIKE](hf, config(hf), scan_layers=True, saving_to_hf=False)
    read = {}
    for key, names in PARAM_MAPPING[LIKE](hf, config(hf), scan_layers=True).items():
        path = key.replace("-", "/")
        shape = leaves[path].shape
        read[path] = get_hf_loading_function(names, tensors.__getitem__, hooks.get(key), shape, config(hf))()
    if read.keys() != leaves.keys():
        raise SystemExit(f"not in MaxText's table: {sorted(read.keys() ^ leaves.keys())}")
    return logits, jprune.trees.replace(variables, read), args


def tensors(variables, folder):
    """Tensors by their names in Hugging Face, layer by layer."""
    hf = json.loads((folder / "config.json").read_text())
    table = PARAM_MAPPING[LIKE](hf, config(hf), scan_layers=True)
    hooks = HOOK_FNS[LIKE](hf, config(hf), scan_layers=True, saving_to_hf=True)
    found = {}
    for path, leaf in jprune.trees.flatten(variables).items():
        key = path.replace("/", "-")
        found |= process_maxtext_param(key, leaf, table, hooks, HF_SHAPE[LIKE](hf), config(hf))
    return found

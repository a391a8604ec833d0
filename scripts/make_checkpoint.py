"""Writes a random checkpoint of any family and shape, tensor by tensor, for tests of memory and speed.

    python scripts/make_checkpoint.py OUT --shape llama-7b --layers 4
    python scripts/make_checkpoint.py OUT --config config.json --layers 2 --dtype float32

Nothing in it has been trained, but its statistics are like those of models that have been: kernels are normal with a
deviation that keeps the residual stream growing slowly, times a lognormal scale for every input and output; norm scales
vary, and one hidden dimension in five hundred is ten times as large as the others, so that Gram matrices are badly
conditioned as real ones are. Every tensor is drawn from a seed of its own: the layers do not depend on how many there
are. One tensor is in memory at a time, and of it only a few rows in float32.
"""

import argparse
import functools
import json
import zlib
from pathlib import Path

import numpy as np

from jprune.checkpoints import huggingface
from jprune.checkpoints.checkpoint import Checkpoint
from jprune.checkpoints.source import FLOAT_DTYPES, Source, StoredTensor
from jprune.models import families

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# hidden, intermediate, layers, heads, KV heads, vocabulary, context; from the models' config.json.
WIDTHS = {
    "tiny": (64, 176, 2, 4, 2, 256, 256),
    "llama-7b": (4096, 11008, 32, 32, 32, 32000, 2048),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000, 2048),
    "llama-70b": (8192, 28672, 80, 64, 8, 32000, 4096),
    "llama-405b": (16384, 53248, 126, 128, 8, 128256, 131072),
    "moe-30b-a3b": (2048, 6144, 48, 32, 4, 151936, 40960),
    "moe-671b": (7168, 18432, 61, 128, 8, 129280, 4096),
}
# experts, experts of a token, width of an expert. "moe-30b-a3b" is Qwen3-30B-A3B. "moe-671b" has the widths and experts
# of DeepSeek-V3 in every layer, in an architecture that jprune knows: Qwen3's, with grouped queries for latent
# attention, and no shared expert.
EXPERTS = {"moe-30b-a3b": (128, 8, 768), "moe-671b": (256, 8, 2048)}
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3_moe": LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True},
}
ROWS_AT_ONCE = 2**24  # elements of a tensor that are drawn together


def hf_config(family: str, shape: str) -> dict:
    """config.json of a family at a named shape; of one with experts, whatever the family."""
    hidden, intermediate, layers, heads, kv_heads, vocab, context = WIDTHS[shape]
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    experts = dict(zip(names, EXPERTS.get(shape, ())))
    return (
        FAMILIES["qwen3_moe" if experts else family]
        | experts
        | {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 128 if experts else hidden // heads,
            "vocab_size": vocab,
            "max_position_embeddings": context,
        }
    )


def divided(config: dict, by: int) -> dict:
    """The same architecture, narrower: every width that is no number of experts, and so the heads too."""
    widths = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads")
    return config | {key: max(config[key] // by, 1) for key in (*widths, "vocab_size") if key in config}


def random_checkpoint(config: dict, *, dtype: str = "bfloat16", seed: int = 0) -> Checkpoint:
    """A checkpoint whose tensors are drawn when they are read."""
    decoder_config = families.config(config)
    tensors = {}
    for path, entry in families.table(decoder_config).items():
        for key in entry.keys:
            draw = functools.partial(_draw, path, key, entry.shape, FLOAT_DTYPES[dtype], seed)
            tensors[key] = StoredTensor(shape=entry.shape, dtype=FLOAT_DTYPES[dtype], where="random", read=draw)
    return Checkpoint(
        "random",
        Source(
            config=config | {"torch_dtype": dtype},
            tensors=tensors,
            layout="hugging_face",
            side_files=dict,
            identity=lambda: f"random {dtype} {seed}",
        ),
    )


def _draw(path: str, key: str, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    if path.endswith("bias"):
        return (0.01 * rng.standard_normal(shape, np.float32)).astype(dtype)
    if path.endswith("scale"):
        scale = 0.4 * np.exp(0.15 * rng.standard_normal(shape, np.float32))
        scale[_outliers(shape[0])] *= 10
        return scale.astype(dtype)
    values = np.empty(shape, dtype)
    rows, d_in = len(values), values[0].size  # Hugging Face has outputs first
    # What goes back into the residual stream is smaller, as training makes it: otherwise deep models blow up.
    deviation = 0.02 if path.startswith("embed") else (0.3 if path.split("/")[-2] in ("o", "down") else 1) / d_in**0.5
    inputs = deviation * np.exp(0.2 * rng.standard_normal(d_in, np.float32))
    step = max(1, ROWS_AT_ONCE // d_in)
    for start in range(0, rows, step):
        part = rng.standard_normal((min(step, rows - start), d_in), np.float32) * inputs
        part *= np.exp(0.2 * rng.standard_normal((len(part), 1), np.float32))
        values[start : start + step] = part.reshape(-1, *shape[1:])
    return values


def _outliers(size: int) -> np.ndarray:
    """The same hidden dimensions in every layer, as in trained models."""
    return np.random.default_rng(size).choice(size, max(1, size // 500), replace=False)


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes it as a Hugging Face folder."""
    folder.mkdir(parents=True)
    with huggingface.Writer(folder, checkpoint) as writer:
        for path in checkpoint.shapes:
            writer.write(path, checkpoint.read(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that does not exist yet")
    parser.add_argument("--shape", choices=WIDTHS, default="llama-7b")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--config", type=Path, help="a config.json instead of --shape and --family")
    parser.add_argument("--layers", type=int, help="instead of as many as the shape has")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = json.loads(args.config.read_text()) if args.config else hf_config(args.family, args.shape)
    if args.layers is not None:
        config["num_hidden_layers"] = args.layers
    write(args.out, random_checkpoint(config, dtype=args.dtype, seed=args.seed))


if __name__ == "__main__":
    main()

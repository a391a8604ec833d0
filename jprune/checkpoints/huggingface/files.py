"""The names of the files in a Hugging Face folder."""

from pathlib import Path

WHOLE = "model.safetensors"
"""All tensors in one file."""
INDEX = "model.safetensors.index.json"
"""Which shard holds which tensor."""
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Patterns of what travels with the weights: tokenizer, generation, licence (which its terms usually ask for)."""


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights, and their index."""
    return [*sorted(folder.glob("*.safetensors")), *folder.glob(INDEX)]
